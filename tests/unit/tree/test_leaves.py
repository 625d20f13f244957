"""The leaves of a tree, by their ids."""

from __future__ import annotations

import random

import pytest

from casbackup.codec.hashing import PUBLIC_KEYS
from casbackup.errors import BlobMissing, NodeInvalid
from casbackup.fs import Buffer
from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import SEGMENT_BYTES
from casbackup.spec.node import Extent, encode_inner
from casbackup.spec.record import BlobKind
from casbackup.tree.builder import TreeBuilder, leaf_bytes
from casbackup.tree.leaves import leaves


class Nodes:
    """Keeps nodes, and counts how often it is asked."""

    def __init__(self) -> None:
        self.kept: dict[BlobId, bytes] = {}
        self.asked = 0

    def store(self, nodes: list[bytes]) -> list[BlobId]:
        ids = [PUBLIC_KEYS.id(BlobKind.NODE, node) for node in nodes]
        self.kept.update(zip(ids, nodes, strict=True))
        return ids

    def fetch(self, ids: list[BlobId]) -> dict[BlobId, Buffer]:
        assert ids and len(set(ids)) == len(ids) and ZERO_ID not in ids
        self.asked += 1
        return {blob_id: self.kept[blob_id] for blob_id in ids}


@pytest.mark.parametrize("segments", [1, 2, 256, 257, 65_536, 70_000])
def test_they_are_those_that_the_tree_was_built_of(segments: int) -> None:
    source, nodes, builder = random.Random(segments), Nodes(), TreeBuilder()
    numbers = sorted({0, segments - 1, *(source.randrange(segments) for _ in range(20))})
    expected: dict[int, BlobId] = {}
    for number in numbers:
        leaf = leaf_bytes([Extent(SEGMENT_BYTES, 0, BlobId(source.randbytes(32)))])
        assert leaf is not None
        (expected[number],) = nodes.store([leaf])
        builder.set_leaf(number, expected[number])
    root = builder.finish(segments * SEGMENT_BYTES, nodes.store)  # type: ignore[arg-type]
    assert list(leaves(root, segments * SEGMENT_BYTES, nodes.fetch)) == sorted(expected.items())  # type: ignore[arg-type]
    inner = 1 + -(-segments // 65_536)  # once for the root, and for the children of each node of level 2
    assert nodes.asked <= inner + (segments > 65_536)


def test_a_disk_of_zeros_has_none() -> None:
    assert list(leaves(ZERO_ID, 10 * SEGMENT_BYTES, Nodes().fetch)) == []  # type: ignore[arg-type]


def test_lost_and_wrong_nodes_are_errors() -> None:
    nodes = Nodes()
    (inner,) = nodes.store([encode_inner(1, [BlobId(bytes([1]) * 32)])])
    with pytest.raises(NodeInvalid):
        list(leaves(inner, 300 * SEGMENT_BYTES, nodes.fetch))  # type: ignore[arg-type]
    with pytest.raises(BlobMissing):
        list(leaves(inner, 2 * SEGMENT_BYTES, lambda ids: {i: BlobMissing("gone") for i in ids}))
