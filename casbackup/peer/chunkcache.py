"""Blobs for many readers at once: what one of them is fetching, the others wait for."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from casbackup.errors import DataDamage
from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.peer.api import Peer
from casbackup.peer.disk import verified

_HAND_OVER_S = 0.005
"""What arrives within this time of other blobs is handed over with the next: waking readers for each costs more than
fetching it.
"""


class ChunkCache:
    """Verified plain bytes of blobs, the least recently used dropped first. Safe from any number of threads.

    Like ``BlobCache``, but nothing is fetched twice at the same time, and a reader gets a blob as soon as it has
    arrived, though whoever fetches it had asked for more.
    """

    def __init__(self, peer: Peer, capacity_bytes: int) -> None:
        """``capacity_bytes``: for what is kept; what is being fetched and used comes on top."""
        self._peer = peer
        self._capacity = capacity_bytes
        self._size = 0
        self._kept: OrderedDict[BlobId, Buffer] = OrderedDict()
        self._coming: dict[BlobId, list[_Waiter]] = {}
        self._lock = threading.Lock()

    def get(self, ids: Sequence[BlobId]) -> dict[BlobId, Buffer | DataDamage]:
        """All of ``ids``, or the error in their place; those that nobody else is fetching are fetched together.

        Errors of the peer are raised to whoever asked it, not to those who waited: they ask themselves then.
        """
        found: dict[BlobId, Buffer | DataDamage] = {}
        wanted = list(dict.fromkeys(ids))
        while wanted:
            mine, waiter = self._claim(wanted, found)
            if mine:
                self._fetch(mine, found)
            if waiter.missing:
                waiter.ready.acquire()
            wanted = [blob_id for blob_id in wanted if blob_id not in found]
        return found

    def absent(self, ids: Iterable[BlobId]) -> list[BlobId]:
        """Those of ``ids`` that are neither kept nor being fetched."""
        with self._lock:
            return [blob_id for blob_id in ids if blob_id not in self._kept and blob_id not in self._coming]

    def _claim(
        self, wanted: Sequence[BlobId], found: dict[BlobId, Buffer | DataDamage]
    ) -> tuple[list[BlobId], _Waiter]:
        """Put what is kept into ``found``; what the caller is to fetch, and what waits for the rest."""
        mine: list[BlobId] = []
        waiter = _Waiter(found)
        with self._lock:
            for blob_id in wanted:
                if (kept := self._kept.get(blob_id)) is not None:
                    self._kept.move_to_end(blob_id)
                    found[blob_id] = kept
                elif (waiters := self._coming.get(blob_id)) is not None:
                    waiters.append(waiter)
                    waiter.missing += 1
                else:
                    self._coming[blob_id] = []
                    mine.append(blob_id)
        return mine, waiter

    def _fetch(self, ids: Sequence[BlobId], found: dict[BlobId, Buffer | DataDamage]) -> None:
        coming, arrived = set(ids), list[BlobId]()
        handed_s = 0.0
        try:
            for blob_id, record in self._peer.fetch(ids):
                plain = verified(self._peer.codec, record)
                # A part of what was read together would keep all of it.
                found[blob_id] = plain if isinstance(plain, DataDamage) else bytes(plain)
                arrived.append(blob_id)
                now_s = time.monotonic()
                if now_s - handed_s >= _HAND_OVER_S:
                    self._hand_over(arrived, found)
                    coming.difference_update(arrived)
                    arrived, handed_s = [], now_s
        finally:
            self._hand_over(arrived, found)
            self._give_up(coming.difference(arrived))

    def _hand_over(self, arrived: Sequence[BlobId], found: Mapping[BlobId, Buffer | DataDamage]) -> None:
        with self._lock:
            for blob_id in arrived:
                plain = found[blob_id]
                for waiter in self._coming.pop(blob_id):
                    waiter.found[blob_id] = plain
                    waiter.count_down()
                if not isinstance(plain, DataDamage):
                    self._keep(blob_id, plain)

    def _give_up(self, ids: Iterable[BlobId]) -> None:
        with self._lock:
            for blob_id in ids:
                for waiter in self._coming.pop(blob_id):
                    waiter.count_down()

    def _keep(self, blob_id: BlobId, plain: Buffer) -> None:
        self._kept[blob_id] = plain
        self._size += len(plain)
        while self._size > self._capacity:
            _, dropped = self._kept.popitem(last=False)
            self._size -= len(dropped)


class _Waiter:
    """A reader that waits for what others fetch. The cache's lock guards it.

    It is woken once, when it has all, and not for each blob.
    """

    __slots__ = ("found", "missing", "ready")

    def __init__(self, found: dict[BlobId, Buffer | DataDamage]) -> None:
        self.found = found
        self.missing = 0
        self.ready = threading.Lock()
        self.ready.acquire()

    def count_down(self) -> None:
        """One is here, or will not come."""
        self.missing -= 1
        if not self.missing:
            self.ready.release()
