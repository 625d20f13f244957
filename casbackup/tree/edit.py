"""Replacing some leaves of a disk tree. What is untouched keeps its ids and is not read: only the inner nodes above
a change are fetched and made anew.
"""

from __future__ import annotations

from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import FANOUT
from casbackup.spec.node import Inner, encode_inner
from casbackup.tree.builder import StoreNodes, level_of
from casbackup.tree.reader import FetchNodes, checked_node


class TreeEditor:
    """Collects leaves by segment number, as ``TreeBuilder`` does; the others are those of the tree below ``root``."""

    def __init__(self, root: BlobId, fetch: FetchNodes) -> None:
        self._root = root
        self._fetch = fetch
        self._leaves: dict[int, BlobId] = {}

    @property
    def changed(self) -> set[int]:
        """The numbers of the segments that have new leaves."""
        return set(self._leaves)

    def set_leaf(self, segment: int, leaf: BlobId) -> None:
        """Safe from several threads for different segments. The zero id makes a segment zero."""
        self._leaves[segment] = leaf

    def finish(self, size_bytes: int, store: StoreNodes) -> BlobId:
        """Build what is above the new leaves, children first, and return the new root's id.

        ``size_bytes`` is that of the old tree.

        :raise DataDamage: when an old node that is needed is lost.
        """
        return self._rebuilt(self._root, level_of(size_bytes), self._leaves, store)

    def _rebuilt(self, node: BlobId, level: int, leaves: dict[int, BlobId], store: StoreNodes) -> BlobId:
        """The id of ``node`` with ``leaves`` replaced, whose numbers count from the node's first segment."""
        if not leaves:
            return node
        if level == 0:
            return leaves[0]
        span = FANOUT ** (level - 1)
        groups: dict[int, dict[int, BlobId]] = {}
        for number in sorted(leaves):
            groups.setdefault(number // span, {})[number % span] = leaves[number]
        children = self._children(node, level)
        children += [ZERO_ID] * (max(groups) + 1 - len(children))
        for place, group in groups.items():
            children[place] = self._rebuilt(children[place], level - 1, group, store)
        while children and children[-1] == ZERO_ID:
            children.pop()
        return store([encode_inner(level, children)])[0] if children else ZERO_ID

    def _children(self, node: BlobId, level: int) -> list[BlobId]:
        if node == ZERO_ID:
            return []
        decoded = checked_node(self._fetch([node])[node], level)
        assert isinstance(decoded, Inner)
        return list(decoded.children)
