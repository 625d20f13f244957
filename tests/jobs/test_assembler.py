"""The segment assembler against the plain disk: any order, any sizes, little memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.buffers import ByteBuffer
from casbackup.errors import TargetUnwritable
from casbackup.jobs.assembler import PAGE_BYTES, Assembler, Part
from casbackup.limits import BLOCK_BYTES, SEGMENT_BYTES

SECTOR = 512
MiB = 1024 * 1024


class Disks:
    """A sink that keeps everything, and insists on its contract."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.disks = [bytearray(b"\xaa" * size) for size in sizes]
        self.whole: list[tuple[int, int]] = []
        self.partial: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.zero_calls = 0
        self._lock = threading.Lock()

    def segment(self, disk: int, number: int, buffer: ByteBuffer, view: memoryview, length: int) -> None:
        assert length == min(SEGMENT_BYTES, len(self.disks[disk]) - number * SEGMENT_BYTES)
        self._put(disk, number * SEGMENT_BYTES, buffer, view, length)
        with self._lock:
            assert (disk, number) not in self.whole
            self.whole.append((disk, number))

    def part(self, disk: int, number: int, start: int, buffer: ByteBuffer, view: memoryview, length: int) -> bytes:
        self._put(disk, number * SEGMENT_BYTES + start, buffer, view, length)
        with self._lock:
            self.partial.setdefault((disk, number), []).append((start, length))
        return b"%d %d" % (start, length)

    def join(self, disk: int, number: int, length: int, parts: Sequence[Part]) -> None:
        with self._lock:
            known = self.partial.pop((disk, number))
            assert (disk, number) not in self.whole
            self.whole.append((disk, number))
        assert [(p.start, p.length) for p in parts] == sorted(known)
        assert all(p.memo == b"%d %d" % (p.start, p.length) for p in parts)
        assert length == min(SEGMENT_BYTES, len(self.disks[disk]) - number * SEGMENT_BYTES)
        position = 0
        for start, end in [*((p.start, p.start + p.length) for p in parts), (length, length)]:
            self._clear(disk, number * SEGMENT_BYTES + position, start - position)
            position = end

    def zeros(self, disk: int, offset: int, length: int) -> None:
        assert offset % SEGMENT_BYTES == 0
        assert (offset + length) % SEGMENT_BYTES == 0 or offset + length == len(self.disks[disk])
        self._clear(disk, offset, length)
        self.zero_calls += 1

    def _clear(self, disk: int, offset: int, length: int) -> None:
        assert self.disks[disk][offset : offset + length] == b"\xaa" * length, "something came twice"
        self.disks[disk][offset : offset + length] = bytes(length)

    def _put(self, disk: int, offset: int, buffer: ByteBuffer, view: memoryview, length: int) -> None:
        assert len(buffer) == len(view) == SEGMENT_BYTES
        padded = -(-length // BLOCK_BYTES) * BLOCK_BYTES
        assert not any(buffer[length:padded])
        self.disks[disk][offset : offset + length] = view[:length]


Piece = tuple[int, int, int, bool]
"""Disk, offset, length, is zero."""


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[int], list[Piece]]:
    """Disks cut into ranges, shuffled; a range is data or zeros."""
    sizes = draw(st.lists(st.integers(0, 20_000).map(lambda n: n * SECTOR + n % 3), min_size=1, max_size=3))
    pieces: list[Piece] = []
    for disk, size in enumerate(sizes):
        sectors = -(-size // SECTOR)
        cuts = draw(st.sets(st.integers(1, max(1, sectors - 1)), max_size=30)) if sectors > 1 else set()
        bounds = sorted({0, *(c * SECTOR for c in cuts), size})
        zeros = draw(st.integers(0, 2**31))
        pieces += [(disk, a, b - a, bool(zeros >> n % 31 & 1)) for n, (a, b) in enumerate(pairwise(bounds))]
    return sizes, draw(st.permutations(pieces))


def expected(sizes: Sequence[int], pieces: Sequence[Piece]) -> list[bytearray]:
    disks = [bytearray(size) for size in sizes]
    for disk, offset, length, is_zero in pieces:
        if not is_zero:
            disks[disk][offset : offset + length] = content(disk, offset, length)
    return disks


def content(disk: int, offset: int, length: int) -> bytes:
    """Bytes that tell where they belong."""
    return random.Random(offset * 16 + disk).randbytes(length)


def deliver(assembler: Assembler, pieces: Sequence[Piece]) -> None:
    for disk, offset, length, is_zero in pieces:
        if is_zero:
            assembler.zeros(disk, offset, length)
        else:
            assembler.put(disk, offset, memoryview(content(disk, offset, length)))


@settings(deadline=None, max_examples=60)
@given(deliveries(), st.sampled_from([0, 3, 70, 4000]), st.sampled_from([0, 2]))
def test_the_sink_gets_the_disks(delivery: tuple[list[int], list[Piece]], pages: int, workers: int) -> None:
    sizes, pieces = delivery
    sink = Disks(sizes)
    budget = workers * SEGMENT_BYTES + pages * PAGE_BYTES
    with Assembler(sizes, sink, budget_bytes=budget, workers=workers) as assembler:
        deliver(assembler, pieces)
        assembler.finish()
    assert sink.disks == expected(sizes, pieces)
    assert not sink.partial


@settings(deadline=None, max_examples=10)
@given(deliveries(), st.sampled_from([1, 100]))
def test_several_producers(delivery: tuple[list[int], list[Piece]], pages: int) -> None:
    sizes, pieces = delivery
    sink = Disks(sizes)
    with Assembler(sizes, sink, budget_bytes=2 * SEGMENT_BYTES + pages * PAGE_BYTES, workers=2) as assembler:
        producers = [threading.Thread(target=deliver, args=(assembler, pieces[n::3])) for n in range(3)]
        for producer in producers:
            producer.start()
        for producer in producers:
            producer.join()
        assembler.finish()
    assert sink.disks == expected(sizes, pieces)


def test_with_room_enough_segments_come_whole() -> None:
    """Clusters that come early wait for the rest, so that the segment is cut as a backup would cut it."""
    size = 16 * MiB
    pieces = [(0, offset, PAGE_BYTES, False) for offset in range(0, size, PAGE_BYTES)]
    early, late = pieces[5::50], [p for p in pieces if p not in pieces[5::50]]
    sink = Disks([size])
    with Assembler([size], sink, budget_bytes=5 * MiB, workers=0) as assembler:
        deliver(assembler, [*early, *late])
        assembler.finish()
    assert sorted(sink.whole) == [(0, n) for n in range(4)]
    assert sink.disks == expected([size], pieces)


def test_beginnings_of_more_segments_than_there_are_whole_buffers() -> None:
    """None of them gets further; at the end all are handed on as they are."""
    count, length = 40, 100 * 1024
    sizes = [count * SEGMENT_BYTES]
    pieces = [(0, number * SEGMENT_BYTES, length, False) for number in range(count)]
    sink = Disks(sizes)
    with Assembler(sizes, sink, workers=2) as assembler:
        deliver(assembler, pieces)
        assembler.finish(partial=True)
    assert sorted(sink.whole) == [(0, number) for number in range(count)]
    assert sink.disks == expected(sizes, pieces)


def test_when_memory_is_short_the_oldest_goes_in_parts() -> None:
    size = 3 * SEGMENT_BYTES
    sink = Disks([size])
    with Assembler([size], sink, budget_bytes=2 * PAGE_BYTES, workers=0) as assembler:
        for number in (1, 0, 2):
            assembler.put(0, number * SEGMENT_BYTES, bytes(PAGE_BYTES))
        assert sink.partial == {(0, 1): [(0, PAGE_BYTES)]}
        for number in range(3):
            assembler.zeros(0, number * SEGMENT_BYTES + PAGE_BYTES, SEGMENT_BYTES - PAGE_BYTES)
        assembler.finish()
    assert sink.disks == [bytearray(size)]


def test_zeros_of_a_huge_disk_are_one_call() -> None:
    size = 64 * 2**40

    class Counting(Disks):
        def zeros(self, disk: int, offset: int, length: int) -> None:
            self.zero_calls += 1
            assert (offset, length) == (0, size)

    sink = Counting([0])
    with Assembler([size], sink, workers=0) as assembler:
        assembler.zeros(0, 0, size)
        assembler.finish()
    assert sink.zero_calls == 1


def test_ascending_input_stays_ascending_without_workers() -> None:
    size = 5 * SEGMENT_BYTES + 1000
    order: list[int] = []

    class Ordered(Disks):
        def segment(self, disk: int, number: int, buffer: ByteBuffer, view: memoryview, length: int) -> None:
            order.append(number)
            super().segment(disk, number, buffer, view, length)

        def zeros(self, disk: int, offset: int, length: int) -> None:
            order.append(offset // SEGMENT_BYTES)
            super().zeros(disk, offset, length)

    with Assembler([size], Ordered([size]), workers=0) as assembler:
        for offset in range(0, size, MiB):
            length = min(MiB, size - offset)
            if offset // SEGMENT_BYTES % 2:
                assembler.zeros(0, offset, length)
            else:
                assembler.put(0, offset, bytes(length))
        assembler.finish()
    assert order == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("pages", [1, 1000])
def test_an_error_of_the_sink_reaches_the_producer(pages: int) -> None:
    class Full(Disks):
        def segment(self, disk: int, number: int, buffer: ByteBuffer, view: memoryview, length: int) -> None:
            raise TargetUnwritable("no space")

        def part(self, disk: int, number: int, start: int, buffer: ByteBuffer, view: memoryview, length: int) -> bytes:
            raise TargetUnwritable("no space")

    size = 64 * MiB
    with (
        pytest.raises(TargetUnwritable),
        Assembler([size], Full([0]), budget_bytes=2 * SEGMENT_BYTES + pages * PAGE_BYTES, workers=2) as assembler,
    ):
        for offset in range(0, size, MiB):
            assembler.put(0, offset, bytes(MiB))
        assembler.finish()


def test_leaving_with_an_error_ends_the_workers() -> None:
    size = 8 * MiB
    sink = Disks([size])
    before = threading.active_count()
    with pytest.raises(KeyError), Assembler([size], sink, workers=2) as assembler:
        assembler.put(0, 0, bytes(SEGMENT_BYTES))
        raise KeyError
    assert threading.active_count() == before
