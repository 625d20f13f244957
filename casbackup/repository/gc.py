"""Garbage collection beside running backups: a pure plan, then its execution, in a fixed order.

    1. removals of snapshots that were cut short are made durable; sessions that nobody can resume are dropped;
    2. blobs that were marked as dying but are needed again are revived;
    3. unneeded blobs are marked as dying, with a new epoch: from now on ``missing`` names them;
    4. dying blobs that no active session can have been told about, nor about a node above them, leave the index;
    5. packs with nothing left are dropped; packs with much garbage, and crowds of small ones, are rewritten first.

A crash between any two steps leaves a sound repository and work for the next gc. Why no session can lose a blob is
shown in ``docs/architecture.md``; ``tests/reliability/test_model.py`` tries to find a counterexample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from casbackup.errors import IndexIncomplete, RepositoryBusy
from casbackup.ids import BlobId, PackId, SessionId
from casbackup.limits import INDEX_BATCH_ENTRIES
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.repository.indextable import Bools, IndexTable, Prefixes, contains, read_index
from casbackup.repository.mark import Marks, configs_of, mark, roots_of
from casbackup.repository.repack import repack
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import SessionKind, SessionRow
from casbackup.spec.indexdb import STATE_DAMAGED, PackRow, decode_entry, pack_key
from casbackup.spec.record import BlobKind
from casbackup.store.index import Index, Transaction
from casbackup.store.packfile import read_header

REPACK_GARBAGE = 0.25
"""A pack is rewritten when at least this part of it is garbage."""

_SMALL_PACK = 4
"""A pack below a fourth of the full size is small; four or more of them are merged."""


@dataclass(frozen=True, slots=True)
class GcPlan:
    """What gc would do. ``freed_bytes`` and ``pending_bytes`` are what the execution would report if nothing changed
    meanwhile. ``remove_dying`` can go in any case, ``remove_if_quiet`` and what is in ``doom`` only if no backup was
    active, or is opened or resumed meanwhile.
    """

    attach_number: int
    expired: tuple[SessionRow, ...]
    revive: list[BlobId]
    doom: list[BlobId]
    remove_dying: list[BlobId]
    remove_if_quiet: list[BlobId]
    may_remove_doomed: bool
    drop: tuple[int, ...]
    rewrite: tuple[int, ...]
    orphans: tuple[PackId, ...]
    live_blobs: int
    freed_bytes: int
    pending_bytes: int
    total_bytes: int
    repack_garbage: float

    @property
    def removed_blobs(self) -> int:
        quiet = len(self.remove_if_quiet) + len(self.doom) if self.may_remove_doomed else 0
        return len(self.remove_dying) + quiet


@dataclass(slots=True)
class GcReport:
    """What gc did. Pending bytes are garbage that is still there: held by running backups, or spread thinly over
    packs.
    """

    freed_bytes: int = 0
    pending_bytes: int = 0
    removed_blobs: int = 0
    dropped_packs: int = 0
    rewritten_packs: int = 0
    removed_orphans: int = 0
    expired_sessions: int = 0
    notes: list[str] = field(default_factory=list)


def plan_gc(
    repository: Repository, *, repack_garbage: float = REPACK_GARBAGE, progress: Progress | None = None
) -> GcPlan:
    """Look at everything, change nothing.

    :raise IndexIncomplete: when a snapshot needs something that the index does not have: nothing must be deleted then.
    """
    sessions = repository.sessions
    now_ms = repository.clock.now_ms()
    view = _view(repository)
    expired = [row for row in view.sessions if row.id not in view.active and sessions.is_over(row, now_ms)]
    kept = [row for row in view.sessions if row not in expired]
    backups = [row for row in kept if row.kind == SessionKind.BACKUP and row.id in view.active]
    table = view.table
    needed = contains(_marked(repository, view, kept, progress or NoProgress()).prefixes, table.prefixes)
    needed |= np.isin(table.values["session"], [row.number for row in kept])
    dying = table.values["epoch"] > 0
    oldest = min((row.epoch for row in backups), default=np.iinfo(np.uint32).max)
    garbage = dying & ~needed
    doomed = ~dying & ~needed
    removable = garbage & (table.values["epoch"] < oldest)
    if removable.any():
        removable &= ~_held(repository, table, ~needed & ~removable)
    gone = removable if backups else garbage | doomed
    packs = _plan_packs(repository, view, needed, gone, {row.number for row in kept}, repack_garbage)
    return GcPlan(
        attach_number=view.attach_number,
        expired=tuple(expired),
        revive=table.ids_where(dying & needed),
        doom=table.ids_where(doomed),
        remove_dying=table.ids_where(removable),
        remove_if_quiet=table.ids_where(garbage & ~removable),
        may_remove_doomed=not backups,
        drop=tuple(packs.drop),
        rewrite=tuple(packs.rewrite),
        orphans=tuple(_orphans(repository, {row.id for row in expired})),
        live_blobs=int(needed.sum()),
        freed_bytes=packs.freed_bytes,
        pending_bytes=packs.pending_bytes,
        total_bytes=sum(view.sizes.values()),
        repack_garbage=repack_garbage,
    )


def execute_gc(repository: Repository, plan: GcPlan, progress: Progress | None = None) -> GcReport:
    """Carry out a plan; what changed since it was made is looked at again in each transaction.

    :raise RepositoryBusy: when a session of the plan was resumed meanwhile.
    """
    repository.require_writable()
    report = GcReport(expired_sessions=len(plan.expired))
    repository.catalog.finish_removals()
    _expire(repository, plan.expired)
    _revive(repository, plan.revive)
    _doom(repository, plan.doom)
    removable = list(plan.remove_dying)
    if plan.may_remove_doomed and _quiet(repository, plan):
        removable += plan.remove_if_quiet + plan.doom
    report.removed_blobs = _remove(repository, removable)
    if report.removed_blobs or plan.revive or plan.doom or plan.drop or plan.rewrite:
        _sweep_packs(repository, plan, report, progress or NoProgress())
    else:  # nothing has changed what packs are good for: reading the whole index again would show the same
        report.pending_bytes = plan.pending_bytes
    _remove_orphans(repository, plan, report)
    return report


@dataclass(frozen=True, slots=True)
class _View:
    """The repository as gc sees it, read in the order of the fields. That matters: a session that begins later than
    ``sessions`` was read has a number above ``last_session``. What a session stored that is not in ``active`` is in
    ``table``, and its snapshot, if it made one, in ``snapshots``. What these need is in ``table``.
    """

    attach_number: int
    last_session: int
    sessions: list[SessionRow]
    active: frozenset[SessionId]
    snapshots: list[Snapshot]
    packs: dict[int, PackRow]
    sizes: dict[PackId, int]
    table: IndexTable


def _view(repository: Repository) -> _View:
    with repository.index.read() as txn:
        attach_number = repository.index.number(txn, "attach")
        last_session = repository.index.number(txn, "session")
        sessions = repository.sessions.rows(txn)
    active = frozenset(row.id for row in sessions if repository.sessions.is_active(row))
    snapshots = repository.catalog.all()
    packs = repository.store.pack_rows()
    sizes = {info.pack: info.size_bytes for info in repository.store.storage.list()}
    table = read_index(repository.index)
    return _View(attach_number, last_session, sessions, active, snapshots, packs, sizes, table)


def _held(repository: Repository, table: IndexTable, staying: Bools) -> Bools:
    """Rows below garbage nodes that stay in the index for now.

    A session may have been told of such a node and so of all below it, however old the marks of these are: the node may
    have been stored, or marked, after them.
    """
    nodes = table.ids_where(staying & (table.values["kind"] == BlobKind.NODE))
    return contains(mark(repository.store, nodes).prefixes, table.prefixes)


def _marked(repository: Repository, view: _View, kept: Sequence[SessionRow], progress: Progress) -> Marks:
    """Mark what snapshots, readers and the nodes of sessions need.

    Readers may lack something: one that came for a snapshot that was forgotten and collected is about to notice that.
    """
    table, snapshots = view.table, view.snapshots
    own = (table.values["kind"] == BlobKind.NODE) & np.isin(table.values["session"], [row.number for row in kept])
    pins = [pin for row in kept for pin in row.pins]
    entries = repository.store.entries(pins)
    roots = roots_of(snapshots)
    pinned_nodes = [pin for pin in pins if pin in entries and entries[pin].kind == BlobKind.NODE]
    others = set(pinned_nodes) - set(roots)

    def visited(nodes: int) -> None:
        progress.advance(nodes=nodes)

    progress.start("marking", None)
    marks = mark(repository.store, [*roots, *table.ids_where(own)], configs_of(snapshots), visited)
    _require_complete(repository.index, table, marks)
    if pins:
        marks.prefixes = np.union1d(marks.prefixes, mark(repository.store, others, pins, visited).prefixes)
    progress.finish()
    return marks


def _require_complete(index: Index, table: IndexTable, marks: Marks) -> None:
    """Whatever is needed must be in the index, if only as known to be damaged: else the index, or half of the packs,
    is not the right one.
    """
    damaged = set(table.ids_where((table.values["state"] & STATE_DAMAGED) > 0))
    unknown = [node for node in marks.unreadable if node not in damaged]
    if unknown:
        first = unknown[0].hex()[:16]
        raise IndexIncomplete(f"gc stops: {len(unknown)} tree nodes cannot be read, the first is {first}")
    nonzero = marks.prefixes[marks.prefixes != 0]
    absent = _still_absent(index, nonzero[~contains(np.sort(table.prefixes), nonzero)])
    if absent:
        raise IndexIncomplete(f"gc stops: the index lacks {absent} blobs that snapshots need")


def _still_absent(index: Index, prefixes: Prefixes) -> int:
    """How many of these are not in the index now either: what was committed since the table was read is."""
    count = 0
    with index.read() as txn, txn.cursor(db=index.blobs) as cursor:
        for prefix in prefixes.tolist():
            key = int(prefix).to_bytes(8, "little")
            count += not (cursor.set_range(key) and bytes(cursor.key()).startswith(key))
    return count


@dataclass(slots=True)
class _PackPlan:
    drop: list[int] = field(default_factory=list)
    rewrite: list[int] = field(default_factory=list)
    freed_bytes: int = 0
    pending_bytes: int = 0


def _plan_packs(
    repository: Repository, view: _View, needed: Bools, gone: Bools, kept_sessions: set[int], repack_garbage: float
) -> _PackPlan:
    """What to do with each pack once the blobs ``gone`` are out of the index. Packs of unfinished sessions are left
    alone.
    """
    plan = _PackPlan()
    kept, useful = _bytes_by_pack(view.table, ~gone), _bytes_by_pack(view.table, needed)
    small: list[tuple[int, int]] = []
    for number, row in view.packs.items():
        size = view.sizes.get(row.pack)
        if size is None or row.session in kept_sessions or row.session > view.last_session:
            continue
        used = int(kept[number]) if number < len(kept) else 0
        garbage = max(0, size - used - _overhead(used))
        if used == 0:
            plan.drop.append(number)
            plan.freed_bytes += size
        elif garbage >= repack_garbage * size:
            plan.rewrite.append(number)
            plan.freed_bytes += garbage
        else:
            plan.pending_bytes += max(0, size - int(useful[number]) - _overhead(used)) if number < len(useful) else size
            if size < repository.config.pack_bytes // _SMALL_PACK:
                small.append((number, garbage))
    if len(small) >= _SMALL_PACK:
        plan.rewrite += [number for number, _ in small]
        plan.freed_bytes += sum(garbage for _, garbage in small)
    return plan


def _overhead(used_bytes: int) -> int:
    """Headers and footers are no garbage; an estimate, generous to packs of small blobs."""
    return 256 + used_bytes // 20


def _bytes_by_pack(table: IndexTable, rows: Bools) -> npt.NDArray[Any]:
    """Bytes of the records of these rows, by pack number."""
    return np.bincount(table.values["pack"][rows], table.records_bytes()[rows])


def _orphans(repository: Repository, expired: set[SessionId]) -> list[PackId]:
    """Packs that the index does not know and whose writer is gone.

    First the packs are listed, then sessions, then the packs of the index: a writer that is not in the second list
    has ended, and has what it finished in the third.
    """
    listed = [info.pack for info in repository.store.storage.list()]
    with repository.index.read() as txn:
        sessions = {row.id for row in repository.sessions.rows(txn)} - expired
    known = {row.pack for row in repository.store.pack_rows().values()}
    found: list[PackId] = []
    for pack in listed:
        if pack in known:
            continue
        header = read_header(repository.store.storage, pack)
        if not sessions or (header is not None and header.session not in sessions):
            found.append(pack)
    return found


def _expire(repository: Repository, rows: Sequence[SessionRow]) -> None:
    def drop(txn: Transaction) -> None:
        for row in rows:
            if repository.sessions.is_active(row):
                raise RepositoryBusy(f"session {row.id} was resumed while gc was planned")
            repository.sessions.drop(txn, row.id)

    if rows:
        repository.index.write(drop)
        for row in rows:
            repository.fs.remove(repository.layout.session_lock(row.id))


def _revive(repository: Repository, ids: Sequence[BlobId]) -> None:
    def change(txn: Transaction, ids: Sequence[BlobId]) -> int:
        return _set_epoch(repository, txn, ids, 0)

    _in_batches(repository.index, ids, change)


def _doom(repository: Repository, ids: Sequence[BlobId]) -> None:
    def change(txn: Transaction, ids: Sequence[BlobId]) -> int:
        return _set_epoch(repository, txn, ids, repository.index.next_number(txn, "epoch"))

    _in_batches(repository.index, ids, change)


def _set_epoch(repository: Repository, txn: Transaction, ids: Sequence[BlobId], epoch: int) -> int:
    """Mark living blobs as dying in ``epoch``, or, with 0, dying ones as living; returns how many."""
    changed = 0
    for blob_id in ids:
        value = txn.get(blob_id, db=repository.index.blobs)
        if value is None:
            continue
        entry = decode_entry(value)
        if (entry.dying_epoch == 0) == (epoch > 0):
            txn.put(blob_id, entry._replace(dying_epoch=epoch).encode(), db=repository.index.blobs)
            changed += 1
    return changed


def _quiet(repository: Repository, plan: GcPlan) -> bool:
    """Has no backup been opened or resumed since before marking? Asked when all is marked as dying: later ones are
    not told of it.
    """
    with repository.index.read() as txn:
        return repository.index.number(txn, "attach") == plan.attach_number


def _remove(repository: Repository, ids: Sequence[BlobId]) -> int:
    """Remove entries that are still dying: one that was stored again meanwhile is not."""

    def change(txn: Transaction, ids: Sequence[BlobId]) -> int:
        removed = 0
        for blob_id in ids:
            value = txn.get(blob_id, db=repository.index.blobs)
            if value is not None and decode_entry(value).dying_epoch:
                txn.delete(blob_id, db=repository.index.blobs)
                txn.delete(blob_id, db=repository.index.outlines)
                removed += 1
        return removed

    return _in_batches(repository.index, ids, change)


def _sweep_packs(repository: Repository, plan: GcPlan, report: GcReport, progress: Progress) -> None:
    """Drop and rewrite packs by what the index says now, not by what the plan hoped for."""
    packs, rows, sizes, moving = _sweep_plan(repository, plan.repack_garbage)
    report.pending_bytes = packs.pending_bytes
    for number in packs.drop:
        drop_pack(repository, number, rows[number])
        report.dropped_packs += 1
        report.freed_bytes += sizes[rows[number].pack]
    if packs.rewrite:
        progress.start("rewriting packs", sum(sizes[rows[number].pack] for number in packs.rewrite))
        outcome = repack(repository, moving, {n: rows[n] for n in packs.rewrite}, progress)
        progress.finish()
        for number in outcome.emptied:
            drop_pack(repository, number, rows[number])
            report.freed_bytes += sizes[rows[number].pack]
        report.freed_bytes -= outcome.written_bytes
        report.rewritten_packs = len(outcome.emptied)
        report.notes += outcome.notes


def _sweep_plan(
    repository: Repository, repack_garbage: float
) -> tuple[_PackPlan, dict[int, PackRow], dict[PackId, int], IndexTable]:
    """The plan, the rows and sizes of packs, and of the table only what is to be moved: the whole of it can go."""
    view = _view(repository)
    useful = view.table.values["epoch"] == 0
    nothing = np.zeros(len(view.table), np.bool_)
    kept = {row.number for row in view.sessions}
    packs = _plan_packs(repository, view, useful, nothing, kept, repack_garbage)
    moving = view.table.where(np.isin(view.table.values["pack"], packs.rewrite))
    return packs, view.packs, view.sizes, moving


def _remove_orphans(repository: Repository, plan: GcPlan, report: GcReport) -> None:
    still = set(_orphans(repository, set()))
    for orphan in plan.orphans:
        if orphan in still:
            report.freed_bytes += repository.store.storage.size_bytes(orphan)
            repository.store.storage.delete(orphan)
            report.removed_orphans += 1


def drop_pack(repository: Repository, number: int, row: PackRow) -> None:
    """Remove a pack that no entry names: first from the index, then its file. A crash in between leaves an orphan."""
    repository.index.write(lambda txn: txn.delete(pack_key(number), db=repository.index.packs))
    repository.store.storage.delete(row.pack)


class _Change(Protocol):
    def __call__(self, txn: Transaction, ids: Sequence[BlobId]) -> int: ...


def _in_batches(index: Index, ids: Sequence[BlobId], change: _Change) -> int:
    """Change some ids a transaction, so that backups get their turn; returns the sum of what ``change`` gives."""
    total = 0
    for start in range(0, len(ids), INDEX_BATCH_ENTRIES):
        batch = ids[start : start + INDEX_BATCH_ENTRIES]
        total += index.write(partial(change, ids=batch))
        index.release_pages()
    return total
