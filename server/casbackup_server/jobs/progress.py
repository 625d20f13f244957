"""A job's progress, kept for whoever asks; and the way to end it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from casbackup.errors import Interrupted
from casbackup.limits import MAX_SERVER_JOB_LOG_LINES


class JobProgress:
    """Implements ``Progress``. A job that was cancelled is stopped at its next advance, as a signal stops a command:
    what it did so far is sound.
    """

    def __init__(self) -> None:
        self.title = ""
        self.total_bytes: int | None = None
        self._done = 0
        self._log: list[str] = []
        self._cancelled = threading.Event()
        self._on_cancel: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    @property
    def done_bytes(self) -> int:
        return self._done

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def log(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._log)

    def cancel(self) -> None:
        self._cancelled.set()
        with self._lock:
            actions = list(self._on_cancel)
        for action in actions:
            action()

    def on_cancel(self, action: Callable[[], None]) -> None:
        """What wakes the job where it waits: called once it is cancelled, from any thread; twice must do no harm."""
        with self._lock:
            self._on_cancel.append(action)
        if self.cancelled:
            action()

    def note(self, line: str) -> None:
        with self._lock:
            if len(self._log) < MAX_SERVER_JOB_LOG_LINES:
                self._log.append(line)

    def require_going(self) -> None:
        """:raise Interrupted: when the job was cancelled."""
        if self._cancelled.is_set():
            raise Interrupted("the job was cancelled")

    def start(self, title: str, total_bytes: int | None) -> None:
        self.require_going()
        self.note(title)
        with self._lock:
            self.title, self.total_bytes, self._done = title, total_bytes, 0

    def advance(self, **counters: int) -> None:
        self.require_going()
        with self._lock:
            self._done += counters.get("done", 0)

    def finish(self) -> None: ...
