"""A few threads that do the same thing until there is nothing left."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

_MOST = 8
_JOIN_S = 0.2


def worker_count() -> int:
    """One a processor, at least two (one waits for the disk while the other hashes), at most eight."""
    return max(2, min(_MOST, os.cpu_count() or 1))


def run_workers(work: Callable[[threading.Event], None], count: int) -> None:
    """Run ``work`` in ``count`` threads and wait for them. It should return soon once the event is set.

    The first error of any of them, or one that interrupts the waiting (a signal), sets the event and is raised
    when all have ended.
    """
    stop = threading.Event()
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work(stop)
        except BaseException as error:  # noqa: BLE001  handed to the waiting thread
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, name=f"worker-{n}", daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(_JOIN_S)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
