"""The leaves of disk trees by their ids. Only inner nodes are fetched, all children of one at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from casbackup.errors import DataDamage
from casbackup.fs import Buffer
from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import FANOUT
from casbackup.spec.node import Inner
from casbackup.tree.builder import level_of
from casbackup.tree.reader import FetchNodes, checked_node

_Nodes = Mapping[BlobId, Buffer | DataDamage]


def leaves(root: BlobId, size_bytes: int, fetch: FetchNodes) -> Iterator[tuple[int, BlobId]]:
    """The number of each segment that is not zero, and its leaf's id, in order.

    :raise DataDamage: when an inner node is lost. :raise NodeInvalid: when it is not what its place demands.
    """
    level = level_of(size_bytes)
    if root != ZERO_ID:
        yield from _leaves(root, level, 0, fetch([root]) if level else {}, fetch)


def _leaves(node: BlobId, level: int, first: int, nodes: _Nodes, fetch: FetchNodes) -> Iterator[tuple[int, BlobId]]:
    """Those below ``node``, whose bytes are among ``nodes``, and whose first segment has the number ``first``."""
    if level == 0:
        yield first, node
        return
    inner = checked_node(nodes[node], level)
    assert isinstance(inner, Inner)
    below = _distinct(inner.children)
    fetched = fetch(below) if level > 1 and below else {}
    for number, child in enumerate(inner.children):
        if child != ZERO_ID:
            yield from _leaves(child, level - 1, first + number * FANOUT ** (level - 1), fetched, fetch)


def _distinct(ids: Sequence[BlobId]) -> list[BlobId]:
    return list(dict.fromkeys(blob_id for blob_id in ids if blob_id != ZERO_ID))
