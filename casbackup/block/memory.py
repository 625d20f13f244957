"""A device in memory, for tests and as the model of what a device is."""

from __future__ import annotations

from collections.abc import Iterator

from casbackup.block.device import Capabilities, Closing, Extent, merged
from casbackup.fs import Buffer
from casbackup.units import KiB

_BLOCK_BYTES = 4 * KiB
_ZERO_BLOCK = bytes(_BLOCK_BYTES)


class MemoryDevice(Closing):
    """A bytearray. Blocks of 4 KiB that hold only zeros are reported as zero.

    Single slice operations on a bytearray are atomic in CPython, which gives the thread safety of the port.
    """

    def __init__(self, content: int | Buffer, *, writable: bool = True) -> None:
        """``content``: a size in bytes, all zero, or bytes that are copied."""
        self._bytes = bytearray(content)
        self.size_bytes = len(self._bytes)
        self.capabilities = Capabilities(
            writable=writable,
            can_write_zeros=writable,
            can_trim=writable,
            knows_zeros=True,
            multi_conn=True,
        )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._bytes[offset : offset + len(buffer)]

    def write(self, offset: int, data: Buffer) -> None:
        self._bytes[offset : offset + len(data)] = data

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._bytes[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self.write_zeros(offset, length)

    def flush(self) -> None:
        """Nothing here survives a crash, so there is nothing to do."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return merged(self._blocks(offset, offset + length))

    def changed_size(self) -> int | None:
        return None

    def close(self) -> None:
        """The content stays until the object goes, so that a test can look at it."""

    def content(self) -> bytes:
        """A copy of all bytes."""
        return bytes(self._bytes)

    def _blocks(self, start: int, end: int) -> Iterator[Extent]:
        while start < end:
            stop = min(end, start - start % _BLOCK_BYTES + _BLOCK_BYTES)
            yield Extent(start, stop - start, self._bytes[start:stop] == _ZERO_BLOCK[: stop - start])
            start = stop
