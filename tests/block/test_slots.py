"""Places in an area: none overlap, all come back, and what is free can be had."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casbackup.block.slots import BLOCK_BYTES, Slots, rounded
from casbackup.units import KiB, MiB


@pytest.mark.parametrize(
    ("length", "size"),
    [(1, 4 * KiB), (4096, 4 * KiB), (4097, 8 * KiB), (200 * KiB, 256 * KiB), (1 * MiB, 1 * MiB)],
)
def test_sizes(length: int, size: int) -> None:
    assert rounded(length) == size


def test_what_became_free_last_is_taken_first() -> None:
    slots = Slots(4 * MiB)
    places = [slots.take(64 * KiB) for _ in range(3)]
    assert places == [0, 64 * KiB, 128 * KiB]
    slots.give_back(64 * KiB)
    slots.give_back(0)
    assert [slots.take(50 * KiB), slots.take(64 * KiB)] == [0, 64 * KiB]


def test_a_block_that_is_free_again_serves_other_sizes() -> None:
    slots = Slots(1 * MiB + 5)
    places = [slots.take(512 * KiB), slots.take(512 * KiB)]
    assert not slots.fits(4096) and slots.take(4096) is None
    for place in places:
        assert place is not None
        slots.give_back(place)
    assert slots.take(1 * MiB) == 0


def test_an_area_below_a_block_has_no_places() -> None:
    assert Slots(BLOCK_BYTES - 1).take(1) is None


@given(st.lists(st.tuples(st.booleans(), st.integers(1, BLOCK_BYTES)), max_size=200))
def test_places_never_overlap(steps: list[tuple[bool, int]]) -> None:
    slots = Slots(8 * MiB)
    taken: dict[int, int] = {}
    for takes, number in steps:
        if takes:
            fits = slots.fits(number)
            place = slots.take(number)
            assert fits == (place is not None)
            if place is not None:
                taken[place] = rounded(number)
        elif taken:
            place = sorted(taken)[number % len(taken)]
            del taken[place]
            slots.give_back(place)
        ends = [(start, start + size) for start, size in sorted(taken.items())]
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends))
        assert not ends or ends[-1][1] <= 8 * MiB
        assert slots.taken_bytes == sum(taken.values())
    for place in taken:
        slots.give_back(place)
    assert [slots.take(BLOCK_BYTES) for _ in range(9)].count(None) == 1
