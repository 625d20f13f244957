"""How fast QEMU may copy in the background, so that the sink has memory free when the guest writes.

QEMU puts the guest's copies behind those of the background, on one connection. Measured with a target of 50 MB/s,
random writes of the guest wait 1,402 ms at QEMU's defaults, 6 ms with few small requests, and about 1 ms when the
background stays below what the target takes.
"""

from __future__ import annotations

from casbackup.units import GiB, MiB

_FIRST_BYTES_S = 256 * MiB
_LEAST_BYTES_S = 1 * MiB
_UNLIMITED_BYTES_S = 4 * GiB
"""No QEMU copies as fast as that."""
LOW_FILL, _HIGH = 0.15, 0.4
"""Of the sink's memory: below, go faster; above, go much slower."""
_FASTER = 1.5
_SLOWER, _MUCH_SLOWER = 0.8, 0.3
_SMOOTHING_S = 1.0
_STEP_S = 0.05
"""What comes of a step does not show sooner."""


class Rate:
    """What the backup has taken lately, in bytes per second."""

    def __init__(self) -> None:
        self.bytes_s = 0.0
        self._measured_s = 0.0
        self._last: tuple[float, int] | None = None

    def look(self, now_s: float, taken_bytes: int, *, counts: bool = True) -> None:
        """``taken_bytes``: in all, at this time. ``counts`` false: what was taken since the last look tells nothing."""
        if self._last is not None and counts:
            elapsed_s, taken = now_s - self._last[0], taken_bytes - self._last[1]
            if elapsed_s > 0:
                self._measured_s += elapsed_s
                # In the beginning all of it has the same weight: nothing is known that would be better.
                weight = min(1.0, elapsed_s / min(_SMOOTHING_S, self._measured_s))
                self.bytes_s += weight * (taken / elapsed_s - self.bytes_s)
        self._last = now_s, taken_bytes


class Pace:
    """Decides on the speed at each look at the sink. Pure: time and figures come in."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory = memory_bytes
        self._limit = float(_FIRST_BYTES_S)
        self._stepped_s: float | None = None
        self._rate = Rate()
        self._able = Rate()
        """While it has something to take, for otherwise it is the speed itself that is measured."""

    @property
    def taken_bytes_s(self) -> float:
        """What the backup has taken lately, in bytes per second."""
        return self._rate.bytes_s

    def look(self, now_s: float, taken_bytes: int, waiting_bytes: int) -> int:
        """``taken_bytes``: by the backup, in all. Returns the speed for all jobs together, 0 for unlimited."""
        self._rate.look(now_s, taken_bytes)
        self._able.look(now_s, taken_bytes, counts=waiting_bytes > 0)
        if self._stepped_s is None or now_s - self._stepped_s >= _STEP_S:
            self._stepped_s = now_s
            self._step(waiting_bytes / self._memory)
        return 0 if self._limit >= _UNLIMITED_BYTES_S else int(self._limit)

    def _step(self, fill: float) -> None:
        if fill > _HIGH:
            self._limit = max(_LEAST_BYTES_S, _MUCH_SLOWER * self._able.bytes_s)
        elif fill > LOW_FILL:
            self._limit = max(_LEAST_BYTES_S, min(self._limit, _SLOWER * self._able.bytes_s))
        else:
            self._limit = min(_UNLIMITED_BYTES_S, _FASTER * self._limit)
