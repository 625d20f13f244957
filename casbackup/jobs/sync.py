"""The sync job: copy snapshots from one repository to another, moving only what is missing.

A copy has the same manifest, byte for byte, and so the same id, which covers the roots of all disks: two sites have the
same if their ids are the same. The session at the destination keeps what it asked about from a gc; a reading keeps a
snapshot at the source until it is copied.

Blobs and manifests go as they are stored. So both ends must have the same key, which nobody needs to have at hand
(``rekey`` is for two keys).

An interrupted sync leaves whole snapshots only. What was acknowledged is held by the parked session for a day, and not
sent again: the next sync finds it when it asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from casbackup.errors import (
    CasbackupError,
    DataDamage,
    ManifestDamaged,
    SnapshotNotFound,
    UsageError,
)
from casbackup.ids import ZERO_ID, BlobId
from casbackup.jobs.adopting import OF_THE_SNAPSHOT, Adopter
from casbackup.jobs.copying import Copier, Destination, Tally, Wanted, wanted_of
from casbackup.jobs.ratelimit import NO_LIMIT, RateLimit
from casbackup.jobs.same_key import require_same_key
from casbackup.jobs.sync_plan import SnapshotFilter, SyncPlan, plan_sync
from casbackup.jobs.sync_report import Outcome, SnapshotResult, SyncReport
from casbackup.jobs.sync_run import SyncRun
from casbackup.peer.api import Peer, PeerSession
from casbackup.progress import NoProgress, Progress
from casbackup.repository.adoption import Copy
from casbackup.repository.catalog import Snapshot
from casbackup.spec.record import Record
from casbackup.store.writer import NOTHING_STORED, StoredBytes

_REMEMBERED = 2**20
"""Blobs that a dry run remembers to have counted, 110 MB; beyond them, some may be counted twice."""

_EVERYTHING = SnapshotFilter()


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """What to copy. ``mirror``: also remove what the source no longer has, and take pins away that it has not."""

    chosen: SnapshotFilter = _EVERYTHING
    mirror: bool = False
    dry_run: bool = False


def sync(
    source: Peer,
    destination: Peer,
    request: SyncRequest,
    *,
    limit: RateLimit = NO_LIMIT,
    progress: Progress | None = None,
) -> SyncReport:
    """Copy what is meant and missing. A snapshot that cannot be copied is reported; the others are copied.

    :raise KeyMismatch: when the repositories do not have the same key. :raise UsageError: when a mirroring would
        remove everything, or too much because the source cannot be read.
    :raise CasbackupError: when an end fails altogether. What was copied until then is there.
    """
    require_same_key(source.config, destination.config)
    where = request.chosen.only_vm
    found, unreadable = source.survey(*where)
    there, _ = destination.survey(*where)
    require_readable(request, unreadable)
    plan = plan_sync(found, there, request.chosen, mirror=request.mirror)
    run = _Sync(source, destination, plan, limit, progress or NoProgress())
    if request.dry_run:
        run.estimate()
        return run.outcome.report(unreadable, None)
    run.copy()
    changed = run.outcome.change()
    after = destination.survey(*where)[0] if changed else there
    return run.outcome.report(unreadable, after)


def require_readable(request: SyncRequest, unreadable: Sequence[ManifestDamaged]) -> None:
    """:raise UsageError: when manifests of the source cannot be read, and what it lacks is to be removed."""
    if request.mirror and unreadable:
        raise UsageError(f"{len(unreadable)} manifests of the source cannot be read: it is not known what it still has")


class _Sync:
    """One run of a plan."""

    def __init__(self, source: Peer, destination: Peer, plan: SyncPlan, limit: RateLimit, progress: Progress) -> None:
        self._source = source
        self._destination = destination
        self._plan = plan
        self._limit = limit
        self._progress = progress
        self.outcome = SyncRun(destination, plan)

    def copy(self) -> None:
        """Copy what the plan says."""
        self._progress.start("copying", self._plan.size_bytes)
        self.outcome.copy(lambda waiting, session: self._run(waiting, session, Adopter(waiting, session.adopt_all)))
        self._progress.finish()

    def estimate(self) -> None:
        """Find out what copying would send. Leaves nothing behind."""
        if not self._plan.copy:
            return
        self._progress.start("looking", self._plan.size_bytes)
        first = self._plan.copy[0].manifest
        session = self._destination.open_session(first.namespace, first.vm)
        try:
            self._run(self._plan.copy, _Counting(session), None)
        finally:
            session.abort()
        self._progress.finish()

    def _run(self, snapshots: Sequence[Snapshot], session: Destination, adopter: Adopter | None) -> None:
        roots = dict.fromkeys(wanted.id for snapshot in snapshots for wanted in wanted_of(snapshot.manifest))
        missing = session.missing([root for root in roots if root != ZERO_ID])
        goals = [_SnapshotGoal(self._source, snapshot, adopter, self.outcome.note) for snapshot in snapshots]
        for goal in goals:
            self._progress.advance(done=goal.leave_out(missing))
        limit = NO_LIMIT if adopter is None else self._limit
        copier = Copier(self._source, session, limit=limit, progress=self._progress, only_count=adopter is None)
        with contextlib.ExitStack() as releasing:  # each of them, even if the source cannot be reached any more
            for goal in goals:
                releasing.callback(goal.release)
            copier.run(goals)


class _SnapshotGoal:
    """A snapshot on its way. ``adopter`` None: it is only looked at."""

    def __init__(
        self, source: Peer, snapshot: Snapshot, adopter: Adopter | None, note: Callable[[SnapshotResult], None]
    ) -> None:
        self.wanted: Sequence[Wanted] = wanted_of(snapshot.manifest)
        self._source = source
        self._snapshot = snapshot
        self._adopter = adopter
        self._note = note
        self._reading = contextlib.ExitStack()
        self._forgotten: SnapshotNotFound | None = None

    def leave_out(self, missing: set[BlobId]) -> int:
        """Want only what is missing; gives the bytes of disks that are not."""
        before = self.wanted
        self.wanted = [wanted for wanted in before if wanted.id in missing]
        return sum(wanted.span_bytes for wanted in before if wanted.id not in missing)

    def begin(self) -> None:
        try:
            if self.wanted:
                self._reading.enter_context(self._source.reading(self._snapshot))
        except SnapshotNotFound as error:
            self._forgotten, self.wanted = error, ()

    def end(self, tally: Tally, losses: Sequence[DataDamage]) -> None:
        self.release()
        error: CasbackupError | None = self._forgotten or _as_one(losses)
        if self._adopter is None:
            self._result(Outcome.PLANNED, tally, error)
            return
        try:
            copy = Copy(self._source.manifest(self._snapshot), self._snapshot.sidecar) if error is None else None
        except OF_THE_SNAPSHOT as failure:
            copy, error = None, failure
        if copy is None:
            self._result(Outcome.FAILED, tally, error)
            self._adopter.leave_out(self._snapshot)
        else:
            self._adopter.put(self._snapshot, copy, lambda refusal: self._result(Outcome.COPIED, tally, refusal))

    def release(self) -> None:
        """Let go of the source's snapshot. Twice is harmless."""
        self._reading.close()

    def _result(self, outcome: Outcome, tally: Tally, error: CasbackupError | None) -> None:
        self._note(SnapshotResult(self._snapshot, outcome if error is None else Outcome.FAILED, tally, error))


class _Counting:
    """Stands for a session in a dry run: keeps nothing, and says of nothing twice that it is missing."""

    def __init__(self, session: PeerSession) -> None:
        self._session = session
        self._counted: set[BlobId] = set()

    def missing(self, ids: Sequence[BlobId]) -> set[BlobId]:
        found = self._session.missing([blob_id for blob_id in ids if blob_id not in self._counted])
        if len(self._counted) < _REMEMBERED:
            self._counted |= found
        return found

    def send_soon(self, records: Sequence[Record], then: Callable[[StoredBytes], None]) -> None:
        then(NOTHING_STORED)


def _as_one(losses: Sequence[DataDamage]) -> DataDamage | None:
    """The damage that keeps a snapshot from being copied."""
    if not losses:
        return None
    more = f"; and {len(losses) - 1} more like this" if len(losses) > 1 else ""
    return type(losses[0])(f"{losses[0]}{more}")
