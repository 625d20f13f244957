"""What all filters have in common: calls pass through to the device below."""

from __future__ import annotations

from collections.abc import Iterator

from casbackup.block.device import BlockDevice, Closing, Extent
from casbackup.fs import Buffer


class Filter(Closing):
    """Changes nothing. A filter of its own replaces the methods that it is about."""

    def __init__(self, device: BlockDevice) -> None:
        """Takes over ``device``."""
        self._below = device
        self.size_bytes = device.size_bytes
        self.capabilities = device.capabilities

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._below.read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        self._below.write(offset, data)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._below.write_zeros(offset, length, may_trim=may_trim)

    def discard(self, offset: int, length: int) -> None:
        self._below.discard(offset, length)

    def flush(self) -> None:
        self._below.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self._below.extents(offset, length)

    def changed_size(self) -> int | None:
        return self._below.changed_size()

    def close(self) -> None:
        self._below.close()
