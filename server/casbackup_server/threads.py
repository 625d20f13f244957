"""Where blocking work is done: bounded pools of threads, so that the event loop never waits for a disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from casbackup.workers import worker_count

T = TypeVar("T")

_UPLOADS = 16
_OTHERS = 16


class Threads:
    """Uploads wait for the disk and have a pool of their own, so that they keep nothing else from being answered.

    ``computing`` is held by an upload that verifies: more of them at once than there are processors would only be in
    each other's way.
    """

    def __init__(self, uploads: int = _UPLOADS, others: int = _OTHERS) -> None:
        self.computing = threading.BoundedSemaphore(worker_count())
        self._uploads = CapacityLimiter(uploads)
        self._others = CapacityLimiter(others)

    async def upload(self, work: Callable[[], T]) -> T:
        return await run_sync(work, limiter=self._uploads)

    async def run(self, work: Callable[[], T]) -> T:
        return await run_sync(work, limiter=self._others)
