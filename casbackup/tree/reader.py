"""Reading a disk tree: which extents cover a byte range. Subtrees that are zero are never fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from casbackup.errors import DataDamage, NodeInvalid
from casbackup.fs import Buffer
from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import FANOUT, SEGMENT_BYTES
from casbackup.spec.node import Extent, Inner, Leaf, decode_node, zero_extent
from casbackup.tree.builder import level_of
from casbackup.tree.extents import sliced

FetchNodes = Callable[[Sequence[BlobId]], Mapping[BlobId, Buffer | DataDamage]]
"""Gives the bytes of all nodes asked for, or the error in their place. Ids are distinct and never the zero id."""


class Segment(NamedTuple):
    """``length`` bytes of a disk from ``offset``: one leaf, or a run of zeros (``extents`` None), or lost (``damage``
    says why).
    """

    offset: int
    length: int
    extents: list[Extent] | None
    damage: DataDamage | None = None


class DiskTree:
    """A disk of ``size_bytes`` below ``root``. Keeps no nodes: a walk fetches each inner node on its way once.

    With ``tolerant``, a part below a lost node comes as a damaged segment; otherwise its error is raised.
    """

    def __init__(self, root: BlobId, size_bytes: int, fetch: FetchNodes, *, tolerant: bool = False) -> None:
        self._root = root
        self._size = size_bytes
        self._level = level_of(size_bytes)
        self._fetch = fetch
        self._tolerant = tolerant

    def segments(self, start: int = 0, end: int | None = None) -> Iterator[Segment]:
        """All leaves that touch [start, end), in order; a subtree that is zero comes as one long zero segment.

        :raise NodeInvalid: when a node is not what its place in the tree demands.
        """
        stop = self._size if end is None else min(end, self._size)
        if start < stop:
            yield from self._walk(self._root, self._level, 0, start, stop)

    def extents(self, start: int, end: int) -> Iterator[tuple[int, Extent]]:
        """The extents that make up [start, end), cut to it, each with its offset on the disk."""
        for segment in self.segments(start, end):
            first, last = max(start, segment.offset), min(end, segment.offset + segment.length)
            if segment.extents is None:
                yield first, zero_extent(last - first)
                continue
            position = first
            for extent in sliced(segment.extents, first - segment.offset, last - segment.offset):
                yield position, extent
                position += extent.length

    def _walk(self, node: BlobId, level: int, offset: int, start: int, stop: int) -> Iterator[Segment]:
        if node == ZERO_ID:
            yield Segment(offset, min(span_of(level), self._size - offset), None)
            return
        yield from self._fetched(self._fetch([node])[node], level, offset, start, stop)

    def _fetched(self, data: Buffer | DataDamage, level: int, offset: int, start: int, stop: int) -> Iterator[Segment]:
        try:
            if isinstance(data, DataDamage):
                raise data
            decoded = checked_node(data, level)
            leaf = self._leaf(decoded, offset) if isinstance(decoded, Leaf) else None
        except DataDamage as damage:
            if not self._tolerant:
                raise
            yield Segment(offset, min(span_of(level), self._size - offset), None, damage)
            return
        if leaf is not None:
            yield leaf
        elif isinstance(decoded, Inner):
            yield from self._walk_children(decoded, level, offset, start, stop)

    def _walk_children(self, node: Inner, level: int, offset: int, start: int, stop: int) -> Iterator[Segment]:
        span = span_of(level - 1)
        first = max(0, (start - offset) // span)
        last = min(FANOUT, -(-(stop - offset) // span))
        children = list(node.children[first:last]) + [ZERO_ID] * (last - max(first, len(node.children)))
        wanted = list(dict.fromkeys(child for child in children if child != ZERO_ID))
        fetched = self._fetch(wanted) if level == 1 and wanted else {}
        for number, child in enumerate(children, first):
            at = offset + number * span
            if child in fetched:
                yield from self._fetched(fetched[child], 0, at, start, stop)
            else:
                yield from self._walk(child, level - 1, at, start, stop)

    def _leaf(self, leaf: Leaf, offset: int) -> Segment:
        length = min(SEGMENT_BYTES, self._size - offset)
        if leaf.span != length:
            raise NodeInvalid(f"the leaf at byte {offset} does not cover {length} bytes")
        return Segment(offset, length, leaf.extents)


def span_of(level: int) -> int:
    """Bytes of disk below a node of ``level``: a segment times 256 a level."""
    return SEGMENT_BYTES << (8 * level)


def checked_node(data: Buffer | DataDamage, level: int) -> Leaf | Inner:
    """Decode a node that must be of ``level`` (0: a leaf).

    :raise NodeInvalid: when it is not. :raise DataDamage: the error, if that stands in the bytes' place.
    """
    if isinstance(data, DataDamage):
        raise data
    node = decode_node(data)
    found = node.level if isinstance(node, Inner) else 0
    if found != level:
        raise NodeInvalid(f"a tree node of level {found} stands where level {level} belongs")
    return node
