"""Carrying out a plan of a sync: what is the same whether blobs are copied as they are or made anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from casbackup.errors import CasbackupError, ClosureViolation, ManifestDamaged, SnapshotConflict
from casbackup.ids import SnapshotId
from casbackup.jobs.sync_plan import SyncPlan
from casbackup.jobs.sync_report import Outcome, SnapshotResult, SyncReport, proof_of
from casbackup.peer.api import Peer, PeerSession
from casbackup.repository.catalog import Snapshot

_ATTEMPTS = 3
"""A server that was restarted may have collected what it vouched for before: then all is asked anew."""


class SyncRun:
    """What became of each snapshot of a plan."""

    def __init__(self, destination: Peer, plan: SyncPlan) -> None:
        self._destination = destination
        self._plan = plan
        self._results: dict[SnapshotId, SnapshotResult] = {}
        for snapshot, other in plan.blocked:
            error = SnapshotConflict(f"the destination has another {snapshot.reference}, with the id {other.id[:16]}")
            self.note(SnapshotResult(snapshot, Outcome.FAILED, error=error))

    def note(self, result: SnapshotResult) -> None:
        self._results[result.snapshot.id] = result

    def copy(self, do: Callable[[Sequence[Snapshot], PeerSession], None]) -> None:
        """Let ``do`` copy, and note results of, all that the plan says, within a session of the destination."""
        for attempt in range(1, _ATTEMPTS + 1):
            waiting = [snapshot for snapshot in self._plan.copy if snapshot.id not in self._results]
            if not waiting:
                break
            try:
                with _session_for(self._destination, waiting[0]) as session:
                    do(waiting, session)
                    session.finish()
            except ClosureViolation:
                if attempt == _ATTEMPTS:
                    raise

    def change(self) -> bool:
        """Do what is not copying. Was anything changed at the destination, by this or by copying?"""
        for change in self._plan.changes:
            self._destination.annotate(change.snapshot, pinned=change.pinned, labels=change.labels, notes=change.notes)
        removed = self._removed
        if removed:
            self._destination.remove(removed)
        return bool(self._plan.copy or self._plan.changes or removed)

    def report(self, unreadable: Sequence[ManifestDamaged], after: Sequence[Snapshot] | None) -> SyncReport:
        """``after``: what the destination has now; None if ids prove nothing."""
        selected = self._plan.selected
        return SyncReport(
            results=tuple(self._results.get(s.id, SnapshotResult(s, Outcome.PRESENT)) for s in selected),
            changed=tuple(change.snapshot for change in self._plan.changes),
            removed=self._removed,
            spared=self._plan.spared,
            unreadable=tuple(unreadable),
            proof=None if after is None else proof_of(selected, after),
        )

    @property
    def _removed(self) -> tuple[Snapshot, ...]:
        has_failed = any(result.outcome is Outcome.FAILED for result in self._results.values())
        return () if has_failed else self._plan.remove


@contextlib.contextmanager
def _session_for(destination: Peer, snapshot: Snapshot) -> Iterator[PeerSession]:
    """A session named after the first snapshot to be copied. After an error, what it stored is held for a day."""
    session = destination.open_session(snapshot.manifest.namespace, snapshot.manifest.vm)
    try:
        yield session
    except BaseException:
        with contextlib.suppress(CasbackupError):
            session.flush()
        session.park()
        raise
