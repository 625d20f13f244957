"""From the segments of an assembler to disk trees, some of which are those of an earlier snapshot with changes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from casbackup.ids import ZERO_ID
from casbackup.jobs.assembler import Part
from casbackup.jobs.segment_store import SegmentStore
from casbackup.jobs.tree_sink import Leaves, TreeSink, extents_of
from casbackup.limits import SEGMENT_BYTES
from casbackup.spec.node import Extent, zero_extent
from casbackup.tree.extents import overlaid
from casbackup.tree.reader import DiskTree


class IncrementSink(TreeSink):
    """What never comes of a disk that has a base is as it is there: its leaf is overlaid, and nothing of it read."""

    def __init__(self, store: SegmentStore, leaves: Sequence[Leaves], bases: Sequence[DiskTree | None]) -> None:
        """``bases``: for each disk the tree to overlay; None where all of the disk comes."""
        super().__init__(store, leaves)
        self._bases = bases
        self._zeros: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def note_zeros(self, disk: int, offset: int, length: int) -> None:
        """To be told of zeros before the assembler is, which does not remember where in a segment they are."""
        if self._bases[disk] is None:
            return
        end = offset + length
        for number in {offset // SEGMENT_BYTES, (end - 1) // SEGMENT_BYTES}:
            base = number * SEGMENT_BYTES
            first, last = max(offset, base), min(end, base + SEGMENT_BYTES)
            if last - first < SEGMENT_BYTES:
                with self._lock:
                    self._zeros.setdefault((disk, number), []).append((first - base, last - first))

    def join(self, disk: int, number: int, length: int, parts: Sequence[Part]) -> None:
        base = self._bases[disk]
        if base is None:
            super().join(disk, number, length, parts)
            return
        with self._lock:
            zeros = self._zeros.pop((disk, number), [])
        changes: list[tuple[int, Sequence[Extent]]] = [(part.start, extents_of(part)) for part in parts]
        changes += [(start, [zero_extent(size)]) for start, size in zeros]
        changes.sort(key=lambda change: change[0])
        extents = overlaid(_segment(base, number, length), changes)
        zero_bytes = sum(size for _start, size in zeros)
        self._store.known_zeros(zero_bytes)
        self._store.known_reused(length - zero_bytes - sum(part.length for part in parts))
        self._leaves[disk].set_leaf(number, self._store.leaf(extents))

    def zeros(self, disk: int, offset: int, length: int) -> None:
        super().zeros(disk, offset, length)
        if self._bases[disk] is not None:
            for number in range(offset // SEGMENT_BYTES, -(-(offset + length) // SEGMENT_BYTES)):
                self._leaves[disk].set_leaf(number, ZERO_ID)


def _segment(base: DiskTree, number: int, length: int) -> list[Extent]:
    start = number * SEGMENT_BYTES
    return [extent for _offset, extent in base.extents(start, start + length)]
