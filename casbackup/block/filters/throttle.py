"""Limits bytes and calls a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from casbackup.block.device import BlockDevice
from casbackup.block.filters.base import Filter
from casbackup.clock import Clock, SystemClock
from casbackup.fs import Buffer

BURST_S = 0.1
"""So much of what was not used is not lost: pauses are rarer and longer than the timer's precision."""


class Throttle(Filter):
    """Reads and writes wait so that both limits hold for all of them together, over times above ``BURST_S``.

    Zeroing, discarding and flushing count as a call without bytes; ``extents`` is free. Calls go below in the
    order in which their waiting ends; no call is split.
    """

    def __init__(
        self,
        device: BlockDevice,
        *,
        bytes_per_s: float | None = None,
        calls_per_s: float | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Takes over ``device``. Limits of None do not limit. ``sleep`` takes seconds."""
        super().__init__(device)
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_s = self._clock.monotonic_s() - BURST_S
        self.set_limits(bytes_per_s=bytes_per_s, calls_per_s=calls_per_s)

    def set_limits(self, *, bytes_per_s: float | None = None, calls_per_s: float | None = None) -> None:
        """Change both limits, at any time and from any thread. Whoever waits already is not affected.

        :raise ValueError: for a limit that is not above zero.
        """
        for limit in (bytes_per_s, calls_per_s):
            if limit is not None and limit <= 0:
                raise ValueError(f"a limit of {limit} would stop the device for ever")
        with self._lock:
            self._bytes_per_s = bytes_per_s
            self._calls_per_s = calls_per_s

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._wait(len(buffer))
        self._below.read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        self._wait(len(data))
        self._below.write(offset, data)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._wait(0)
        self._below.write_zeros(offset, length, may_trim=may_trim)

    def discard(self, offset: int, length: int) -> None:
        self._wait(0)
        self._below.discard(offset, length)

    def flush(self) -> None:
        self._wait(0)
        self._below.flush()

    def _wait(self, length: int) -> None:
        pause_s = self._reserve(length)
        if pause_s > 0:
            self._sleep(pause_s)

    def _reserve(self, length: int) -> float:
        """Take the next free time, and say how far off it is, in seconds."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            start_s = max(self._free_s, now_s - BURST_S)
            cost_s = max(
                length / self._bytes_per_s if self._bytes_per_s else 0.0,
                1 / self._calls_per_s if self._calls_per_s else 0.0,
            )
            self._free_s = start_s + cost_s
            return start_s - now_s
