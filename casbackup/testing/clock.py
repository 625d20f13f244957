"""A clock that stands still until it is told to move."""

from __future__ import annotations

from casbackup.clock import Clock

START_MS = 1_795_000_000_000
"""2026-11-18T11:06:40Z: any fixed time does."""


class FakeClock(Clock):
    """``jump`` sets the wall clock only; ``pass_time`` moves both clocks forward."""

    def __init__(self, now_ms: int = START_MS, *, step_ms: int = 0) -> None:
        """``step_ms``: by how much every look at the wall clock moves it on."""
        self._now_ms = now_ms
        self._step_ms = step_ms
        self._monotonic_s = 0.0

    def now_ms(self) -> int:
        self._now_ms += self._step_ms
        return self._now_ms

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def pass_time(self, seconds: float) -> None:
        """Time goes by, for both clocks."""
        self._monotonic_s += seconds
        self._now_ms += round(seconds * 1000)

    def jump(self, seconds: float) -> None:
        """Somebody sets the wall clock, in either direction."""
        self._now_ms += round(seconds * 1000)
