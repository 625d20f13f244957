"""The descriptor: the text within the image that tells what kind of disk it is."""

from __future__ import annotations

import re
import zlib

from casbackup.formats.port import ArchiveHead
from casbackup.formats.single import sectors_for

_RESERVED_IDS = frozenset({0, 0xFFFF_FFFE, 0xFFFF_FFFF})
_HEADS, _SECTORS, _MAX_CYLINDERS = 255, 63, 65535
"""The geometry of disks on a SCSI adapter; guests of today ignore it."""

_TEMPLATE = """\
# Disk DescriptorFile
version=1
CID={content_id:08x}
parentCID=ffffffff
createType="streamOptimized"

# Extent description
RW {sectors} SPARSE "{file_name}"

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "{cylinders}"
ddb.geometry.heads = "{heads}"
ddb.geometry.sectors = "{track_sectors}"
ddb.adapterType = "lsilogic"
"""


def descriptor_of(head: ArchiveHead) -> bytes:
    """For the only disk of ``head``."""
    disk = head.disks[0]
    sectors = sectors_for(disk.size_bytes)
    text = _TEMPLATE.format(
        content_id=_content_id(head),
        sectors=sectors,
        file_name=re.sub(r"[^A-Za-z0-9._-]", "_", disk.name)[:100] + ".vmdk",
        cylinders=min(sectors // (_HEADS * _SECTORS), _MAX_CYLINDERS),
        heads=_HEADS,
        track_sectors=_SECTORS,
    )
    return text.encode("ascii")


def _content_id(head: ArchiveHead) -> int:
    """A number that changes with the snapshot, not with each export of it."""
    disk = head.disks[0]
    known = (head.uuid, head.time_s, disk.name, disk.size_bytes)
    number = zlib.crc32(repr(known).encode("utf-8", "surrogatepass"))
    return 1 if number in _RESERVED_IDS else number
