"""Signs of life for what a server keeps for this client: sessions and readings."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from casbackup.errors import CasbackupError

INTERVAL_S = 10.0
"""A server gives up on whoever has been silent for several of these."""


class Heartbeat:
    """Calls what was added every ``INTERVAL_S`` seconds, in a thread of its own that runs while there is something."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._beats: dict[object, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._running = False

    def add(self, key: object, beat: Callable[[], None]) -> None:
        """``beat`` should be quick; an error of casbackup in it is of no consequence."""
        with self._changed:
            self._beats[key] = beat
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def remove(self, key: object) -> None:
        """Removing what is absent is not an error."""
        with self._changed:
            self._beats.pop(key, None)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._beats or not self._changed.wait_for(lambda: not self._beats, self._interval_s):
                    beats = list(self._beats.values())
                else:
                    beats = []
                if not beats:
                    self._running = False
                    return
            for beat in beats:
                with contextlib.suppress(CasbackupError):
                    beat()
