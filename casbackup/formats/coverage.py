"""Which bytes of a disk have come, in any order: what came twice is found at once, what is missing at the end.

Of a disk that comes in order a handful of numbers is kept. In the worst order, scattered blocks all over, it is one
bit for each 4 KiB and some 120 bytes for each 4 MiB that is incomplete: 65 MB for 1 TiB. Only ranges that do not lie
on blocks of 4 KiB need more, until their blocks are complete.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice

from casbackup.errors import ArchiveDamaged, ArchiveIncomplete
from casbackup.formats.port import ArchiveHead, ByteRange, Data, Event
from casbackup.limits import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES

_FULL = (1 << SEGMENT_BLOCKS) - 1
_SHOWN = 8
"""Missing ranges that the message of an error names."""


class RangeSet:
    """Disjoint ranges of integers, kept sorted and merged. Cheap for few ranges."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """All ranges [start, end), ascending."""
        return iter(zip(self._starts, self._ends, strict=True))

    def add(self, start: int, end: int) -> None:
        """Add [start, end), which may touch and overlap what is there."""
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def overlap(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, end) that are in the set, ascending."""
        place = bisect_right(self._ends, start)
        while place < len(self._starts) and self._starts[place] < end:
            yield max(start, self._starts[place]), min(end, self._ends[place])
            place += 1


class Coverage:
    """The ranges of one disk that have come.

    Whole segments are kept as ranges of segment numbers, incomplete ones as a bit for each block, and incomplete
    blocks as ranges of bytes. The last segment and block of a disk are taken as whole when they reach its end.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self._padded = -(-size_bytes // SEGMENT_BYTES) * SEGMENT_BYTES
        self._segments = RangeSet()
        self._blocks: dict[int, int] = {}
        self._bytes: dict[int, RangeSet] = {}

    def add(self, offset: int, length: int) -> list[ByteRange]:
        """These bytes have come. Returns the ranges of them that had come before, in no particular order.

        The range must lie within the disk.
        """
        end = offset + length
        if end == self._size:
            end = self._padded
        before = list[ByteRange]()
        while offset < end:
            segment, start = divmod(offset, SEGMENT_BYTES)
            if start == 0 and end - offset >= SEGMENT_BYTES:
                stop = end // SEGMENT_BYTES * SEGMENT_BYTES
                self._add_segments(segment, stop // SEGMENT_BYTES, before)
            else:
                stop = min(end, (segment + 1) * SEGMENT_BYTES)
                self._add_in_segment(segment, start, stop - segment * SEGMENT_BYTES, before)
            offset = stop
        return [ByteRange(r.offset, min(r.end, self._size) - r.offset) for r in before]

    def missing(self) -> Iterator[ByteRange]:
        """The ranges that have not come, ascending and merged."""
        start = end = 0
        for first, last in self._gaps():
            if first > end:
                if end > start:
                    yield ByteRange(start, end - start)
                start = first
            end = min(last, self._size)
        if end > start:
            yield ByteRange(start, end - start)

    @property
    def is_complete(self) -> bool:
        return next(self.missing(), None) is None

    def _add_segments(self, first: int, last: int, before: list[ByteRange]) -> None:
        before += _scaled(self._segments.overlap(first, last), SEGMENT_BYTES)
        known = range(first, last) if last - first < len(self._blocks) else list(self._blocks)
        for segment in known:
            if first <= segment < last and segment in self._blocks:
                before += self._covered_blocks(segment)
                self._forget(segment)
        self._segments.add(first, last)

    def _add_in_segment(self, segment: int, start: int, end: int, before: list[ByteRange]) -> None:
        """Add [start, end) of a segment: whole blocks, and parts of the ones around them."""
        first, last = -(-start // BLOCK_BYTES), end // BLOCK_BYTES
        if first > last:
            self._add_in_block(segment, last, start % BLOCK_BYTES, end % BLOCK_BYTES, before)
            return
        if start % BLOCK_BYTES:
            self._add_in_block(segment, first - 1, start % BLOCK_BYTES, BLOCK_BYTES, before)
        if first < last:
            self._add_blocks(segment, first, last, before)
        if end % BLOCK_BYTES:
            self._add_in_block(segment, last, 0, end % BLOCK_BYTES, before)

    def _add_blocks(self, segment: int, first: int, last: int, before: list[ByteRange]) -> None:
        bits = ((1 << (last - first)) - 1) << first
        known = self._known(segment)
        if known & bits:
            before += _scaled(_runs(known & bits), BLOCK_BYTES, segment * SEGMENT_BYTES)
        if self._bytes:
            for block in range(segment * SEGMENT_BLOCKS + first, segment * SEGMENT_BLOCKS + last):
                before += _scaled(self._bytes.pop(block, ()), 1, block * BLOCK_BYTES)
        self._set_blocks(segment, known | bits)

    def _add_in_block(self, segment: int, block: int, start: int, end: int, before: list[ByteRange]) -> None:
        known = self._known(segment)
        number = segment * SEGMENT_BLOCKS + block
        if known >> block & 1:
            before.append(ByteRange(number * BLOCK_BYTES + start, end - start))
            return
        parts = self._bytes.setdefault(number, RangeSet())
        before += _scaled(parts.overlap(start, end), 1, number * BLOCK_BYTES)
        parts.add(start, end)
        if list(parts) == [(0, BLOCK_BYTES)]:
            del self._bytes[number]
            known |= 1 << block
        self._set_blocks(segment, known)

    def _known(self, segment: int) -> int:
        """A bit for each block of the segment that has come whole."""
        bits = self._blocks.get(segment)
        if bits is None:
            bits = _FULL if any(self._segments.overlap(segment, segment + 1)) else 0
        return bits

    def _set_blocks(self, segment: int, bits: int) -> None:
        if bits == _FULL:
            self._blocks.pop(segment, None)
            self._segments.add(segment, segment + 1)
        else:
            self._blocks[segment] = bits

    def _covered_blocks(self, segment: int) -> Iterator[ByteRange]:
        yield from _scaled(_runs(self._blocks[segment]), BLOCK_BYTES, segment * SEGMENT_BYTES)
        for number in self._partial_blocks(segment):
            yield from _scaled(self._bytes[number], 1, number * BLOCK_BYTES)

    def _partial_blocks(self, segment: int) -> list[int]:
        if not self._bytes:
            return []
        first = segment * SEGMENT_BLOCKS
        return [number for number in range(first, first + SEGMENT_BLOCKS) if number in self._bytes]

    def _forget(self, segment: int) -> None:
        for number in self._partial_blocks(segment):
            del self._bytes[number]
        del self._blocks[segment]

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """What has not come, ascending, in pieces that may touch."""
        position = 0
        for start, end in self._covered():
            if start > position:
                yield position, start
            position = end
        if position < self._size:
            yield position, self._size

    def _covered(self) -> Iterator[tuple[int, int]]:
        """What has come, ascending, in pieces that may touch."""
        incomplete = sorted(self._blocks)
        place = 0
        for first, last in self._segments:
            while place < len(incomplete) and incomplete[place] < first:
                yield from self._covered_in(incomplete[place])
                place += 1
            yield first * SEGMENT_BYTES, last * SEGMENT_BYTES
        for segment in incomplete[place:]:
            yield from self._covered_in(segment)

    def _covered_in(self, segment: int) -> Iterator[tuple[int, int]]:
        for piece in sorted(self._covered_blocks(segment)):
            yield piece.offset, piece.end


def _scaled(ranges: Iterable[tuple[int, int]], unit: int, base: int = 0) -> Iterator[ByteRange]:
    for start, end in ranges:
        yield ByteRange(base + start * unit, (end - start) * unit)


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    """Runs of ones as [first, last), ascending."""
    first = 0
    while bits:
        zeros = (bits & -bits).bit_length() - 1
        bits >>= zeros
        ones = (~bits & (bits + 1)).bit_length() - 1
        bits >>= ones
        yield first + zeros, first + zeros + ones
        first += zeros + ones


class ArchiveCoverage:
    """The coverage of all disks of an archive."""

    def __init__(self, head: ArchiveHead) -> None:
        self._head = head
        self.disks = [Coverage(disk.size_bytes) for disk in head.disks]

    def add(self, event: Event) -> None:
        """:raise ArchiveDamaged: when the event lies outside its disk, or repeats what has come."""
        disk, offset = event.disk, event.offset
        length = len(event.data) if isinstance(event, Data) else event.length
        if not 0 <= disk < len(self.disks):
            raise ArchiveDamaged(f"there is data of a disk number {disk}, which the archive does not list")
        size = self._head.disks[disk].size_bytes
        if offset < 0 or length < 0 or offset + length > size:
            raise ArchiveDamaged(f"data of disk {self._name(disk)} lies outside of it: {length} bytes from {offset}")
        before = self.disks[disk].add(offset, length)
        if before:
            raise ArchiveDamaged(
                f"disk {self._name(disk)} has data that comes twice: {before[0].length} bytes from {before[0].offset}"
            )

    def passing(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events as they are, each counted before it is passed on. Errors as of ``add``."""
        for event in events:
            self.add(event)
            yield event

    def missing(self) -> Iterator[tuple[int, ByteRange]]:
        """(place in ``head.disks``, range) of all that has not come."""
        for number, coverage in enumerate(self.disks):
            for gap in coverage.missing():
                yield number, gap

    def require_complete(self) -> None:
        """:raise ArchiveIncomplete: when anything is missing; the message names the first ranges."""
        gaps = list(islice(self.missing(), _SHOWN + 1))
        if gaps:
            shown = [f"{self._name(disk)} {gap.length} bytes from {gap.offset}" for disk, gap in gaps[:_SHOWN]]
            more = " and more" if len(gaps) > _SHOWN else ""
            raise ArchiveIncomplete(f"the archive lacks data: {'; '.join(shown)}{more}")

    def _name(self, disk: int) -> str:
        return repr(self._head.disks[disk].name)
