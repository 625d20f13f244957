"""Coverage against a model of one byte for each byte; its memory; its errors."""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.errors import ArchiveDamaged, ArchiveIncomplete
from casbackup.formats.coverage import ArchiveCoverage, Coverage, RangeSet
from casbackup.formats.port import ArchiveDisk, ArchiveHead, ByteRange, Data, Zeros
from casbackup.units import GiB, KiB, MiB, TiB

SIZE = 9 * MiB + 700
places = st.one_of(
    st.integers(0, SIZE),
    st.integers(0, SIZE // 512).map(lambda n: n * 512),
    st.integers(0, SIZE // 4096).map(lambda n: n * 4096),
    st.integers(0, SIZE // (4 * MiB)).map(lambda n: n * 4 * MiB),
    st.sampled_from([0, 1, 4095, 4096, 4097, 4 * MiB - 1, 4 * MiB, 8 * MiB, SIZE - 1, SIZE]),
)


def ranges_of(marks: bytearray) -> list[ByteRange]:
    """Runs of ones."""
    found, position = [], 0
    while (start := marks.find(1, position)) >= 0:
        end = marks.find(0, start)
        position = end if end >= 0 else len(marks)
        found.append(ByteRange(start, position - start))
    return found


def merged(ranges: list[ByteRange]) -> list[ByteRange]:
    marks = bytearray(SIZE)
    for item in ranges:
        assert not any(marks[item.offset : item.end]), "a range was given twice"
        marks[item.offset : item.end] = b"\1" * item.length
    return ranges_of(marks)


@settings(max_examples=25)
@given(st.lists(st.tuples(places, places), max_size=8))
def test_coverage_is_that_of_the_model(pairs: list[tuple[int, int]]) -> None:
    coverage, model = Coverage(SIZE), bytearray(SIZE)
    for a, b in pairs:
        start, end = sorted((a, b))
        before = bytearray(SIZE)
        before[start:end] = model[start:end]
        assert merged(coverage.add(start, end - start)) == ranges_of(before)
        model[start:end] = b"\1" * (end - start)
        absent = bytearray(model.translate(bytes([1, 0]) + bytes(254)))
        assert list(coverage.missing()) == ranges_of(absent)
        assert coverage.is_complete is (0 not in model)


@pytest.mark.parametrize("unit", [64 * KiB, 4 * KiB, 512])
def test_any_order_of_pieces_completes_a_disk(unit: int) -> None:
    size = 10 * MiB + 512 if unit > 512 else 1 * MiB + 100
    coverage = Coverage(size)
    starts = list(range(0, size, unit))
    random.Random(unit).shuffle(starts)
    for start in starts:
        assert coverage.add(start, min(unit, size - start)) == []
    assert coverage.is_complete
    for start in starts[:50]:
        length = min(unit, size - start)
        assert coverage.add(start, length) == [ByteRange(start, length)]


def test_whole_segments_over_parts() -> None:
    """A long range that overlaps blocks and bytes that came before names them exactly."""
    coverage = Coverage(64 * MiB)
    coverage.add(5 * MiB + 100, 1000)
    coverage.add(9 * MiB, 8 * KiB)
    before = coverage.add(0, 64 * MiB)
    assert sorted(before) == [ByteRange(5 * MiB + 100, 1000), ByteRange(9 * MiB, 8 * KiB)]
    assert coverage.is_complete


def test_empty_disk_is_complete() -> None:
    assert Coverage(0).is_complete


def test_memory_of_scattered_clusters_is_bounded() -> None:
    """4 GiB, every other cluster in random order: the worst case. 1 TiB then takes 256 times as much."""
    clusters = list(range(0, 4 * GiB // (64 * KiB), 2))
    random.Random(1).shuffle(clusters)
    tracemalloc.start()
    coverage = Coverage(1 * TiB)
    for cluster in clusters:
        coverage.add(cluster * 64 * KiB, 64 * KiB)
    used_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used_bytes * 256 < 200 * MiB


def test_large_zeros_are_cheap() -> None:
    coverage = Coverage(1024 * TiB)
    coverage.add(4096, 1024 * TiB - 4096)
    assert list(coverage.missing()) == [ByteRange(0, 4096)]
    assert sum(r.length for r in coverage.add(0, 1024 * TiB)) == 1024 * TiB - 4096


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))), st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_range_set(pairs: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    ranges, model = RangeSet(), set[int]()
    for a, b in pairs:
        start, end = min(a, b), max(a, b) + 1
        ranges.add(start, end)
        model |= set(range(start, end))
    found = list(ranges)
    assert {n for start, end in found for n in range(start, end)} == model
    assert all(a[1] < b[0] for a, b in pairwise(found)), "touching ranges are merged"
    start, end = sorted(asked)
    assert {n for a, b in ranges.overlap(start, end) for n in range(a, b)} == model & set(range(start, end))


# --- archives

HEAD = ArchiveHead((ArchiveDisk("a", 1 * MiB), ArchiveDisk("b", 4096)))


def test_events_pass_and_are_counted() -> None:
    coverage = ArchiveCoverage(HEAD)
    events = [Data(0, 64 * KiB, bytes(4096)), Zeros(1, 0, 4096), Zeros(0, 0, 64 * KiB)]
    assert list(coverage.passing(events)) == events
    assert list(coverage.missing()) == [(0, ByteRange(68 * KiB, 956 * KiB))]
    with pytest.raises(ArchiveIncomplete, match="'a' 978944 bytes from 69632"):
        coverage.require_complete()
    coverage.add(Zeros(0, 68 * KiB, 956 * KiB))
    coverage.require_complete()


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Zeros(0, 4096, 4096), "'a' has data that comes twice: 4096 bytes from 4096"),
        (Zeros(0, 1 * MiB - 1, 2), "lies outside"),
        (Data(1, 8192, b"x"), "lies outside"),
        (Zeros(0, -1, 1), "lies outside"),
        (Zeros(2, 0, 1), "number 2"),
    ],
)
def test_contradictions(event: Zeros | Data, message: str) -> None:
    coverage = ArchiveCoverage(HEAD)
    coverage.add(Zeros(0, 0, 64 * KiB))
    with pytest.raises(ArchiveDamaged, match=message):
        coverage.add(event)


def test_message_names_only_the_first_ranges() -> None:
    coverage = ArchiveCoverage(HEAD)
    for block in range(1, 256, 2):
        coverage.add(Zeros(0, block * 4096, 4096))
    with pytest.raises(ArchiveIncomplete) as caught:
        coverage.require_complete()
    assert str(caught.value).count("bytes from") == 8
    assert str(caught.value).endswith("and more")
