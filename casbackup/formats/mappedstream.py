"""The mapped bytes of a disk as one stream: the body of formats whose tables come first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from casbackup.formats.port import ByteRange, ByteTarget
from casbackup.formats.zeroruns import all_zero, zero_buffers
from casbackup.fs import Buffer


class MappedStream:
    """Takes one disk in ascending order and writes what lies within its map; what is missing there becomes zeros."""

    def __init__(self, target: ByteTarget, ranges: Iterable[ByteRange]) -> None:
        """``ranges`` are in order, not empty and do not touch."""
        self._target = target
        self._ranges = iter(ranges)
        self._given_to = 0
        self._end = self._position = 0
        self._has_more = True
        self._enter_next()

    def write(self, offset: int, data: Buffer) -> None:
        """:raise ValueError: when the data comes out of order, or where the map says that there is none."""
        view = memoryview(data)
        end = offset + len(view)
        self._take(offset, end)
        self._fill_to(offset)
        cursor = offset
        while cursor < end:
            start = min(self._position, end) if self._has_more else end
            self._check_unmapped(view[cursor - offset : start - offset], cursor)
            cursor = min(self._end, end) if start < end else end
            if start < cursor:
                self._target.write([view[start - offset : cursor - offset]])
                self._advance(cursor)

    def zeros(self, offset: int, length: int) -> None:
        """:raise ValueError: when they come out of order."""
        self._take(offset, offset + length)
        self._fill_to(offset + length)

    def finish(self) -> None:
        """Zeros for the rest of the map."""
        while self._has_more:
            self._fill(self._end)

    def _take(self, offset: int, end: int) -> None:
        if offset < self._given_to:
            raise ValueError(f"bytes from {offset} come after byte {self._given_to}")
        self._given_to = end

    def _fill_to(self, offset: int) -> None:
        while self._has_more and self._position < offset:
            self._fill(min(self._end, offset))

    def _fill(self, end: int) -> None:
        for buffers in zero_buffers(end - self._position):
            self._target.write(buffers)
        self._advance(end)

    def _advance(self, position: int) -> None:
        self._position = position
        if position == self._end:
            self._enter_next()

    def _enter_next(self) -> None:
        following = next(self._ranges, None)
        if following is None:
            self._has_more = False
        else:
            self._position, self._end = following.offset, following.end

    def _check_unmapped(self, data: memoryview, offset: int) -> None:
        if not all_zero(data):
            raise ValueError(f"there is data within [{offset}, {offset + len(data)}), which is not in the map")


def rounded(ranges: Iterable[ByteRange], unit_bytes: int) -> Iterator[ByteRange]:
    """The ranges widened to whole units, merged where they come to touch. The last may end beyond the disk."""
    start = end = 0
    for piece in ranges:
        if piece.length <= 0:
            continue
        first = piece.offset - piece.offset % unit_bytes
        last = -(-piece.end // unit_bytes) * unit_bytes
        if first > end:
            if end > start:
                yield ByteRange(start, end - start)
            start = first
        end = max(end, last)
    if end > start:
        yield ByteRange(start, end - start)
