"""Where blocking work is done: bounded pools of threads, so that the event loop never waits for a disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

T = TypeVar("T")

_UPLOADS = 16
_OTHERS = 16


class Threads:
    """Uploads wait for the disk and have a pool of their own, so that they keep nothing else from being answered."""

    def __init__(self, uploads: int = _UPLOADS, others: int = _OTHERS) -> None:
        self._uploads = CapacityLimiter(uploads)
        self._others = CapacityLimiter(others)

    async def upload(self, work: Callable[[], T]) -> T:
        return await run_sync(work, limiter=self._uploads)

    async def run(self, work: Callable[[], T]) -> T:
        return await run_sync(work, limiter=self._others)
