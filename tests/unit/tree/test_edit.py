"""Replacing leaves of a tree gives the tree that building it anew would give, and reads only what is above them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from casbackup.codec.hashing import PUBLIC_KEYS
from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import SEGMENT_BYTES
from casbackup.spec.record import BlobKind
from casbackup.tree.builder import TreeBuilder, level_of
from casbackup.tree.edit import TreeEditor

LEAVES = [ZERO_ID, *(BlobId(bytes([n]) * 32) for n in range(1, 4))]
SEGMENTS = 70_000
"""More than 256 * 256: three levels of inner nodes."""


class Nodes:
    """A store of nodes that counts what is fetched."""

    def __init__(self) -> None:
        self.data: dict[BlobId, bytes] = {}
        self.fetched: Counter[BlobId] = Counter()

    def store(self, nodes: Sequence[bytes]) -> list[BlobId]:
        ids = [PUBLIC_KEYS.id(BlobKind.NODE, node) for node in nodes]
        self.data.update(zip(ids, nodes, strict=True))
        return ids

    def fetch(self, ids: Sequence[BlobId]) -> dict[BlobId, bytes]:
        self.fetched.update(ids)
        return {identity: self.data[identity] for identity in ids}


def built(leaves: dict[int, BlobId], size: int, nodes: Nodes) -> BlobId:
    builder = TreeBuilder()
    for number, leaf in leaves.items():
        builder.set_leaf(number, leaf)
    return builder.finish(size, nodes.store)


places = st.one_of(st.integers(0, 600), st.integers(0, SEGMENTS - 1))
contents = st.dictionaries(places, st.sampled_from(LEAVES), max_size=12)


@given(contents, contents, st.sampled_from([1, 2, 256, 257, 601, SEGMENTS]))
def test_like_building_anew(old: dict[int, BlobId], new: dict[int, BlobId], segments: int) -> None:
    size = segments * SEGMENT_BYTES - 512
    old, new = ({n: leaf for n, leaf in leaves.items() if n < segments} for leaves in (old, new))
    nodes = Nodes()
    editor = TreeEditor(built(old, size, nodes), nodes.fetch)
    for number, leaf in new.items():
        editor.set_leaf(number, leaf)
    assert editor.changed == set(new)
    assert editor.finish(size, nodes.store) == built({**old, **new}, size, nodes)
    assert sum(nodes.fetched.values()) <= len(new) * level_of(size)


def test_nothing_changed_reads_nothing() -> None:
    nodes = Nodes()
    root = built({0: LEAVES[1], 300: LEAVES[2]}, 301 * SEGMENT_BYTES, nodes)
    assert TreeEditor(root, nodes.fetch).finish(301 * SEGMENT_BYTES, nodes.store) == root
    assert not nodes.fetched
