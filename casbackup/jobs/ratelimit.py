"""No more than so many bytes a second, together for several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

_BURST_S = 0.5


class RateLimit(Protocol):
    def pass_on(self, size_bytes: int, stop: threading.Event) -> None:
        """Wait until so many bytes may pass, or until ``stop`` is set."""


class _NoLimit:
    def pass_on(self, size_bytes: int, stop: threading.Event) -> None: ...


NO_LIMIT: RateLimit = _NoLimit()


class BytesPerSecond:
    """Each caller is given its place in time and waits for it. What was not used for half a second may be made up."""

    def __init__(self, bytes_per_s: float, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s = bytes_per_s
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._free_s = monotonic_s()

    def pass_on(self, size_bytes: int, stop: threading.Event) -> None:
        now_s = self._monotonic_s()
        with self._lock:
            self._free_s = max(self._free_s, now_s - _BURST_S) + size_bytes / self._bytes_per_s
            wait_s = self._free_s - now_s
        if wait_s > 0:
            stop.wait(wait_s)
