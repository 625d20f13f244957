"""The guard: checks every call once, so that devices and filters below may assume valid ones."""

from __future__ import annotations

from collections.abc import Iterator

from casbackup.block.device import BlockDevice, Capabilities, Closing, Extent
from casbackup.fs import Buffer


class Guarded(Closing):
    """A device whose calls are checked for range, alignment, state and writability.

    Calls of length zero end here. Data of any element size is passed down as a view of bytes. What comes back
    is checked too: extents that leave gaps would make a backup skip data, so they stop it.

    :raise ValueError: for a call that ``BlockDevice`` does not allow. Nothing reached the device then.
    """

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._size_bytes = device.size_bytes
        self._capabilities = device.capabilities
        self._closed = False

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = _as_bytes(buffer)
        if view.readonly:
            raise ValueError("the buffer to read into is not writable")
        if self._admits(offset, view.nbytes):
            self._device.read_into(offset, view)

    def write(self, offset: int, data: Buffer) -> None:
        view = _as_bytes(memoryview(data))
        if self._admits(offset, view.nbytes, writing=True):
            self._device.write(offset, view)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        if self._admits(offset, length, writing=True):
            self._device.write_zeros(offset, length, may_trim=may_trim)

    def discard(self, offset: int, length: int) -> None:
        if self._admits(offset, length, writing=True) and self._capabilities.can_trim:
            self._device.discard(offset, length)

    def flush(self) -> None:
        self._check_open()
        if self._capabilities.writable:
            self._device.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        if not self._admits(offset, length):
            return iter(())
        return self._checked(self._device.extents(offset, length), offset, offset + length)

    def changed_size(self) -> int | None:
        self._check_open()
        return self._device.changed_size()

    def close(self) -> None:
        self._closed = True
        self._device.close()

    def _checked(self, extents: Iterator[Extent], position: int, end: int) -> Iterator[Extent]:
        last: bool | None = None
        for extent in extents:
            if extent.offset != position or not 0 < extent.length <= end - position or extent.zero is last:
                raise AssertionError(f"{type(self._device).__name__} gave {extent} after byte {position}")
            yield extent
            self._check_open()
            position, last = extent.end, extent.zero
        if position != end:
            raise AssertionError(f"{type(self._device).__name__} gave no extent from byte {position} on")

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the device is closed")

    def _admits(self, offset: int, length: int, *, writing: bool = False) -> bool:
        """Whether there is anything to do. :raise ValueError: when the call is not allowed."""
        self._check_open()
        if writing and not self._capabilities.writable:
            raise ValueError("the device is not writable")
        end = offset + length
        if offset < 0 or length < 0 or end > self._size_bytes:
            raise ValueError(f"{length} bytes at {offset} are not within the device's {self._size_bytes}")
        block = self._capabilities.min_block_bytes
        if offset % block or (end % block and end != self._size_bytes):
            raise ValueError(f"{length} bytes at {offset} are not aligned to blocks of {block} bytes")
        return length > 0


def _as_bytes(view: memoryview) -> memoryview:
    """:raise ValueError: when the view is not contiguous."""
    if not view.c_contiguous:
        raise ValueError("the buffer is not contiguous")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
