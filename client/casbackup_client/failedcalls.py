"""Telling why calls on devices fail: an NBD client shows its user an I/O error and nothing more."""

from __future__ import annotations

import threading
from collections.abc import Callable

from casbackup.block.filters.trace import Record
from casbackup.clock import Clock
from casbackup.errors import CasbackupError

_QUIET_S = 60.0
"""A guest tries again and again: the same is not told so soon."""
_MOST = 1000
"""Messages that are remembered."""


class FailedCalls:
    """Takes the records of ``Trace`` from any number of devices and threads."""

    def __init__(self, report: Callable[[str], None], clock: Clock) -> None:
        self._report = report
        self._clock = clock
        self._told_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def note(self, device: str, record: Record) -> None:
        """``device``: what it is called in messages."""
        if isinstance(record.error, CasbackupError) and self._is_news(f"{device}: {record.error.message}"):
            what = f"{record.operation.value} of {record.length} bytes at {record.offset}"
            self._report(f"{device}: {what} failed: {record.error.message}")

    def _is_news(self, text: str) -> bool:
        now_s = self._clock.monotonic_s()
        with self._lock:
            last_s = self._told_s.pop(text, None)
            if last_s is not None and now_s - last_s < _QUIET_S:
                self._told_s[text] = last_s
                return False
            self._told_s[text] = now_s
            if len(self._told_s) > _MOST:
                self._told_s.pop(next(iter(self._told_s)))
            return True
