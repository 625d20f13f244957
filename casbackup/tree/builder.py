"""Building a disk tree from its leaves, in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import FANOUT, SEGMENT_BYTES
from casbackup.spec.node import Extent, encode_inner, encode_leaf
from casbackup.tree.extents import all_zero, normalised

StoreNodes = Callable[[Sequence[bytes]], Sequence[BlobId]]
"""Stores the bytes of nodes (whose children are stored already) and gives their ids, in order."""


def level_of(size_bytes: int) -> int:
    """The level of the root of a disk's tree: 0 when the root is a leaf."""
    segments = -(-size_bytes // SEGMENT_BYTES)
    level = 0
    while segments > 1:
        segments = -(-segments // FANOUT)
        level += 1
    return level


def leaf_bytes(extents: Sequence[Extent]) -> bytes | None:
    """The bytes of the leaf with these extents, None when all of it is zero (then its id is the zero id)."""
    normal = normalised(extents)
    return None if all_zero(normal) else encode_leaf(normal)


class TreeBuilder:
    """Collects leaf ids by segment number and builds the inner nodes at the end. Zero leaves need not be told."""

    def __init__(self) -> None:
        self._leaves: dict[int, BlobId] = {}

    def set_leaf(self, segment: int, leaf: BlobId) -> None:
        """Safe from several threads for different segments."""
        if leaf != ZERO_ID:
            self._leaves[segment] = leaf

    def finish(self, size_bytes: int, store: StoreNodes) -> BlobId:
        """Build the inner nodes level by level, children first, and return the root's id."""
        nodes = self._leaves
        for level in range(1, level_of(size_bytes) + 1):
            groups: dict[int, list[BlobId]] = {}
            for number in sorted(nodes):
                children = groups.setdefault(number // FANOUT, [])
                children += [ZERO_ID] * (number % FANOUT - len(children))
                children.append(nodes[number])
            ids = store([encode_inner(level, children) for children in groups.values()])
            nodes = dict(zip(groups, ids, strict=True))
        return nodes.get(0, ZERO_ID)
