"""Exclusive holds of ranges: calls that overlap take turns, all others go on at once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class RangeLocks:
    """Ranges are half-open and of any unit. A thread holds one at a time, else two could wait for each other."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, start: int, stop: int, *, timeout_s: float | None = None) -> Iterator[None]:
        """Nobody else holds any part of the range during the block.

        :raise TimeoutError: when that was not so within ``timeout_s``; nothing is held then.
        """
        self._take((start, stop), timeout_s)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove((start, stop))
                self._changed.notify_all()

    def _take(self, wanted: tuple[int, int], timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._is_held(*wanted):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the range is held by somebody else")
                self._changed.wait(left)
            self._held.append(wanted)

    def _is_held(self, start: int, stop: int) -> bool:
        return any(start < held_stop and held_start < stop for held_start, held_stop in self._held)
