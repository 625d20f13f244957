"""The pace against a simulated sink."""

from __future__ import annotations

import pytest

from casbackup.qemu.pacing import Pace

MiB = 1024 * 1024
MEMORY = 64 * MiB
STEP_S = 0.1


def simulate(target_bytes_s: int, seconds: float, source_bytes_s: int = 1200 * MiB) -> tuple[list[int], list[int]]:
    """Fill and speed at each look, for a target that takes so much and a QEMU that can copy so much."""
    pace, waiting, taken, limit = Pace(MEMORY), 0, 0, 0
    fills, limits = [], []
    for look in range(int(seconds / STEP_S)):
        limit = pace.look(look * STEP_S, taken, waiting)
        coming = min(limit or source_bytes_s, source_bytes_s) * STEP_S
        going = min(target_bytes_s * STEP_S, waiting + coming)
        waiting = int(min(MEMORY, waiting + coming - going))
        taken += int(going)
        fills.append(waiting)
        limits.append(limit)
    return fills, limits


@pytest.mark.parametrize("rate", [5, 50, 200])
def test_a_slow_target_leaves_memory_free_and_is_kept_busy(rate: int) -> None:
    fills, limits = simulate(rate * MiB, 20)
    settled = fills[30:]
    assert max(settled) < 0.6 * MEMORY
    assert min(limits) >= MiB
    mean = sum(limits[30:]) / len(limits[30:])
    assert 0.6 * rate * MiB < mean < 1.6 * rate * MiB


def test_a_fast_target_is_not_held_back() -> None:
    _, limits = simulate(3000 * MiB, 3)
    assert limits[-1] == 0


def test_a_target_that_hangs_ends_at_the_least_speed() -> None:
    _, limits = simulate(0, 10)
    assert limits[-1] == MiB


def test_a_hasty_beginning_is_not_taken_for_a_slow_target() -> None:
    """Jobs that start bring many looks at once, and data that has hardly begun to be taken."""
    pace = Pace(MEMORY)
    for look, (taken, waiting) in enumerate([(0, 0), (0, 0), (4, 0), (6, 0), (8, 0), (13, 12), (13, 12), (17, 12)]):
        limit = pace.look(39.12 + look * 0.01, taken * MiB, waiting * MiB)
    assert limit >= 100 * MiB, "17 MiB in 70 ms"


def test_what_the_speed_itself_held_back_is_not_taken_for_the_targets() -> None:
    """After a pause, in which nothing was there to be taken, the first fill does not throttle it for seconds."""
    pace, taken = Pace(MEMORY), 0
    for look in range(10):
        taken += 40 * MiB
        pace.look(look * STEP_S, taken, 5 * MiB)
    for look in range(10, 40):
        pace.look(look * STEP_S, taken, 0)
    assert pace.look(4.0, taken + 40 * MiB, 12 * MiB) >= 200 * MiB
