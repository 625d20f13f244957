"""What a job is to do, and doing it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import tzinfo
from typing import NamedTuple

from casbackup.errors import DamageFound, SyncIncomplete, UsageError
from casbackup.jobs.sync import SyncRequest, sync
from casbackup.jobs.sync_plan import SnapshotFilter
from casbackup.peer.api import Peer
from casbackup.peer.http.address import is_address, parse_address
from casbackup.peer.http.patience import PATIENCE_S
from casbackup.peer.http.peer import HttpPeer
from casbackup.peer.http.transport import Credentials
from casbackup.peer.local import LocalPeer
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.gc import execute_gc, plan_gc
from casbackup.repository.repository import Repository
from casbackup.repository.retention import KeepPolicy, plan_forget
from casbackup_server.jobs.job import JobKind
from casbackup_server.jobs.progress import JobProgress

_LEAVING_S = 5.0
"""How long a sync that was cancelled waits for what is under way."""


class Outcome(NamedTuple):
    """``result``: what was done, in a line."""

    result: str
    pending_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """``name`` is for people; ``run`` does it, and raises what it fails with."""

    name: str
    kind: JobKind
    run: Callable[[Repository, JobProgress], Outcome]
    cron: str | None = None


def gc_task(name: str = "gc", cron: str | None = None) -> Task:
    def run(repository: Repository, progress: JobProgress) -> Outcome:
        with repository.maintenance():
            report = execute_gc(repository, plan_gc(repository, progress=progress), progress)
        for note in report.notes:
            progress.note(note)
        freed = f"freed {report.freed_bytes} bytes: {report.removed_blobs} blobs, {report.dropped_packs} packs dropped"
        return Outcome(f"{freed}, {report.rewritten_packs} rewritten", report.pending_bytes)

    return Task(name, JobKind.GC, run, cron)


def check_task(options: CheckOptions, name: str = "check", cron: str | None = None) -> Task:
    def run(repository: Repository, progress: JobProgress) -> Outcome:
        with repository.maintenance():
            report = check(repository, options, progress)
        for finding in report.findings:
            progress.note(f"{finding.severity}: {finding.object}: {finding.message}")
        if report.damaged:
            raise DamageFound(f"damage was found; it affects {len({a.snapshot.id for a in report.affected})} snapshots")
        return Outcome(f"no damage: {report.snapshots} snapshots, {report.blobs} blobs, {report.packs} packs")

    return Task(name, JobKind.CHECK, run, cron)


def forget_task(policy: KeepPolicy, zone: tzinfo, name: str = "forget", cron: str | None = None) -> Task:
    def run(repository: Repository, progress: JobProgress) -> Outcome:
        peer = LocalPeer(repository)
        decisions = plan_forget(peer.snapshots(), policy, zone, now_ms=repository.clock.now_ms())
        removed = [decision.snapshot for decision in decisions if not decision.keep]
        progress.require_going()
        peer.remove(removed)
        for snapshot in removed:
            progress.note(f"forgotten: {snapshot.reference}")
        return Outcome(f"forgot {len(removed)} of {len(decisions)} snapshots")

    return Task(name, JobKind.FORGET, run, cron)


def default_tasks() -> list[Task]:
    """What may always be asked for."""
    return [gc_task(), check_task(CheckOptions())]


@dataclass(frozen=True, slots=True)
class OtherEnd:
    """Where a sync goes to, or comes from: a folder or an address."""

    place: str
    is_source: bool
    token_file: str | None = None
    cacert: str | None = None
    patience_s: float = PATIENCE_S


def sync_task(name: str, end: OtherEnd, chosen: SnapshotFilter, *, mirror: bool, cron: str | None = None) -> Task:
    def run(repository: Repository, progress: JobProgress) -> Outcome:
        with _opened(end, progress) as other:
            here: Peer = LocalPeer(repository)
            source, destination = (other, here) if end.is_source else (here, other)
            report = sync(source, destination, SyncRequest(chosen, mirror), progress=progress)
        progress.require_going()
        for result in report.results:
            progress.note(f"{result.outcome.value}: {result.snapshot.reference} {result.error or ''}".rstrip())
        if not report.is_complete:
            raise SyncIncomplete(f"not copied: {len(report.failed) + len(report.unreadable)} snapshots")
        return Outcome(f"{len(report.results)} snapshots, sent {report.total.stored_bytes} bytes")

    return Task(name, JobKind.SYNC, run, cron)


@contextlib.contextmanager
def _opened(end: OtherEnd, progress: JobProgress) -> Iterator[Peer]:
    if is_address(end.place):
        credentials = Credentials(_token(end.token_file), end.cacert)
        with HttpPeer(parse_address(end.place), credentials, patience_s=end.patience_s) as peer:
            progress.on_cancel(lambda: peer.give_up(_LEAVING_S))
            yield peer
        return
    with Repository.open(end.place) as repository:
        yield LocalPeer(repository)


def _token(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token file {path} cannot be read: {error}") from error
