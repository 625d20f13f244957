"""The snapshots that are being read over REST. They stay open for a while: opening one writes to the index, and who
reads at random comes back soon.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from casbackup.errors import ServerBusy
from casbackup.ids import SnapshotId
from casbackup.limits import MAX_REST_READERS
from casbackup.peer.api import Peer
from casbackup.peer.served import ReadPool, ServedSnapshot
from casbackup.repository.catalog import Snapshot

_IDLE_S = 30.0
"""How long a snapshot stays open that nobody reads."""
_MOST_IDLE = 4

_log = structlog.get_logger("casbackup.server")


@dataclass(slots=True)
class _Entry:
    served: ServedSnapshot
    users: int = 0
    left_s: float = 0.0


class OpenSnapshots:
    """Of one repository. Safe from several threads."""

    def __init__(
        self,
        peer: Peer,
        cache_bytes: int,
        current: Callable[[Snapshot], Snapshot | None],
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``cache_bytes``: for chunks of all of them together. ``current``: quickly, a snapshot as it is now, None when
        it is gone.
        """
        self._peer = peer
        self._cache_bytes = cache_bytes
        self._current = current
        self._now_s = now_s
        self._pool: ReadPool | None = None
        self._open: OrderedDict[SnapshotId, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def acquire(self, snapshot: Snapshot) -> Lease:
        """Open it, or share it with who has it open. Its data stays until ``Lease.end``, even if it is forgotten.

        :raise ServerBusy: when there are too many readers. :raise SnapshotNotFound: when it was forgotten just now.
        """
        with self._lock:
            if sum(entry.users for entry in self._open.values()) >= MAX_REST_READERS:
                raise ServerBusy("too many downloads are under way")
            entry = self._open.get(snapshot.id)
            if entry is None:
                entry = self._open[snapshot.id] = _Entry(ServedSnapshot(self._shared(), snapshot, report=_complain))
            self._open.move_to_end(snapshot.id)
            entry.users += 1
            self._close([e for e in self._idle() if e is not entry][:-_MOST_IDLE])
            return Lease(entry.served, self._leave(entry))

    def known(self, id_text: str) -> Snapshot | None:
        """The snapshot with this id, if it is open and still there, as it is now."""
        with self._lock:
            entry = self._open.get(SnapshotId(id_text))
        return None if entry is None else self._current(entry.served.snapshot)

    def close_idle(self, idle_s: float = _IDLE_S) -> None:
        with self._lock:
            limit_s = self._now_s() - idle_s
            self._close([entry for entry in self._idle() if entry.left_s < limit_s])

    def close(self) -> None:
        """Nobody reads any more."""
        with self._lock:
            self._close(list(self._open.values()))
            if self._pool is not None:
                self._pool.close()

    def _shared(self) -> ReadPool:
        if self._pool is None:
            self._pool = ReadPool(self._peer, self._cache_bytes)
        return self._pool

    def _idle(self) -> list[_Entry]:
        return [entry for entry in self._open.values() if not entry.users]

    def _close(self, entries: list[_Entry]) -> None:
        for entry in entries:
            del self._open[entry.served.snapshot.id]
            entry.served.close()

    def _leave(self, entry: _Entry) -> Callable[[], None]:
        def leave() -> None:
            with self._lock:
                entry.users -= 1
                entry.left_s = self._now_s()

        return leave


class Lease:
    """The right to read an open snapshot until ``end``, which is quick and may be called twice."""

    def __init__(self, served: ServedSnapshot, leave: Callable[[], None]) -> None:
        self.served = served
        self._ending = contextlib.ExitStack()
        self._ending.callback(leave)

    def end(self) -> None:
        self._ending.close()


def _complain(text: str) -> None:
    _log.error("a disk cannot be read", problem=text)
