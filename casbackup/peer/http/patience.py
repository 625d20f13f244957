"""How long a server that does not answer is waited for.

What passes is tried again: no connection, a broken one, a server that is busy. A server that has never answered gets
``FIRST_PATIENCE_S``, one that has ``PATIENCE_S``: it may be restarting. When that did not help, it is *given up*: until
it answers again, each request is tried once and briefly, and within a second of a failure not even that. So whoever
still has several things to say to it does not wait for each of them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from casbackup.errors import ServerBusy, ServerUnreachable

FIRST_PATIENCE_S = 3.0
PATIENCE_S = 120.0

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_QUIET_S = 1.0
"""A server that was given up is not asked again so soon after a failure."""

T = TypeVar("T")


class Patience:
    """With one server. Safe from several threads."""

    def __init__(self, longest_s: float = PATIENCE_S) -> None:
        self._longest_s = longest_s
        self._reached = False
        self._given_up = False
        self._failure: ServerUnreachable | None = None
        self._failed_at_s = 0.0
        self._ended = threading.Event()
        self._jitter = random.Random()  # not the one that all of the process shares

    @property
    def has_succeeded(self) -> bool:
        """Has the server ever answered?"""
        return self._reached

    @property
    def is_lost(self) -> bool:
        """Is there little hope for an answer? Then an attempt should be brief."""
        return self._given_up or (self._ended.is_set() and self._failure is not None)

    def end(self) -> None:
        """Try nothing again from now on."""
        self._ended.set()

    def answered(self) -> None:
        """The server is there."""
        self._reached = True
        self._given_up = False
        self._failure = None

    def run(self, action: Callable[[], T], *, only_once: bool = False) -> T:
        """Do it until it succeeds, fails for good, or takes too long.

        :raise ServerUnreachable, ServerBusy: when patience did not help.
        """
        if only_once or self.is_lost:
            self._require_not_just_failed()
        deadline_s: float | None = None
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return action()
            except (ServerUnreachable, ServerBusy) as failure:
                now_s = time.monotonic()
                deadline_s = deadline_s or now_s + self._left_s
                is_late = now_s + pause_s > deadline_s or "final" in failure.__dict__
                if is_late or only_once or self._ended.is_set():
                    self._note(failure, is_late=is_late)
                    raise
            self._ended.wait(pause_s * self._jitter.uniform(0.75, 1.25))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @property
    def _left_s(self) -> float:
        if self.is_lost:
            return 0.0
        return self._longest_s if self._reached else min(FIRST_PATIENCE_S, self._longest_s)

    def _require_not_just_failed(self) -> None:
        failure = self._failure
        if failure is not None and time.monotonic() - self._failed_at_s < _QUIET_S:
            raise ServerUnreachable(str(failure)) from failure

    def _note(self, failure: ServerUnreachable | ServerBusy, *, is_late: bool) -> None:
        if isinstance(failure, ServerUnreachable):
            self._failure, self._failed_at_s = failure, time.monotonic()
            self._given_up = self._given_up or is_late
