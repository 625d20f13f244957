"""Blobs for many readers at once: what one of them is fetching, the others wait for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from casbackup.errors import DataDamage
from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.peer.api import Peer
from casbackup.peer.disk import verified


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
        self._coming: set[BlobId] = set()
        self._waiting = 0
        self._changed = threading.Condition()

    def get(self, ids: Sequence[BlobId]) -> dict[BlobId, Buffer | DataDamage]:
        """All of ``ids``, or the error in their place; those that nobody else is fetching are fetched together.

        Errors of the peer are raised to whoever asked it, not to those who waited: they ask themselves then.
        """
        found: dict[BlobId, Buffer | DataDamage] = {}
        wanted = list(dict.fromkeys(ids))
        while wanted:
            mine = self._claim(wanted, found)
            if mine:
                self._fetch(mine, found)
            wanted = [blob_id for blob_id in wanted if blob_id not in found]
        return found

    def absent(self, ids: Iterable[BlobId]) -> list[BlobId]:
        """Those of ``ids`` that are neither kept nor being fetched."""
        with self._changed:
            return [blob_id for blob_id in ids if blob_id not in self._kept and blob_id not in self._coming]

    def _claim(self, wanted: Sequence[BlobId], found: dict[BlobId, Buffer | DataDamage]) -> list[BlobId]:
        """Put what is kept into ``found``; return what the caller is to fetch. Waits if there is neither."""
        with self._changed:
            while True:
                mine: list[BlobId] = []
                before = len(found)
                for blob_id in wanted:
                    if (kept := self._kept.get(blob_id)) is not None:
                        self._kept.move_to_end(blob_id)
                        found[blob_id] = kept
                    elif blob_id not in self._coming:
                        mine.append(blob_id)
                if mine or len(found) > before:
                    self._coming.update(mine)
                    return mine
                self._waiting += 1
                self._changed.wait()
                self._waiting -= 1

    def _fetch(self, ids: Sequence[BlobId], found: dict[BlobId, Buffer | DataDamage]) -> None:
        try:
            for blob_id, record in self._peer.fetch(ids):
                plain = found[blob_id] = verified(self._peer.codec, record)
                self._arrived(blob_id, plain)
        finally:
            with self._changed:
                self._coming.difference_update(ids)
                self._changed.notify_all()

    def _arrived(self, blob_id: BlobId, plain: Buffer | DataDamage) -> None:
        with self._changed:
            self._coming.discard(blob_id)
            if not isinstance(plain, DataDamage) and blob_id not in self._kept:
                self._kept[blob_id] = plain
                self._size += len(plain)
            while self._size > self._capacity:
                _, dropped = self._kept.popitem(last=False)
                self._size -= len(dropped)
            if self._waiting:
                self._changed.notify_all()
