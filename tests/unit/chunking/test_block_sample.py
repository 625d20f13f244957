"""The chunker against a plain statement of its rules."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.chunking.block_sample import _SAMPLE_OFFSETS, BlockSampleChunker, Span
from casbackup.codec.crypto import scrambler
from casbackup.limits import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES
from casbackup.spec.config import ChunkerConfig

CONFIG = ChunkerConfig()
CHUNKER = BlockSampleChunker(CONFIG)
assert 0 not in _SAMPLE_OFFSETS
SPARSE = b"\1" + bytes(BLOCK_BYTES - 1)
"""A block that the chunker's samples take for zeros."""

groups = st.lists(
    st.tuples(st.sampled_from(["random", "zero", "sparse", "same"]), st.integers(1, 60), st.integers(0, 99)),
    min_size=1,
    max_size=8,
)
tails = st.sampled_from([0, 1, 511, 512, 4095])


def blocks(kind: str, count: int, seed: int) -> bytes:
    if kind == "random":
        return random.Random(seed).randbytes(count * BLOCK_BYTES)
    if kind == "same":
        return random.Random(seed).randbytes(BLOCK_BYTES) * count
    return (SPARSE if kind == "sparse" else bytes(BLOCK_BYTES)) * count


def padded(data: bytes) -> bytearray:
    return bytearray(data + bytes(-len(data) % BLOCK_BYTES))


def zero_runs(data: bytes) -> list[tuple[int, int]]:
    """Maximal runs of enough zero blocks, as (offset, length)."""
    runs: list[tuple[int, int]] = []
    count = -(-len(data) // BLOCK_BYTES)
    start = 0
    for number in range(count + 1):
        if number < count and not any(data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]):
            continue
        if number - start >= CONFIG.zero_run_blocks:
            end = min(number * BLOCK_BYTES, len(data))
            runs.append((start * BLOCK_BYTES, end - start * BLOCK_BYTES))
        start = number + 1
    return runs


def chunks(data: bytes) -> list[bytes]:
    spans = CHUNKER.spans(padded(data), len(data))
    return [data[s.offset : s.offset + s.length] for s in spans if not s.is_zero]


def check(data: bytes) -> list[Span]:
    spans = CHUNKER.spans(padded(data), len(data))
    position = 0
    for span, following in zip(spans, [*spans[1:], None], strict=True):
        assert span.offset == position and span.length > 0
        position += span.length
        if not span.is_zero:
            assert span.length <= CONFIG.max_bytes
            if following is not None and not following.is_zero:
                assert span.length >= CONFIG.min_blocks * BLOCK_BYTES
    assert position == len(data)
    assert [(s.offset, s.length) for s in spans if s.is_zero] == zero_runs(data)
    return spans


@settings(max_examples=50)
@given(groups, tails)
def test_spans_keep_all_rules(content: list[tuple[str, int, int]], tail: int) -> None:
    data = b"".join(blocks(*group) for group in content) + b"t" * tail
    spans = check(data)
    assert spans == CHUNKER.spans(padded(data), len(data)) == BlockSampleChunker(CONFIG).spans(padded(data), len(data))


@settings(max_examples=50)
@given(groups, tails, st.integers(1, 3))
def test_bytes_after_the_last_block_do_not_matter(content: list[tuple[str, int, int]], tail: int, more: int) -> None:
    data = b"".join(blocks(*group) for group in content) + b"t" * tail
    longer = padded(data) + bytearray(b"x" * BLOCK_BYTES * more)
    assert CHUNKER.spans(longer, len(data)) == CHUNKER.spans(padded(data), len(data))


@pytest.mark.parametrize("length", [1, 511, 4095, 4096, 4097, 5 * 4096 + 1, SEGMENT_BYTES - 1, SEGMENT_BYTES])
@pytest.mark.parametrize("kind", ["random", "zero"])
def test_lengths(kind: str, length: int) -> None:
    spans = check(blocks(kind, SEGMENT_BLOCKS, 3)[:length])
    if kind == "zero" and length > CONFIG.zero_run_blocks * BLOCK_BYTES:
        assert spans == [Span(0, length, True)]


@pytest.mark.parametrize("run", range(1, 9))
def test_a_run_becomes_a_zero_span_when_it_is_long_enough(run: int) -> None:
    data = blocks("random", 20, 1) + bytes(run * BLOCK_BYTES) + blocks("random", 20, 2)
    zeros = [span for span in check(data) if span.is_zero]
    expected = [Span(20 * BLOCK_BYTES, run * BLOCK_BYTES, True)] if run >= CONFIG.zero_run_blocks else []
    assert zeros == expected


def test_blocks_whose_samples_alone_are_zero_are_kept() -> None:
    data = SPARSE * 10 + bytes(5 * BLOCK_BYTES) + SPARSE + bytes(3 * BLOCK_BYTES) + SPARSE
    assert [span for span in check(data) if span.is_zero] == [Span(10 * BLOCK_BYTES, 5 * BLOCK_BYTES, True)]


def test_chunks_have_a_useful_size() -> None:
    found = chunks(blocks("random", SEGMENT_BLOCKS, 5))
    assert 7 * BLOCK_BYTES < SEGMENT_BYTES / len(found) < 13 * BLOCK_BYTES


@settings(max_examples=25)
@given(st.integers(1, 100), st.integers(0, 9))
def test_inserted_blocks_move_chunks_but_do_not_change_them(count: int, seed: int) -> None:
    data = blocks("random", 500, seed)
    before = chunks(data)
    after = set(chunks(blocks("random", count, seed + 1000) + data))
    assert sum(chunk in after for chunk in before) > 0.9 * len(before)


@settings(max_examples=25)
@given(st.integers(0, 499), st.integers(0, 9))
def test_a_changed_block_changes_few_chunks(at: int, seed: int) -> None:
    data = bytearray(blocks("random", 500, seed))
    before = set(chunks(bytes(data)))
    data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES] = blocks("random", 1, seed + 1000)
    assert len(set(chunks(bytes(data))) - before) <= 12


def test_other_parameters() -> None:
    chunker = BlockSampleChunker(ChunkerConfig(min_blocks=1, max_blocks=2, cuts_in_256=1, zero_run_blocks=1))
    data = blocks("random", 9, 0) + bytes(BLOCK_BYTES) + blocks("random", 2, 1)
    spans = chunker.spans(bytearray(data), len(data))
    assert [s.offset // BLOCK_BYTES for s in spans if s.is_zero] == [9]
    assert all(s.length <= 2 * BLOCK_BYTES for s in spans)


def keyed(byte: int) -> BlockSampleChunker:
    return BlockSampleChunker(CONFIG, scrambler(bytes([byte]) * 32))


def cuts(chunker: BlockSampleChunker, data: bytes) -> list[int]:
    return [span.offset for span in chunker.spans(padded(data), len(data))]


def test_with_a_key_the_same_rules_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CHUNKER", keyed(1))
    check(blocks("random", 600, 1) + blocks("zero", 10, 0) + blocks("sparse", 9, 0) + blocks("same", 50, 3) + b"t")


def test_cuts_depend_on_the_key_and_on_all_samples() -> None:
    data = blocks("random", SEGMENT_BLOCKS, 5)
    assert cuts(keyed(1), data) == cuts(keyed(1), data)
    assert len({tuple(cuts(chunker, data)) for chunker in (CHUNKER, keyed(1), keyed(2))}) == 3
    # Blocks whose samples have the same XOR are alike without a key; with one, they are not.
    pairs = bytearray(blocks("same", SEGMENT_BLOCKS, 6))
    for number in range(SEGMENT_BLOCKS):
        for offset in _SAMPLE_OFFSETS[:2]:
            pairs[number * BLOCK_BYTES + offset] ^= number % 256
    plain, secret = cuts(CHUNKER, bytes(pairs)), cuts(keyed(1), bytes(pairs))
    assert len({b - a for a, b in itertools.pairwise(plain)}) == 1
    assert len({b - a for a, b in itertools.pairwise(secret)}) > 5


def test_with_a_key_chunks_have_the_same_mean_length() -> None:
    data = blocks("random", SEGMENT_BLOCKS, 7)
    plain, secret = len(cuts(CHUNKER, data)), len(cuts(keyed(1), data))
    assert 0.7 < plain / secret < 1.4
