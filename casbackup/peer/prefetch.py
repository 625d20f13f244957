"""Threads that fetch what is going to be asked for."""

from __future__ import annotations

import contextlib
import queue
import threading

from casbackup.block.device import Closing
from casbackup.errors import CasbackupError
from casbackup.peer.chunkcache import ChunkCache
from casbackup.peer.segmentmap import SegmentMap
from casbackup.workers import worker_count

_MOST_WAITING = 64
"""Segments; further ones are not fetched ahead. Whoever needs them fetches them."""


class Prefetcher(Closing):
    """Fetches the chunks of segments into a cache, each segment's in the order in which they lie in the packs."""

    def __init__(self, cache: ChunkCache, *, threads: int | None = None) -> None:
        self._cache = cache
        self._wanted: queue.Queue[tuple[SegmentMap, int] | None] = queue.Queue(_MOST_WAITING)
        self._threads = [
            threading.Thread(target=self._work, name=f"prefetch-{number}", daemon=True)
            for number in range(threads or worker_count())
        ]
        self._stopping = False
        for thread in self._threads:
            thread.start()

    def want(self, where: SegmentMap, number: int) -> None:
        """Fetch a segment soon, if there is room for it in the queue."""
        with contextlib.suppress(queue.Full):
            self._wanted.put_nowait((where, number))

    def close(self) -> None:
        """Wait for what is being fetched; the rest is dropped."""
        self._stopping = True
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            if self._stopping:
                continue
            where, number = wanted
            with contextlib.suppress(CasbackupError):  # whoever reads it will meet the error
                self._cache.get(self._cache.absent(where.at(number).chunks()))
