"""tar archives: one member per disk, sparse where the disk is (``docs/spec/tar.md``)."""

from __future__ import annotations

from casbackup.formats.port import ArchiveFormat
from casbackup.formats.tar.headers import is_header
from casbackup.formats.tar.reader import TarReader
from casbackup.formats.tar.writer import TarWriter

FORMAT = ArchiveFormat(
    name="tar",
    summary="a tar archive with a sparse member for each disk",
    suffixes=(".tar",),
    recognises=is_header,
    reader=TarReader,
    writer=TarWriter,
)
