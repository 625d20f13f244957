"""Where two disks differ, found by visiting only what differs: equal ids are equal content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import FANOUT, SEGMENT_BYTES
from casbackup.spec.node import Extent, Inner, Leaf, zero_extent
from casbackup.tree.builder import level_of
from casbackup.tree.reader import FetchNodes, checked_node, span_of


class Range(NamedTuple):
    offset: int
    length: int


class Disk(NamedTuple):
    root: BlobId
    size_bytes: int


def diff(a: Disk, b: Disk, fetch: FetchNodes) -> Iterator[Range]:
    """Ranges where ``a`` and ``b`` may differ, in order, merged. Outside them they are equal, byte for byte.

    Ranges are as fine as chunks: a change of one byte shows as its whole chunk. Bytes that only the longer disk
    has differ.
    """
    level = max(level_of(a.size_bytes), level_of(b.size_bytes))
    roots = _lifted(a, level), _lifted(b, level)
    common = min(a.size_bytes, b.size_bytes)
    found = _differing(*roots, level, 0, common, fetch)
    tail = Range(common, max(a.size_bytes, b.size_bytes) - common)
    yield from merged([*found, tail] if tail.length else found)


class _Lifted(NamedTuple):
    """A root seen from a higher level: itself as the first child, all else zero."""

    root: BlobId
    level: int


def _lifted(disk: Disk, level: int) -> BlobId | _Lifted:
    own = level_of(disk.size_bytes)
    return disk.root if own == level or disk.root == ZERO_ID else _Lifted(disk.root, own)


def _children(node: BlobId | _Lifted, level: int, fetch: FetchNodes) -> Sequence[BlobId | _Lifted]:
    if isinstance(node, _Lifted):
        return [node.root if node.level == level - 1 else node]
    if node == ZERO_ID:
        return []
    decoded = checked_node(fetch([node])[node], level)
    return decoded.children if isinstance(decoded, Inner) else []


def _differing(
    a: BlobId | _Lifted, b: BlobId | _Lifted, level: int, offset: int, end: int, fetch: FetchNodes
) -> Iterator[Range]:
    if a == b or offset >= end:
        return
    if level == 0:
        yield from _differing_extents(_leaf(a, fetch), _leaf(b, fetch), offset, end)
        return
    children_a, children_b = _children(a, level, fetch), _children(b, level, fetch)
    for number in range(min(FANOUT, max(len(children_a), len(children_b)))):
        child_a = children_a[number] if number < len(children_a) else ZERO_ID
        child_b = children_b[number] if number < len(children_b) else ZERO_ID
        yield from _differing(child_a, child_b, level - 1, offset + number * span_of(level - 1), end, fetch)


def _leaf(node: BlobId | _Lifted, fetch: FetchNodes) -> list[Extent]:
    if node == ZERO_ID or isinstance(node, _Lifted):
        return [zero_extent(SEGMENT_BYTES)]
    decoded = checked_node(fetch([node])[node], 0)
    return decoded.extents if isinstance(decoded, Leaf) else []


def _differing_extents(a: list[Extent], b: list[Extent], offset: int, end: int) -> Iterator[Range]:
    """Walk both lists in step; a piece is equal when both sides name the same bytes of the same chunk, or zeros."""
    ends = sorted({*_boundaries(a), *_boundaries(b)})
    position = at_a = at_b = used_a = used_b = 0
    for boundary in ends:
        length = boundary - position
        if at_a < len(a) and at_b < len(b):
            x, y = a[at_a], b[at_b]
            same = x.id == y.id and (x.is_zero or x.skip + used_a == y.skip + used_b)
            used_a, used_b = used_a + length, used_b + length
            if used_a == x.length:
                at_a, used_a = at_a + 1, 0
            if used_b == y.length:
                at_b, used_b = at_b + 1, 0
        else:
            same = False
        if not same and offset + position < end:
            yield Range(offset + position, min(length, end - offset - position))
        position = boundary


def _boundaries(extents: list[Extent]) -> Iterator[int]:
    position = 0
    for extent in extents:
        position += extent.length
        yield position


def merged(ranges: Iterable[Range]) -> Iterator[Range]:
    """Join ranges that touch. Input in order, not overlapping."""
    current: Range | None = None
    for item in ranges:
        if current is not None and current.offset + current.length == item.offset:
            current = Range(current.offset, current.length + item.length)
            continue
        if current is not None:
            yield current
        current = item
    if current is not None:
        yield current
