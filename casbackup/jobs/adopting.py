"""Making copied snapshots visible at the destination: many at once, and older ones of a VM before newer ones.

Whoever finishes a copy leaves it here. One worker at a time takes all that may be adopted by now and asks for it at
once, so batches are as large as the waiting made them: on a slow link few requests, on a quick one no delay.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from casbackup.errors import CasbackupError, DataDamage, ManifestDamaged, SnapshotConflict, SnapshotNotFound
from casbackup.ids import Namespace, SnapshotId, VmName
from casbackup.limits import MAX_ADOPTED
from casbackup.repository.adoption import Copy
from casbackup.repository.catalog import Snapshot

Settled = Callable[[CasbackupError | None], None]
"""Told once that a snapshot is visible, or why it cannot be."""

OF_THE_SNAPSHOT = (SnapshotConflict, SnapshotNotFound, ManifestDamaged, DataDamage)
"""What keeps one snapshot from being copied, and no other."""

_Adopt = Callable[[Sequence[Copy]], Sequence[Snapshot | CasbackupError]]


@dataclass(frozen=True, slots=True)
class _Ready:
    copy: Copy
    settled: Settled


class Adopter:
    """Safe from several threads."""

    def __init__(self, snapshots: Iterable[Snapshot], adopt: _Adopt) -> None:
        """``snapshots``: all that are to be adopted, of each VM the older ones first; each is put or left out once.

        ``adopt``: as ``PeerSession.adopt_all``.
        """
        self._adopt = adopt
        self._lock = threading.Lock()
        self._busy = False
        self._ready: dict[SnapshotId, _Ready | None] = {}
        self._waiting: dict[tuple[Namespace, VmName], deque[SnapshotId]] = {}
        for snapshot in snapshots:
            self._queue(snapshot).append(snapshot.id)

    def put(self, snapshot: Snapshot, copy: Copy, settled: Settled) -> None:
        """All that the snapshot needs was sent: make it visible when its turn comes. ``settled`` is called from any
        worker's ``put`` or ``leave_out``.

        :raise CasbackupError: what keeps more from being adopted than one snapshot.
        """
        self._note(snapshot, _Ready(copy, settled))

    def leave_out(self, snapshot: Snapshot) -> None:
        """It cannot be copied: those after it do not wait for it."""
        self._note(snapshot, None)

    def _note(self, snapshot: Snapshot, ready: _Ready | None) -> None:
        with self._lock:
            self._ready[snapshot.id] = ready
            if self._busy:
                return
            self._busy = True
        while batch := self._next():
            self._adopt_batch(batch)

    def _next(self) -> list[_Ready]:
        """What may be adopted now; if that is nothing, whoever comes next looks again."""
        batch: list[_Ready] = []
        with self._lock:
            for queue in self._waiting.values():
                while queue and queue[0] in self._ready and len(batch) < MAX_ADOPTED:
                    ready = self._ready.pop(queue.popleft())
                    if ready is not None:
                        batch.append(ready)
            self._busy = bool(batch)
        return batch

    def _adopt_batch(self, batch: list[_Ready]) -> None:
        """What comes after a copy that is refused is asked for again."""
        while batch:
            results = self._adopt([ready.copy for ready in batch])
            for ready, result in zip(batch, results, strict=False):
                error = result if isinstance(result, CasbackupError) else None
                if error is not None and not isinstance(error, OF_THE_SNAPSHOT):
                    raise error
                ready.settled(error)
            batch = batch[len(results) :]

    def _queue(self, snapshot: Snapshot) -> deque[SnapshotId]:
        return self._waiting.setdefault((snapshot.manifest.namespace, snapshot.manifest.vm), deque())
