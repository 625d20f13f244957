"""A part of a device as a device of its own."""

from __future__ import annotations

from collections.abc import Iterator

from casbackup.block.device import BlockDevice, Extent
from casbackup.block.filters.base import Filter
from casbackup.fs import Buffer


class Window(Filter):
    """The ``size_bytes`` bytes of the device below from ``start`` on: a partition, or an image within a file."""

    def __init__(self, device: BlockDevice, start: int, size_bytes: int) -> None:
        """Takes over ``device``.

        :raise ValueError: when the part does not lie within the device, or begins or ends within a block of
            it. The device is not taken over then.
        """
        end, block = start + size_bytes, device.capabilities.min_block_bytes
        if start < 0 or size_bytes < 0 or end > device.size_bytes:
            raise ValueError(f"{size_bytes} bytes at {start} are not within the device's {device.size_bytes}")
        if start % block or (end % block and end != device.size_bytes):
            raise ValueError(f"{size_bytes} bytes at {start} are not whole blocks of {block} bytes")
        super().__init__(device)
        self.size_bytes = size_bytes
        self._start = start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._below.read_into(self._start + offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        self._below.write(self._start + offset, data)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._below.write_zeros(self._start + offset, length, may_trim=may_trim)

    def discard(self, offset: int, length: int) -> None:
        self._below.discard(self._start + offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for extent in self._below.extents(self._start + offset, length):
            yield extent._replace(offset=extent.offset - self._start)

    def changed_size(self) -> int | None:
        """Only of interest where the device below now ends within the window."""
        now = self._below.changed_size()
        if now is None or now >= self._start + self.size_bytes:
            return None
        return max(0, now - self._start)
