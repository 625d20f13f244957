"""Storing the stream of a VM's memory so that it shares chunks with the memory of other snapshots.

The pages of a segment are cut into chunks as if they followed each other, and so is what stands between them. The
leaf then names slices of both in the order of the stream: whoever reads it gets the stream as it came.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from casbackup.buffers import ByteBuffer
from casbackup.ids import BlobId
from casbackup.jobs.increment_sink import IncrementSink
from casbackup.jobs.segment_store import SegmentStore
from casbackup.jobs.segments import Filled
from casbackup.jobs.tree_sink import Leaves
from casbackup.limits import BLOCK_BYTES
from casbackup.qemu.ram_stream import page_offsets
from casbackup.spec.node import Extent
from casbackup.tree.reader import DiskTree


class StateSink(IncrementSink):
    """The last of its disks is the stream of memory."""

    def __init__(self, store: SegmentStore, leaves: Sequence[Leaves], bases: Sequence[DiskTree | None]) -> None:
        super().__init__(store, leaves, bases)
        self._state = len(leaves) - 1

    def segment(self, disk: int, number: int, buffer: ByteBuffer, view: memoryview, length: int) -> None:
        pages = page_offsets(buffer, length) if disk == self._state else []
        if not pages:
            super().segment(disk, number, buffer, view, length)
            return
        in_pages = self._stored(number, [view[page : page + BLOCK_BYTES] for page in pages])
        others = [view[start:end] for start, end in _between(pages, length)]
        self._leaves[disk].set_leaf(
            number, self._store.leaf(list(_woven(in_pages, self._stored(number, others), others)))
        )

    def _stored(self, number: int, pieces: Sequence[memoryview]) -> _Cutter:
        joined = bytearray().join(pieces)
        length = len(joined)
        joined += bytes(-length % BLOCK_BYTES)
        return _Cutter(self._store.part(joined, memoryview(joined), Filled(number, length, 0)))


class _Cutter:
    """Gives away extents from the front."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._extents = iter(extents)
        self._left = Extent(0, 0, BlobId(b""))

    def take(self, length: int) -> Iterator[Extent]:
        """What the next ``length`` bytes are."""
        while length:
            if not self._left.length:
                self._left = next(self._extents)
            size, skip, chunk = self._left
            taken = min(length, size)
            zero = self._left.is_zero
            yield Extent(taken, skip, chunk)
            self._left = Extent(size - taken, skip if zero else skip + taken, chunk)
            length -= taken


def _between(pages: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """The ranges [start, end) before, between and after pages; one more than there are pages, some of them empty."""
    position = 0
    for page in pages:
        yield position, page
        position = page + BLOCK_BYTES
    yield position, length


def _woven(pages: _Cutter, others: _Cutter, between: Sequence[memoryview]) -> Iterator[Extent]:
    """As they stand in the stream: in turns, beginning with what is no page."""
    yield from others.take(len(between[0]))
    for piece in between[1:]:
        yield from pages.take(BLOCK_BYTES)
        yield from others.take(len(piece))
