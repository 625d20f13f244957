"""Who is taken for a sequential reader, and how far ahead of one is fetched."""

from __future__ import annotations

import random

import pytest

from casbackup.limits import SEGMENT_BYTES
from casbackup.peer.streams import Streams

MiB = 1024 * 1024
SEGMENTS = 1000


def streams(*, data: range | list[int] | None = None, most_ahead: int = 8) -> Streams:
    """A disk of 1000 segments, all or some of which have data."""
    holding = list(range(SEGMENTS) if data is None else data)
    return Streams(lambda number: next((n for n in holding if n >= number), None), most_ahead)


def read(one: Streams, offset: int, length: int, step: int = MiB // 4) -> list[int]:
    """What is fetched ahead while a range is read in steps."""
    return [n for at in range(offset, offset + length, step) for n in one.note(at, min(step, offset + length - at))]


def test_each_segment_is_told_once_and_before_it_is_read() -> None:
    one = streams()
    ahead: list[int] = []
    for number in range(100):
        ahead += read(one, number * SEGMENT_BYTES, SEGMENT_BYTES)
        assert number + 1 in ahead, f"segment {number + 1} was not fetched ahead"
    assert ahead == list(range(1, ahead[-1] + 1)) and ahead[-1] == 99 + 8


def test_little_is_fetched_ahead_of_who_has_read_little() -> None:
    one = streams()
    assert read(one, 0, MiB - 1) == []
    assert read(one, MiB - 1, 1) == [1]
    assert read(one, MiB, 3 * MiB) == []
    assert read(one, SEGMENT_BYTES, SEGMENT_BYTES) == [2, 3]


def test_holes_are_left_out() -> None:
    one = streams(data=[0, 1, 50, 51, 700])
    assert read(one, 0, 2 * SEGMENT_BYTES)[-1] == 51
    assert read(one, 50 * SEGMENT_BYTES, 2 * SEGMENT_BYTES) == [700]


@pytest.mark.parametrize(("length", "most"), [(4096, 0), (64 * 1024, 0), (512 * 1024, 20)])
def test_hardly_anything_is_fetched_for_readers_at_random(length: int, most: int) -> None:
    """Two large reads of 1000 look like a sequence by chance."""
    one, source = streams(), random.Random(3)
    places = [source.randrange(SEGMENTS * SEGMENT_BYTES - length) for _ in range(1000)]
    assert sum(len(one.note(at, length)) for at in places) <= most


def test_nothing_is_fetched_for_who_reads_the_same_again_or_backwards() -> None:
    one = streams()
    for _ in range(100):
        assert one.note(64 * 1024, 64 * 1024) == []
    for at in range(SEGMENT_BYTES - 65536, 0, -65536):
        assert one.note(10 * SEGMENT_BYTES + at, 65536) == []


def test_several_readers_share_what_may_be_ahead() -> None:
    one = streams()
    told: list[int] = []
    for number in range(20):
        for begin in (0, 200, 400, 600):
            told += read(one, (begin + number) * SEGMENT_BYTES, SEGMENT_BYTES)
    assert len(told) == len(set(told)) == 4 * (19 + 2)


def test_the_end_of_the_disk() -> None:
    one = streams()
    told = read(one, (SEGMENTS - 4) * SEGMENT_BYTES, 4 * SEGMENT_BYTES)
    assert told == [SEGMENTS - 3, SEGMENTS - 2, SEGMENTS - 1]
