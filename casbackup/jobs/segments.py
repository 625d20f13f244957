"""Where a backup gets its segments from: a block device, in parallel and without its holes, or a stream of unknown
length.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

from casbackup.block.device import BlockDevice
from casbackup.errors import SourceChanged, SourceUnreadable
from casbackup.limits import BLOCK_BYTES, MAX_DISK_BYTES, SEGMENT_BYTES

_ZEROS = bytes(SEGMENT_BYTES)


class Filled(NamedTuple):
    """A segment whose bytes are now in the caller's buffer. ``read_bytes`` is what had to be read for it."""

    number: int
    length: int
    read_bytes: int


class SegmentSource(Protocol):
    """Gives each segment that is not known to be zero once; any number of threads may take them."""

    def fill(self, buffer: memoryview) -> Filled | None:
        """Fill a buffer of SEGMENT_BYTES with the next segment, zeros up to the end of its last block; None at the
        end.
        """

    def size_bytes(self) -> int:
        """The disk's size, once ``fill`` has given None.

        :raise SourceChanged: when it is not what it was at the beginning.
        """

    @property
    def expected_bytes(self) -> int | None:
        """The size if it is known beforehand."""


class DeviceSegments:
    """The segments of a block device that hold data. Planning is serial, reading is parallel."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._plan = _data_by_segment(device)
        self._lock = threading.Lock()

    @property
    def expected_bytes(self) -> int | None:
        return self._device.size_bytes

    def fill(self, buffer: memoryview) -> Filled | None:
        with self._lock:
            planned = next(self._plan, None)
        if planned is None:
            return None
        number, ranges = planned
        start = number * SEGMENT_BYTES
        length = min(SEGMENT_BYTES, self._device.size_bytes - start)
        position = read = 0
        for first, last in ranges:
            _clear(buffer, position, first - start)
            self._device.read_into(first, buffer[first - start : last - start])
            read += last - first
            position = last - start
        _clear(buffer, position, -(-length // BLOCK_BYTES) * BLOCK_BYTES)
        return Filled(number, length, read)

    def size_bytes(self) -> int:
        size = self._device.changed_size()
        if size is not None:
            raise SourceChanged(f"the disk had {self._device.size_bytes} bytes at the beginning and {size} at the end")
        return self._device.size_bytes


class StreamSegments:
    """The segments of a pipe, read one after another; what comes out of hashing and storing still runs in parallel."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._size = 0
        self._ended = False

    @property
    def expected_bytes(self) -> int | None:
        return None

    def fill(self, buffer: memoryview) -> Filled | None:
        with self._lock:
            if self._ended:
                return None
            length = self._read(buffer)
            if length == 0:
                return None
            number = self._size // SEGMENT_BYTES
            self._size += length
            if self._size > MAX_DISK_BYTES:
                raise SourceUnreadable(f"the input has more than {MAX_DISK_BYTES} bytes")
        _clear(buffer, length, -(-length // BLOCK_BYTES) * BLOCK_BYTES)
        return Filled(number, length, length)

    def size_bytes(self) -> int:
        return self._size

    def _read(self, buffer: memoryview) -> int:
        length = 0
        try:
            while length < SEGMENT_BYTES:
                got = self._stream.readinto(buffer[length:])  # type: ignore[attr-defined]
                if not got:
                    self._ended = True
                    break
                length += got
        except OSError as error:
            raise SourceUnreadable(f"cannot read the input: {error.strerror}") from error
        return length


def _clear(buffer: memoryview, start: int, end: int) -> None:
    if start < end:
        buffer[start:end] = _ZEROS[: end - start]


def _data_by_segment(device: BlockDevice) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Segment numbers in order, each with its ranges [first, last) of data in bytes of the device."""
    number, ranges = -1, list[tuple[int, int]]()
    extents = device.extents(0, device.size_bytes) if device.size_bytes else iter(())
    for extent in extents:
        if extent.zero:
            continue
        position, end = extent.offset, extent.offset + extent.length
        while position < end:
            current = position // SEGMENT_BYTES
            stop = min(end, (current + 1) * SEGMENT_BYTES)
            if current != number:
                if ranges:
                    yield number, ranges
                number, ranges = current, []
            ranges.append((position, stop))
            position = stop
    if ranges:
        yield number, ranges
