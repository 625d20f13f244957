"""Opening what a backup reads: a raw file or block device, an image of QEMU's, an NBD export.

**Why the format is not simply guessed.** A guest writes what it likes to its disk. If that disk is a raw file
and the format is guessed from its content, a guest that writes a qcow2 header to its first block, with
``/etc/shadow`` as the backing file, has that file in its next backup (CVE-2008-2004 and its kin). So

1. a format that the caller names is taken as it is;
2. block devices and files named ``.raw`` or ``.img`` are raw, whatever they hold;
3. other files are what their first bytes say, but unless the name says so too, one that refers to other
   files is refused, as above: with the format named it opens;
4. a file with the name of an image format and other content is refused: it is damaged, or misnamed.
"""

from __future__ import annotations

import os
import stat

from casbackup.block.align import byte_addressable
from casbackup.block.device import BlockDevice, read_bytes
from casbackup.block.guard import Guarded
from casbackup.block.rawfile import RawFile
from casbackup.errors import SourceUnreadable, UsageError

FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc", "qcow", "qed", "parallels", "dmg", "cloop", "bochs")
"""What ``format`` may be: QEMU's names of image formats."""

_MAGICS = (
    ("qcow2", 0, b"QFI\xfb\x00\x00\x00\x02"),
    ("qcow2", 0, b"QFI\xfb\x00\x00\x00\x03"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("vpc", 0, b"conectix"),
)
"""(format, offset, bytes). A vpc of fixed size has its mark in its last 512 bytes only."""
_MAGIC_BYTES = 512

_RAW_SUFFIXES = (".raw", ".img")
_SUFFIXES = {".qcow2": "qcow2", ".vmdk": "vmdk", ".vhdx": "vhdx", ".vdi": "vdi", ".vhd": "vpc"}
_ALWAYS_MARKED = ("qcow2", "vhdx", "vdi", "vpc")
"""Formats whose every file bears the mark. A ``-flat.vmdk`` holds the plain disk."""


def open_source(spec: str, *, format: str | None = None) -> BlockDevice:
    """Open a path, or an ``nbd://`` or ``nbd+unix://`` URI, read-only and guarded. Takes any range.

    ``format``: one of ``FORMATS``, for a path; without it the rules above decide.

    :raise UsageError: for an unknown format, one given for a URI, a malformed URI, or certificates of no use.
    :raise SourceNotFound: when the path does not exist.
    :raise SourceUnreadable: when it cannot be read, is neither a file nor a device, or by the rules above.
    :raise ToolMissing: when qemu-nbd is needed and not installed.
    :raise ToolFailed: when qemu-nbd cannot open it.
    :raise NbdError: when the NBD server cannot be used.
    """
    if "://" in spec and spec.lower().startswith("nbd"):
        return _open_uri(spec, format)
    if format is not None and format not in FORMATS:
        raise UsageError(f"unknown image format {format!r}; known are {', '.join(FORMATS)}")
    chosen = format or detect_format(spec)
    if chosen == "raw":
        return Guarded(RawFile.open(spec))
    return _open_image(spec, chosen, trusted=format is not None or _format_of_name(spec) == chosen)


def detect_format(path: str) -> str:
    """The format of a file or device by rules 2 and 3 above.

    :raise SourceNotFound: when there is nothing at ``path``.
    :raise SourceUnreadable: when it cannot be read, is neither file nor device, or by rule 4.
    """
    with RawFile.open(path) as file:
        if path.lower().endswith(_RAW_SUFFIXES) or stat.S_ISBLK(os.stat(path).st_mode):
            return "raw"
        length = min(_MAGIC_BYTES, file.size_bytes)
        start, end = read_bytes(file, 0, length), read_bytes(file, file.size_bytes - length, length)
    named = _format_of_name(path)
    found = _format_of_content(end if named == "vpc" else start)
    if found == "raw" and named in _ALWAYS_MARKED:
        raise SourceUnreadable(f"{path} is named like a {named} image but is none; if it is raw, say so")
    return found


def _format_of_content(start: bytes) -> str:
    for name, offset, magic in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return name
    return "raw"


def _format_of_name(path: str) -> str | None:
    return _SUFFIXES.get(os.path.splitext(path)[1].lower())


# The modules for QEMU and NBD are imported when needed: they bring in subprocess, sockets and URL parsing,
# 60 ms that the usual backup of a raw file need not wait for.


def _open_uri(uri: str, format: str | None) -> BlockDevice:
    from casbackup.block.nbd.client import NbdClient  # noqa: PLC0415

    if format not in (None, "raw"):
        raise UsageError(f"{uri}: an NBD server gives the plain disk, so its format is always raw")
    return Guarded(byte_addressable(NbdClient.connect(uri)))


def _open_image(path: str, format: str, *, trusted: bool) -> BlockDevice:
    from casbackup.block.qemu_img import probe  # noqa: PLC0415
    from casbackup.block.qemu_nbd import QemuImage  # noqa: PLC0415

    references = () if trusted else probe(path, image_format=format).references
    if references:
        raise SourceUnreadable(
            f"{path} looks like a {format} image that refers to {references[0]!r}, unlike its name;"
            f" a guest may have written that to a raw disk: name the format"
        )
    return Guarded(byte_addressable(QemuImage.open(path, format)))
