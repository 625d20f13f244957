"""VMDK, stream-optimised: the image format in which VMware's products exchange disks (``docs/spec/vmdk.md``)."""

from __future__ import annotations

from casbackup.formats.port import ArchiveFormat
from casbackup.formats.tolerant import TolerantSalvager, TolerantVerifier
from casbackup.formats.vmdk.layout import MAGIC
from casbackup.formats.vmdk.reader import VmdkReader
from casbackup.formats.vmdk.writer import VmdkWriter

FORMAT = ArchiveFormat(
    name="vmdk",
    summary="a stream-optimised image of VMware, one disk",
    suffixes=(".vmdk",),
    recognises=lambda beginning: beginning.startswith(MAGIC),
    reader=VmdkReader,
    writer=VmdkWriter,
    verifier=lambda: TolerantVerifier(VmdkReader().open),
    salvager=lambda: TolerantSalvager(VmdkReader().open),
    options=(("level", "of the compression, 1 (default, fast) to 9"),),
)
