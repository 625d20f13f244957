"""A few threads that do the same thing until there is nothing left."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

_MOST = 8
_JOIN_S = 0.2


def worker_count() -> int:
    """One a processor, at least two (one waits for the disk while the other hashes), at most eight."""
    return max(2, min(_MOST, os.cpu_count() or 1))


class Crew:
    """Threads that run ``work`` while the caller does something else.

    ``work`` should return soon once the event that it is given is set. That happens when any of the threads fails,
    and when the context ends with an error or is left before ``join``.
    """

    def __init__(self, work: Callable[[threading.Event], None], count: int) -> None:
        self._work = work
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._guarded, name=f"worker-{n}", daemon=True) for n in range(count)]

    def check(self) -> None:
        """Raise the first error of any of them, if there is one."""
        if self._failures:
            raise self._failures[0]

    def join(self) -> None:
        """Wait for all, and raise the first error of any of them."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_JOIN_S)
        self.check()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _guarded(self) -> None:
        try:
            self._work(self._stop)
        except BaseException as error:  # noqa: BLE001  handed to the waiting thread
            self._failures.append(error)
            self._stop.set()


def run_workers(work: Callable[[threading.Event], None], count: int) -> None:
    """Run ``work`` in ``count`` threads and wait for them. It should return soon once the event is set.

    The first error of any of them, or one that interrupts the waiting (a signal), sets the event and is raised
    when all have ended.
    """
    with Crew(work, count) as crew:
        crew.join()
