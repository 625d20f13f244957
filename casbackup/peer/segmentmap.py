"""Which extents make up a disk, with the leaves that were needed kept decoded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from casbackup.block import device
from casbackup.errors import DataDamage
from casbackup.ids import BlobId
from casbackup.limits import SEGMENT_BYTES
from casbackup.spec.manifest import DiskRecord
from casbackup.spec.node import Extent, zero_extent
from casbackup.tree.reader import DiskTree, FetchNodes, Segment

_LEAVES = 1024
"""Kept, the oldest dropped first: 4 GiB of a disk, some 10 MiB of memory where chunks have 64 KiB."""
_AT_ONCE = 8
"""Leaves that are fetched together. They mostly lie side by side."""
_MOST_STEPS = 256
"""How far zeros are followed by a reader that is looked after."""


class Span(NamedTuple):
    """A leaf, or a run of zeros (``extents`` None), or a part that is lost (``damage`` says why)."""

    offset: int
    length: int
    extents: list[Extent] | None
    starts: list[int]
    """Where each extent begins on the disk."""
    runs: list[device.Extent]
    """The same with extents of a kind made one: what asks for holes, asks often."""
    damage: DataDamage | None

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def is_zero(self) -> bool:
        return self.extents is None and self.damage is None

    def chunks(self) -> list[BlobId]:
        """The ids of its chunks, each once, in order."""
        return list(dict.fromkeys(e.id for e in self.extents or () if not e.is_zero))


class SegmentMap:
    """Safe from any number of threads. Two that need the same leaf may both decode it."""

    def __init__(self, disk: DiskRecord, fetch: FetchNodes) -> None:
        self.size_bytes = disk.size_bytes
        self._tree = DiskTree(disk.root, disk.size_bytes, fetch, tolerant=True)
        self._kept: dict[int, Span] = {}

    def at(self, number: int) -> Span:
        """What the segment of that number lies in: a leaf, or zeros that may reach further to both sides.

        Errors are those of fetching; damage is not raised.
        """
        return self._kept.get(number) or self._load(number)

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """All that have bytes of [start, end), in order."""
        position = start
        while position < end:
            span = self.at(position // SEGMENT_BYTES)
            yield span
            position = span.end

    def extents(self, start: int, end: int) -> Iterator[tuple[int, Extent]]:
        """The extents that make up [start, end), cut to it, each with its offset on the disk.

        :raise DataDamage: when what says so is lost.
        """
        for span in self.spans(start, end):
            if span.damage is not None:
                raise span.damage
            yield from cut(span, max(start, span.offset), min(end, span.end))

    def next_data(self, number: int) -> int | None:
        """The first segment from ``number`` on that is not known to be zero; None after the last. Fetches nothing."""
        for _ in range(_MOST_STEPS):
            if number * SEGMENT_BYTES >= self.size_bytes:
                return None
            span = self._kept.get(number)
            if span is None or not span.is_zero:
                break
            number = -(-span.end // SEGMENT_BYTES)
        return number

    def _load(self, number: int) -> Span:
        first = number * SEGMENT_BYTES
        found: Span | None = None
        for segment in self._tree.segments(first, first + _AT_ONCE * SEGMENT_BYTES):
            span = _span(segment)
            found = found or span
            if span.damage is None:  # it may be repaired while we look
                for covered in range(
                    max(first, span.offset), min(span.end, first + _AT_ONCE * SEGMENT_BYTES), SEGMENT_BYTES
                ):
                    self._kept[covered // SEGMENT_BYTES] = span
        assert found is not None, "beyond the end"
        while len(self._kept) > _LEAVES:
            self._kept.pop(next(iter(self._kept)), None)
        return found


def cut(span: Span, start: int, end: int) -> Iterator[tuple[int, Extent]]:
    """The part [start, end) of a span that is not lost, each extent with its offset on the disk."""
    if span.extents is None:
        yield start, zero_extent(end - start)
        return
    number = bisect_right(span.starts, start) - 1
    while start < end:
        extent, begin = span.extents[number], span.starts[number]
        stop = min(end, begin + extent.length)
        skip = 0 if extent.is_zero else extent.skip + start - begin
        yield start, Extent(stop - start, skip, extent.id)
        start, number = stop, number + 1


def _span(segment: Segment) -> Span:
    offset, extents = segment.offset, segment.extents
    if extents is None:
        runs = [device.Extent(offset, segment.length, segment.damage is None)]
        return Span(offset, segment.length, None, [], runs, segment.damage)
    starts = list(accumulate((extent.length for extent in extents[:-1]), initial=offset))
    runs = list(device.merged(device.Extent(at, e.length, e.is_zero) for at, e in zip(starts, extents, strict=True)))
    return Span(offset, segment.length, extents, starts, runs, segment.damage)
