"""Lets calls through, or holds them back for a moment while none is under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """Open to any number of threads; who closes it waits until all have come out and keeps others out."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Be inside during the block; waits while the gate is closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if not self._inside:
                    self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self, timeout_s: float) -> Iterator[None]:
        """Nobody is inside during the block. Not to be used by somebody who is.

        :raise TimeoutError: when not all came out within ``timeout_s``; the gate is open again then.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._inside, timeout_s):
                    raise TimeoutError("writes that are under way do not end")
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()
