"""What readers of formats do with a ``ByteSource``."""

from __future__ import annotations

import os
from collections.abc import Iterator

from casbackup.buffers import aligned_buffer
from casbackup.errors import ArchiveDamaged
from casbackup.formats.port import ByteSource, Data
from casbackup.units import MiB

COPY_BYTES = 1 * MiB
"""How much of a disk is read at once."""


def read_exactly(source: ByteSource, length: int, what: str) -> bytearray:
    """The next ``length`` bytes, which the caller has bounded.

    :raise ArchiveDamaged: when the archive ends before; ``what`` is named in the message.
    """
    data = bytearray(length)
    at = source.tell()
    if source.read_into(memoryview(data)) < length:
        raise ArchiveDamaged(f"{source.name}: ends within {what} at byte {at}")
    return data


def read_at(source: ByteSource, offset: int, length: int, what: str) -> bytearray:
    """As ``read_exactly``, from a place in a seekable source."""
    if offset + length > (source.size_bytes or 0):
        raise ArchiveDamaged(f"{source.name}: {what} at byte {offset} lies beyond the end of the file")
    source.seek(offset)
    return read_exactly(source, length, what)


def read_data(source: ByteSource, disk: int, offset: int, length: int, buffer: memoryview) -> Iterator[Data]:
    """The next ``length`` bytes as data of a disk, piece by piece through ``buffer``.

    :raise ArchiveDamaged: when the archive ends before.
    """
    end = offset + length
    while offset < end:
        piece = buffer[: end - offset]
        at = source.tell()
        got = source.read_into(piece)
        if got < len(piece):
            raise ArchiveDamaged(
                f"{source.name}: ends at byte {at + got} with {end - offset - got} bytes still to come"
            )
        yield Data(disk, offset, piece)
        offset += got


def skip(source: ByteSource, length: int, what: str) -> None:
    """Go on behind the next ``length`` bytes.

    :raise ArchiveDamaged: when the archive ends before.
    """
    at = source.tell()
    if source.seekable and source.size_bytes is not None:
        if at + length > source.size_bytes:
            raise ArchiveDamaged(f"{source.name}: ends within {what} at byte {at}")
        source.seek(at + length)
    elif length > 0:
        _read_over(source, length, what)


def drain(source: ByteSource) -> None:
    """Read a pipe to its end, so that who writes to it does not fail for want of a reader."""
    if not source.seekable:
        buffer = memoryview(aligned_buffer(COPY_BYTES))
        while source.read_into(buffer) == len(buffer):
            pass


def disk_name(source: ByteSource) -> str:
    """For formats that do not name their disk: the file's name without suffix."""
    return os.path.splitext(os.path.basename(source.name))[0].strip("-<>") or "disk"


def _read_over(source: ByteSource, length: int, what: str) -> None:
    at = source.tell()
    buffer = memoryview(aligned_buffer(min(length, COPY_BYTES)))
    while length > 0:
        piece = buffer[:length]
        if source.read_into(piece) < len(piece):
            raise ArchiveDamaged(f"{source.name}: ends within {what} at byte {at}")
        length -= len(piece)
