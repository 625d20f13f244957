"""Disk trees against a plain model: a disk is its extents by segment."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.codec.hashing import PUBLIC_KEYS
from casbackup.errors import BlobMissing, DataDamage, NodeInvalid
from casbackup.fs import Buffer
from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import FANOUT, SEGMENT_BYTES
from casbackup.spec.node import Extent, Inner, Leaf, decode_node, encode_inner, encode_leaf, zero_extent
from casbackup.spec.record import BlobKind
from casbackup.tree.builder import TreeBuilder, leaf_bytes, level_of
from casbackup.tree.diff import Disk, Range, diff, merged
from casbackup.tree.extents import normalised, overlaid, sliced
from casbackup.tree.reader import DiskTree, Segment
from casbackup.units import GiB, MiB

CHUNKS = [ZERO_ID, *(BlobId(bytes([n]) * 32) for n in range(1, 4))]
SIZES = [0, 1, 4095, 4 * MiB, 4 * MiB + 1, 9 * MiB + 5, GiB, GiB + 1, 3 * GiB + 7]

Content = dict[int, list[Extent]]


class Model(NamedTuple):
    """The segments of a disk that are not absent."""

    size: int
    segments: Content


class Piece(NamedTuple):
    """What the disk holds from ``offset``: bytes of ``chunk`` from ``skip`` (zeros: skip 0)."""

    offset: int
    length: int
    chunk: BlobId
    skip: int


class Nodes:
    """A store of nodes in memory that counts what is fetched, and can lose nodes."""

    def __init__(self) -> None:
        self.data: dict[BlobId, bytes] = {}
        self.lost: set[BlobId] = set()
        self.fetched: Counter[BlobId] = Counter()

    def store(self, nodes: Sequence[bytes]) -> list[BlobId]:
        ids = [PUBLIC_KEYS.id(BlobKind.NODE, node) for node in nodes]
        self.data.update(zip(ids, nodes, strict=True))
        return ids

    def fetch(self, ids: Sequence[BlobId]) -> Mapping[BlobId, Buffer | DataDamage]:
        assert len(set(ids)) == len(ids) and ZERO_ID not in ids
        self.fetched.update(ids)
        return {i: BlobMissing("lost") if i in self.lost else self.data[i] for i in ids}

    def build(self, model: Model) -> BlobId:
        builder = TreeBuilder()
        for segment, extents in model.segments.items():
            data = leaf_bytes(extents)
            builder.set_leaf(segment, ZERO_ID if data is None else self.store([data])[0])
        return builder.finish(model.size, self.store)

    def places(self, root: BlobId, size: int) -> dict[tuple[int, int], BlobId]:
        """All nodes of a tree by (level, number), read the simplest way."""
        found: dict[tuple[int, int], BlobId] = {}

        def visit(node: BlobId, level: int, number: int) -> None:
            if node == ZERO_ID:
                return
            found[level, number] = node
            decoded = decode_node(self.data[node])
            if isinstance(decoded, Inner):
                for child_number, child in enumerate(decoded.children, number * FANOUT):
                    visit(child, level - 1, child_number)

        visit(root, level_of(size), 0)
        return found


def flat(pieces: Iterable[tuple[int, Extent]]) -> list[Piece]:
    """Join what continues."""
    result: list[Piece] = []
    for offset, extent in pieces:
        if result:
            last = result[-1]
            assert last.offset + last.length == offset
            if last.chunk == extent.id and (extent.is_zero or last.skip + last.length == extent.skip):
                result[-1] = last._replace(length=last.length + extent.length)
                continue
        result.append(Piece(offset, extent.length, extent.id, extent.skip))
    return result


def pieces(model: Model, start: int, end: int) -> list[Piece]:
    found: list[tuple[int, Extent]] = []
    end = min(end, model.size)
    for segment in range(start // SEGMENT_BYTES, -(-end // SEGMENT_BYTES)):
        at = segment * SEGMENT_BYTES
        for extent in model.segments.get(segment, [zero_extent(min(SEGMENT_BYTES, model.size - at))]):
            first, last = max(at, start), min(at + extent.length, end)
            if first < last:
                skip = 0 if extent.is_zero else extent.skip + first - at
                found.append((first, Extent(last - first, skip, extent.id)))
            at += extent.length
    return flat(found)


@st.composite
def segment_extents(draw: st.DrawFn, length: int) -> list[Extent]:
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4)) - {length})
    extents = []
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        chunk = draw(st.sampled_from(CHUNKS))
        skip = 0 if chunk == ZERO_ID else draw(st.sampled_from([0, start, 4096, 2**20]))
        extents.append(Extent(end - start, skip, chunk))
    return extents


@st.composite
def contents(draw: st.DrawFn, size: int) -> Content:
    count = -(-size // SEGMENT_BYTES)
    candidates = sorted({n for n in (0, 1, 2, 254, 255, 256, 257, 511, 512, count - 1) if 0 <= n < count})
    if not candidates:
        return {}
    chosen = draw(st.sets(st.sampled_from(candidates), max_size=5))
    return {n: draw(segment_extents(min(SEGMENT_BYTES, size - n * SEGMENT_BYTES))) for n in sorted(chosen)}


@st.composite
def models(draw: st.DrawFn) -> Model:
    size = draw(st.sampled_from(SIZES))
    return Model(size, draw(contents(size)))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Model, Model]:
    """A disk, and the same after changes and perhaps a change of size."""
    first = draw(models())
    size = draw(st.sampled_from([first.size, *SIZES]))
    segments: Content = {}
    for number, extents in first.segments.items():
        length = min(SEGMENT_BYTES, size - number * SEGMENT_BYTES)
        if length <= 0:
            continue
        have = sum(extent.length for extent in extents)
        segments[number] = sliced(extents, 0, min(have, length)) + [zero_extent(length - have)] * (length > have)
    changes = draw(contents(size)) if draw(st.booleans()) else {}
    return first, Model(size, {**segments, **changes})


# --- building and reading


@pytest.mark.parametrize(
    ("size", "level"),
    [(0, 0), (1, 0), (4 * MiB, 0), (4 * MiB + 1, 1), (GiB, 1), (GiB + 1, 2), (256 * GiB, 2), (256 * GiB + 1, 3)],
)
def test_levels(size: int, level: int) -> None:
    assert level_of(size) == level


@settings(max_examples=35)
@given(models(), st.data())
def test_a_tree_reads_as_the_model(model: Model, data: st.DataObject) -> None:
    nodes = Nodes()
    tree = DiskTree(nodes.build(model), model.size, nodes.fetch)
    edges = st.integers(0, model.size) | st.sampled_from(
        sorted({min(n, model.size) for n in (0, 1, 4 * MiB, GiB, model.size)})
    )
    start, end = sorted((data.draw(edges), data.draw(edges)))
    assert flat(tree.extents(start, end)) == pieces(model, start, end)
    assert flat(tree.extents(0, model.size)) == pieces(model, 0, model.size)
    segments = list(tree.segments(start, end))
    for segment, following in pairwise(segments):
        assert segment.offset + segment.length == following.offset
    if start < end:
        assert segments[0].offset <= start < segments[0].offset + segments[0].length
        assert segments[-1].offset < end <= segments[-1].offset + segments[-1].length
    else:
        assert segments == []


@settings(max_examples=30)
@given(models())
def test_equal_content_is_one_tree_and_order_does_not_matter(model: Model) -> None:
    nodes = Nodes()
    backwards = Model(model.size, dict(reversed(model.segments.items())))
    cut_finer = {n: [p for e in extents for p in halves(e)] for n, extents in model.segments.items()}
    assert nodes.build(model) == nodes.build(backwards) == nodes.build(Model(model.size, cut_finer))
    assert nodes.build(Model(model.size, {})) == ZERO_ID


def halves(extent: Extent) -> list[Extent]:
    middle = extent.length // 2
    return sliced([extent], 0, middle) + sliced([extent], middle, extent.length)


@settings(max_examples=30)
@given(models())
def test_a_walk_fetches_only_what_it_needs(model: Model) -> None:
    nodes = Nodes()
    root = nodes.build(model)
    list(DiskTree(root, model.size, nodes.fetch).segments(0, min(1, model.size)))
    assert sum(nodes.fetched.values()) <= level_of(model.size) + 1
    nodes.fetched.clear()
    list(DiskTree(root, model.size, nodes.fetch).segments())
    assert set(nodes.fetched) == set(nodes.places(root, model.size).values())


# --- overlaid

BYTES = {CHUNKS[n]: random.Random(n).randbytes(400) for n in (1, 2, 3)}
small_extents = st.builds(
    lambda length, skip, chunk: Extent(length, 0 if chunk == ZERO_ID else skip, chunk),
    st.integers(0, 60), st.integers(0, 300), st.sampled_from(CHUNKS),
)  # fmt: skip


def rendered(extents: Iterable[Extent]) -> bytes:
    return b"".join(bytes(e.length) if e.is_zero else BYTES[e.id][e.skip : e.skip + e.length] for e in extents)


@settings(max_examples=35)
@given(
    st.lists(small_extents), st.lists(st.tuples(st.integers(0, 80), st.lists(small_extents, min_size=1, max_size=3)))
)
def test_overlaid_is_overwriting_bytes(base: list[Extent], gaps: list[tuple[int, list[Extent]]]) -> None:
    model = bytearray(rendered(base))
    changes, position = [], 0
    for gap, extents in gaps:
        position += gap
        changes.append((position, extents))
        data = rendered(extents)
        model += bytes(max(0, position - len(model)))
        model[position : position + len(data)] = data
        position += len(data)
    result = overlaid(base, changes)
    assert rendered(result) == bytes(model)
    assert normalised(result) == result and all(extent.length for extent in result)


@given(st.lists(small_extents), st.integers(0, 500), st.integers(0, 500))
def test_sliced_is_slicing_bytes(extents: list[Extent], start: int, end: int) -> None:
    assert rendered(sliced(extents, start, end)) == rendered(extents)[start:end]
    assert rendered(normalised(extents)) == rendered(extents)


# --- diff


def model_diff(a: Model, b: Model) -> list[Range]:
    """Where two disks hold different bytes of chunks, joined."""
    common = min(a.size, b.size)
    in_a, in_b = pieces(a, 0, common), pieces(b, 0, common)
    edges = sorted({0, common, *(p.offset for p in in_a), *(p.offset for p in in_b)})
    found = []
    for start, end in pairwise(edges):
        if at(in_a, start) != at(in_b, start):
            found.append(Range(start, end - start))
    if a.size != b.size:
        found.append(Range(common, max(a.size, b.size) - common))
    return list(merged(found))


def at(found: list[Piece], offset: int) -> tuple[BlobId, int]:
    piece = next(p for p in found if p.offset <= offset < p.offset + p.length)
    return piece.chunk, 0 if piece.chunk == ZERO_ID else piece.skip + offset - piece.offset


@settings(max_examples=35)
@given(pairs(), st.booleans())
def test_diff_finds_exactly_what_differs_and_fetches_nothing_shared(pair: tuple[Model, Model], swap: bool) -> None:
    a, b = reversed(pair) if swap else pair
    nodes = Nodes()
    roots = nodes.build(a), nodes.build(b)
    found = list(diff(Disk(roots[0], a.size), Disk(roots[1], b.size), nodes.fetch))
    assert found == model_diff(a, b)
    in_a, in_b = nodes.places(roots[0], a.size), nodes.places(roots[1], b.size)
    common = min(a.size, b.size)
    expected: Counter[BlobId] = Counter()
    for level, number in in_a.keys() | in_b.keys():
        ids = {in_a.get((level, number)), in_b.get((level, number))}
        if len(ids) == 2 and number * (SEGMENT_BYTES << 8 * level) < common:
            expected.update(i for i in ids if i is not None)
    assert nodes.fetched == expected


def test_diff_with_a_lost_node_raises() -> None:
    nodes = Nodes()
    a = nodes.build(Model(5 * MiB, {0: [Extent(4 * MiB, 0, CHUNKS[1])]}))
    b = nodes.build(Model(5 * MiB, {0: [Extent(4 * MiB, 0, CHUNKS[2])]}))
    nodes.lost.add(b)
    with pytest.raises(BlobMissing):
        list(diff(Disk(a, 5 * MiB), Disk(b, 5 * MiB), nodes.fetch))


# --- damage


@settings(max_examples=35)
@given(models(), st.data())
def test_a_tolerant_walk_covers_everything_and_says_what_is_lost(model: Model, data: st.DataObject) -> None:
    nodes = Nodes()
    root = nodes.build(model)
    places = nodes.places(root, model.size)
    nodes.lost = set(data.draw(st.sets(st.sampled_from(sorted(nodes.data))))) if nodes.data else set()
    segments = list(DiskTree(root, model.size, nodes.fetch, tolerant=True).segments())
    position = 0
    for segment in segments:
        assert segment.offset == position and segment.length > 0
        position += segment.length
        assert (segment.damage is None) or segment.extents is None
    assert position == model.size
    damaged = {n for s in segments if s.damage for n in covered(s)}
    top = level_of(model.size)
    for number in range(-(-model.size // SEGMENT_BYTES)):
        lost = any(places.get((level, number >> 8 * level)) in nodes.lost for level in range(top + 1))
        assert (number in damaged) == lost
    sound = [s for s in segments if not s.damage]
    for segment in sound:
        extents = segment.extents or [zero_extent(segment.length)]
        listed, offset = [], segment.offset
        for extent in extents:
            listed.append((offset, extent))
            offset += extent.length
        assert flat(listed) == pieces(model, segment.offset, segment.offset + segment.length)
    if len(sound) < len(segments):
        with pytest.raises(BlobMissing):
            list(DiskTree(root, model.size, nodes.fetch).segments())


def covered(segment: Segment) -> range:
    return range(segment.offset // SEGMENT_BYTES, -(-(segment.offset + segment.length) // SEGMENT_BYTES))


LEAF = encode_leaf([Extent(SEGMENT_BYTES, 0, CHUNKS[1])])
LEAF_ID = PUBLIC_KEYS.id(BlobKind.NODE, LEAF)


@pytest.mark.parametrize(
    ("node", "size"),
    [
        (LEAF, SEGMENT_BYTES - 1),
        (LEAF, SEGMENT_BYTES + 1),
        (encode_leaf([Extent(10, 0, CHUNKS[1])]), 11),
        (encode_inner(1, [LEAF_ID]), SEGMENT_BYTES),
        (encode_inner(2, [LEAF_ID]), GiB),
        (encode_inner(1, [LEAF_ID]), GiB + 1),
        (encode_inner(1, [ZERO_ID, LEAF_ID]), SEGMENT_BYTES + 1),
        (b"nonsense", SEGMENT_BYTES),
    ],
)
def test_nodes_out_of_place_are_refused(node: bytes, size: int) -> None:
    nodes = Nodes()
    nodes.store([LEAF])
    (root,) = nodes.store([node])
    with pytest.raises(NodeInvalid):
        list(DiskTree(root, size, nodes.fetch).segments())
    segments = list(DiskTree(root, size, nodes.fetch, tolerant=True).segments())
    assert sum(segment.length for segment in segments) == size
    assert any(isinstance(segment.damage, NodeInvalid) for segment in segments)


def test_a_child_of_the_wrong_level_is_refused() -> None:
    nodes = Nodes()
    nodes.store([LEAF])
    (inner,) = nodes.store([encode_inner(1, [LEAF_ID])])
    (root,) = nodes.store([encode_inner(1, [LEAF_ID, inner])])
    assert isinstance(decode_node(nodes.data[inner]), Inner) and isinstance(decode_node(LEAF), Leaf)
    with pytest.raises(NodeInvalid):
        list(DiskTree(root, 2 * SEGMENT_BYTES, nodes.fetch).segments())
