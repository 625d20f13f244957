"""Backup sessions: what a writer was told exists stays until the session ends, without clocks and without stopping
gc.

A session has a row in the index and, while somebody works on it, a file lock that ends with the process. It is
*active* while the lock is held; otherwise it is *parked* and can be resumed by its id until gc gives it up
(``LEASE_S`` after its last sign of life; a jump of the clock can only cost the resuming, never data, because an
active session is told by its lock).

The rules that keep gc and sessions apart (``docs/architecture.md`` proves them):

* One counter, the epoch, goes up with every opening or resuming of a session and with every transaction in which gc
  marks garbage as dying; each keeps its number. So a session was opened before a blob was marked if and only if its
  epoch is smaller.
* A blob that is marked as dying is ``missing`` to every question. gc removes it only when no active session is older
  than the mark: none can have been told of it. A resumed session gets a new epoch, and asks anew.
* Blobs that a session has stored itself, and all that tree nodes among them name, are kept while its row exists.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import msgpack

from casbackup.errors import (
    CasbackupError,
    ClosureViolation,
    CommitOutdated,
    SessionBusy,
    SessionNotFound,
    SnapshotNotFound,
)
from casbackup.fs import FileLock, translated, write_durably
from casbackup.ids import ZERO_ID, BlobId, Namespace, SessionId, VmName, new_session_id
from casbackup.repository import adoption
from casbackup.repository.catalog import Snapshot, read_copy, store_copy
from casbackup.repository.layout import SnapshotKey
from casbackup.spec.indexdb import BlobEntry, PackRow
from casbackup.spec.manifest import Manifest, Sidecar, decode_manifest, encode_manifest
from casbackup.spec.node import Inner, decode_node
from casbackup.spec.outline import distinct_children, encode_inner_outline, encode_leaf_outline
from casbackup.spec.pack import PackEntry
from casbackup.spec.record import HEADER_BYTES, BlobKind, Record
from casbackup.store.blobstore import entries_in
from casbackup.store.index import Transaction
from casbackup.store.writer import NOTHING_STORED, StoredBytes, StoreWriter

if TYPE_CHECKING:
    from casbackup.repository.repository import Repository

LEASE_S = 24 * 3600
"""How long a parked session can still be resumed."""


class SessionKind(IntEnum):
    """Who has the session. Only a backup asks what is stored, and only a backup can be resumed."""

    BACKUP = 1
    READER = 2
    MAINTENANCE = 3


class SessionRow(NamedTuple):
    """What the index keeps of a session. ``pins`` are blobs that gc must keep with all below (of snapshots being
    read).
    """

    id: SessionId
    number: int
    namespace: Namespace
    vm: VmName
    epoch: int
    seen_ms: int
    pins: tuple[BlobId, ...] = ()
    kind: int = SessionKind.BACKUP

    def encode(self) -> bytes:
        data: bytes = msgpack.packb(list(self))
        return data


def decode_row(value: bytes | memoryview) -> SessionRow:
    session, number, namespace, vm, epoch, seen_ms, pins, kind = msgpack.unpackb(value)
    return SessionRow(session, number, namespace, vm, epoch, seen_ms, tuple(BlobId(pin) for pin in pins), kind)


class Sessions:
    """All sessions of a repository."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def open(
        self,
        namespace: Namespace,
        vm: VmName,
        *,
        kind: SessionKind = SessionKind.BACKUP,
        pins: Sequence[BlobId] = (),
    ) -> Session:
        """Start a session. ``pins`` are kept by gc until it ends, whatever is forgotten meanwhile."""
        repository = self._repository
        session_id = new_session_id()
        lock = self._lock(session_id)
        now_ms = repository.clock.now_ms()

        def add(txn: Transaction) -> SessionRow:
            number = repository.index.next_number(txn, "session")
            epoch = repository.index.number(txn, "epoch")
            row = SessionRow(session_id, number, namespace, vm, epoch, now_ms, tuple(pins), kind)
            self.put(txn, row)
            return row

        return self._attached(lock, add, kind)

    def resume(self, session_id: SessionId) -> Session:
        """Go on with a session that was parked or whose process died. What it stored is still there.

        :raise SessionNotFound: when it was committed, aborted or given up.
        :raise SessionBusy: when another process works on it.
        """
        repository = self._repository
        with repository.index.read() as txn:  # so that no lock file is made for a session that never was
            if self.get(txn, session_id) is None:
                raise SessionNotFound(f"there is no session {session_id}")
        lock = self._lock(session_id)

        def restamp(txn: Transaction) -> SessionRow:
            row = self.get(txn, session_id)
            if row is None or row.kind != SessionKind.BACKUP:
                raise SessionNotFound(f"there is no session {session_id}")
            row = row._replace(epoch=repository.index.number(txn, "epoch"), seen_ms=repository.clock.now_ms())
            self.put(txn, row)
            return row

        return self._attached(lock, restamp, SessionKind.BACKUP)

    def all(self) -> list[tuple[SessionRow, bool]]:
        """All sessions and whether each is active."""
        with self._repository.index.read() as txn:
            rows = self.rows(txn)
        return [(row, self.is_active(row)) for row in rows]

    def rows(self, txn: Transaction) -> list[SessionRow]:
        with txn.cursor(db=self._repository.index.sessions) as cursor:
            return [decode_row(value) for _, value in cursor]

    def get(self, txn: Transaction, session_id: SessionId) -> SessionRow | None:
        value = txn.get(session_id.encode(), db=self._repository.index.sessions)
        return None if value is None else decode_row(value)

    def put(self, txn: Transaction, row: SessionRow) -> None:
        txn.put(row.id.encode(), row.encode(), db=self._repository.index.sessions)

    def touch(self, txn: Transaction, session_id: SessionId) -> None:
        """Note a sign of life: the lease counts from here."""
        row = self.get(txn, session_id)
        if row is not None:
            self.put(txn, row._replace(seen_ms=self._repository.clock.now_ms()))

    def drop(self, txn: Transaction, session_id: SessionId) -> None:
        txn.delete(session_id.encode(), db=self._repository.index.sessions)

    def is_active(self, row: SessionRow) -> bool:
        """Does somebody hold its lock? Asked within a write transaction, a no stays true until it ends."""
        lock = self._repository.fs.lock(self._repository.layout.session_lock(row.id), shared=False)
        if lock is None:
            return True
        lock.release()
        return False

    def expired(self, row: SessionRow, now_ms: int) -> bool:
        """Of no more use to anybody: parked for longer than its lease, or not resumable.

        One seen last in the future counts as well: while a clock was wrong nothing may be pinned for years.
        """
        return self.is_over(row, now_ms) and not self.is_active(row)

    def is_over(self, row: SessionRow, now_ms: int) -> bool:
        """``expired``, if it is not active."""
        return row.kind != SessionKind.BACKUP or abs(now_ms - row.seen_ms) > LEASE_S * 1000

    def _lock(self, session_id: SessionId) -> FileLock:
        repository = self._repository
        with translated("cannot start a session"):
            lock = repository.fs.lock(repository.layout.session_lock(session_id), shared=False)
        if lock is None:
            raise SessionBusy(f"another process works on session {session_id}")
        return lock

    def _attached(self, lock: FileLock, change: Callable[[Transaction], SessionRow], kind: SessionKind) -> Session:
        def counted(txn: Transaction) -> SessionRow:
            if kind != SessionKind.MAINTENANCE:
                self._repository.index.next_number(txn, "attach")
            self._repository.index.next_number(txn, "epoch")
            return change(txn)

        try:
            row = self._repository.index.write(counted)
        except BaseException:
            lock.release()
            raise
        return Session(self._repository, row, lock)


class _SessionWriter(StoreWriter):
    """Every transaction of its writer is a sign of life of a session: one may run for longer than the lease."""

    def __init__(self, repository: Repository, row: SessionRow) -> None:
        super().__init__(repository.store, row.id, row.number, repository.config.pack_bytes)
        self._sessions = repository.sessions

    def _index(self, txn: Transaction, pack_number: int, row: PackRow, entries: Sequence[PackEntry]) -> int:
        self._sessions.touch(txn, self._session)
        return super()._index(txn, pack_number, row, entries)


class Session:
    """One backup in progress. ``missing`` and ``send`` may be called from several threads.

    Ends by exactly one of ``commit``, ``finish``, ``abort`` and ``park``.
    """

    def __init__(self, repository: Repository, row: SessionRow, lock: FileLock) -> None:
        self._repository = repository
        self._row = row
        self._lock: FileLock | None = lock
        self._writer = _SessionWriter(repository, row)
        self._has_adopted = False
        self._commit_lock = threading.RLock()
        """No end of the session comes between a commit's look at what is stored and its manifest."""

    @property
    def id(self) -> SessionId:
        return self._row.id

    @property
    def number(self) -> int:
        """The number that its packs and blobs carry in the index."""
        return self._row.number

    def missing(self, ids: Sequence[BlobId]) -> set[BlobId]:
        """Those of ``ids`` that must be sent. All others stay stored until this session ends."""
        pending = self._writer.pending
        return set(self._repository.store.missing([i for i in ids if pending(i) is None]))

    def missing_leaf(self, leaf: BlobId, chunks: Sequence[BlobId]) -> set[BlobId]:
        """Those of a leaf and its chunks that must be sent; none if the leaf is there, for then its chunks are."""
        missing = self.missing([leaf])
        return missing | self.missing(chunks) if missing else missing

    def send(self, records: Sequence[Record]) -> StoredBytes:
        """Store blobs; durable with the next ``flush`` or ``commit``. Duplicates are not an error.

        Whoever computed the ids is trusted with them for chunks and configs of a local job; tree nodes are decoded
        and checked.

        :raise ClosureViolation: when a node names something that is neither stored nor sent before it.
        """
        stored = NOTHING_STORED
        waiting: list[Record] = []
        for record in records:
            if record.kind != BlobKind.NODE:
                waiting.append(record)
                continue
            stored = stored.plus(self._writer.put(waiting))
            waiting = []
            stored = stored.plus(self._writer.put([record], {record.id: self._checked_outline(record)}))
        return stored.plus(self._writer.put(waiting))

    def send_soon(self, records: Sequence[Record], then: Callable[[StoredBytes], None]) -> None:
        """``send`` for whoever need not wait; here, it does not take long."""
        then(self.send(records))

    def settle(self) -> None:
        """Nothing is ever under way."""

    def flush(self) -> None:
        """What was sent survives any crash from now on."""
        self._writer.flush()

    def commit(self, draft: Manifest) -> Snapshot:
        """Make the snapshot visible: the manifest's rename is the commit point. The session is over.

        The time is moved on by milliseconds while it is taken; sequence and parent are filled in here. Of a sealed
        manifest nothing can be changed here.

        1. blobs durable and indexed; 2. manifest written, synced, renamed into place; 3. index's copy put,
        session's row dropped.

        :raise ClosureViolation: when a disk's root or a config is not stored.
        :raise CommitOutdated: when a sealed manifest has not the next number, or a time that is taken; the session
        goes on.
        """
        with self._commit_lock:
            self._require_attached()
            self._writer.flush(seal=True)
            committed: list[Snapshot] = []

            def change(txn: Transaction) -> None:
                self._require_roots(txn, draft)
                if not committed:
                    committed.append(self._write_manifest(txn, draft))
                self._remember(txn, committed[0])

            try:
                self._repository.index.write(change)
            except CasbackupError:
                if not committed:
                    raise
                # The snapshot exists; a listing heals the index's copy and gc drops the parked session.
                self.park()
            else:
                self._end_for_good()
            return committed[0]

    def adopt(self, manifest: bytes, sidecar: Sidecar = Sidecar()) -> Snapshot:  # noqa: B008  it is immutable
        """Make a snapshot of another repository visible here as it is: the same bytes, so the same id, number, parent
        and time. The session goes on.

        One that is here already keeps the sidecar that it has here.

        1. blobs durable and indexed; 2. sidecar written; 3. manifest written, synced, renamed into place: the commit
        point; 4. index's copy put.

        :raise ManifestDamaged: when the bytes are no manifest. :raise KeyMismatch: when it is sealed, and manifests
        here are not, or the reverse. :raise ClosureViolation: when something that it needs is not stored.
        :raise NodeInvalid: when a root is not that of a disk of its size.
        :raise SnapshotConflict: when the VM has another snapshot of that time.
        """
        decoded, snapshot_id = decode_manifest(manifest, "to be copied")
        adoption.check_form(self._repository, decoded)
        snapshot = Snapshot(snapshot_id, decoded, sidecar)
        with self._commit_lock:
            self._require_attached()
            self._writer.flush()
            adoption.clear_the_way(self._repository, snapshot.key, manifest)

            def change(txn: Transaction) -> Snapshot:
                self._require_roots(txn, decoded)
                return adoption.write_copy(self._repository, txn, snapshot, manifest)

            adoption.check_roots(self._repository, decoded)
            adopted = self._repository.index.write(change)
            self._has_adopted = True
            return adopted

    def adopt_all(self, copies: Sequence[adoption.Copy]) -> list[Snapshot | CasbackupError]:
        """``adopt`` of several, in order. Ends with the first that is refused, whose error comes last."""
        results: list[Snapshot | CasbackupError] = []
        for copy in copies:
            try:
                results.append(self.adopt(copy.manifest, copy.sidecar))
            except CasbackupError as error:
                results.append(error)
                break
        return results

    def finish(self) -> None:
        """End it: what it adopted stays, what else it stored becomes garbage. Ending an ended session is harmless."""
        with self._commit_lock:
            if self._lock is not None:
                self._writer.flush()
                self.abort()

    def abort(self) -> None:
        """Give up: what was stored becomes garbage. Ending an ended session is harmless."""
        with self._commit_lock:
            if self._lock is None:
                return
            try:
                if self._has_adopted:
                    self._writer.flush(seal=True)  # the pack holds what a snapshot needs
                self._writer.close()
                self._repository.index.write(lambda txn: self._repository.sessions.drop(txn, self.id))
            except BaseException:
                self.park()
                raise
            self._end_for_good()

    def park(self) -> None:
        """Leave the session to be resumed: what was flushed stays."""
        with self._commit_lock:
            self._writer.close()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _write_manifest(self, txn: Transaction, draft: Manifest) -> Snapshot:
        repository = self._repository
        previous = repository.catalog.last_in(txn, draft.namespace, draft.vm)
        number = previous.manifest.sequence + 1 if previous else 1
        if draft.sealed:
            manifest = draft
            if draft.sequence != number:
                raise CommitOutdated(f"the next snapshot of {draft.vm} has number {number}, not {draft.sequence}")
        else:
            manifest = replace(draft, sequence=number, parent=previous.id if previous else None)
        repository.fs.make_folders(repository.layout.vm_folder(draft.namespace, draft.vm))
        while True:
            key = SnapshotKey(manifest.namespace, manifest.vm, manifest.time_ms)
            orphan = repository.fs.exists(repository.layout.sidecar(key))
            if orphan or read_copy(txn, repository.index, key) is not None:
                # Taken, or was taken by one whose removal was cut short: its copy must not be believed to be ours, nor
                # its sidecar.
                manifest = _a_moment_later(manifest)
                continue
            data, snapshot_id = encode_manifest(manifest)
            try:
                with translated(f"cannot write the manifest of {manifest.vm}"):
                    write_durably(repository.fs, repository.layout.manifest(key), data, replace=False)
                return Snapshot(snapshot_id, manifest)
            except FileExistsError:
                manifest = _a_moment_later(manifest)

    def _remember(self, txn: Transaction, snapshot: Snapshot) -> None:
        store_copy(txn, self._repository.index, snapshot.key, encode_manifest(snapshot.manifest)[0])
        self._repository.sessions.drop(txn, self.id)

    def _require_roots(self, txn: Transaction, draft: Manifest) -> None:
        needed = {d.root: f"disk {d.name}" for d in draft.disks if d.root != ZERO_ID}
        needed |= {c.id: f"config {c.name}" for c in draft.configs}
        entries = entries_in(txn, self._repository.index, needed)
        for blob_id, what in needed.items():
            if not self._vouched(entries.get(blob_id)):
                raise ClosureViolation(f"{what} of {draft.vm} is not stored completely")

    def _checked_outline(self, record: Record) -> bytes:
        """Check that a node names only blobs that are stored or pending, and slices within them; its outline for
        accounting.
        """
        node = decode_node(self._repository.codec.decode(record))
        if isinstance(node, Inner):
            children = distinct_children(node)
            self._require(dict.fromkeys(children, 0), BlobKind.NODE)
            return encode_inner_outline(record.total_bytes, children)
        ends: dict[BlobId, int] = {}
        for extent in node.extents:
            if not extent.is_zero:
                ends[extent.id] = max(ends.get(extent.id, 0), extent.skip + extent.length)
        return encode_leaf_outline(record.total_bytes, self._require(ends, BlobKind.CHUNK))

    def _require(self, ends: dict[BlobId, int], kind: BlobKind) -> list[tuple[BlobId, int, int]]:
        """Every blob is there, of this kind, and reaches to the named end; gives (id, stored bytes, plain bytes) of
        each.
        """
        found: list[tuple[BlobId, int, int]] = []
        stored: list[BlobId] = []
        for blob_id in ends:
            pending = self._writer.pending(blob_id)
            if pending is None:
                stored.append(blob_id)
            else:
                self._require_fit(blob_id, pending, kind, ends[blob_id])
                found.append((blob_id, HEADER_BYTES + pending.stored_length, pending.plain_length))
        entries = self._repository.store.entries(stored)
        for blob_id in stored:
            entry = entries.get(blob_id)
            if entry is None or not self._vouched(entry):
                raise ClosureViolation(f"a tree node names blob {blob_id.hex()[:16]}, which is not stored")
            self._require_fit(blob_id, entry, kind, ends[blob_id])
            found.append((blob_id, HEADER_BYTES + entry.stored_length, entry.plain_length))
        return found

    def _require_fit(self, blob_id: BlobId, blob: BlobEntry | PackEntry, kind: BlobKind, end: int) -> None:
        if blob.kind != kind or blob.plain_length < end:
            raise ClosureViolation(f"a tree node names byte {end} of blob {blob_id.hex()[:16]}, which has fewer")

    def _vouched(self, entry: BlobEntry | None) -> bool:
        """Stored soundly, and not marked as garbage before this session could be told about it."""
        if entry is None or entry.state != 0:
            return False
        return entry.dying_epoch == 0 or entry.dying_epoch > self._row.epoch

    def _require_attached(self) -> None:
        if self._lock is None:
            raise SessionNotFound(f"session {self.id} has ended")

    def _end_for_good(self) -> None:
        """Its row is gone: nobody will look at its lock again."""
        self._repository.fs.remove(self._repository.layout.session_lock(self.id))
        self.park()


def _a_moment_later(manifest: Manifest) -> Manifest:
    """:raise CommitOutdated: when it is sealed."""
    if manifest.sealed:
        raise CommitOutdated(f"there is, or was, a snapshot of {manifest.vm} of the same millisecond")
    return replace(manifest, time_ms=manifest.time_ms + 1)


@contextlib.contextmanager
def reading(repository: Repository, snapshot: Snapshot) -> Iterator[None]:
    """Keep a snapshot's data while it is read, even if it is forgotten meanwhile. Without effect on a read-only
    repository.
    """
    if repository.read_only:
        yield
        return
    roots = [d.root for d in snapshot.manifest.disks if d.root != ZERO_ID]
    roots += [c.id for c in snapshot.manifest.configs]
    session = repository.sessions.open(
        snapshot.manifest.namespace, snapshot.manifest.vm, kind=SessionKind.READER, pins=roots
    )
    try:
        # A gc that does not see the pins has listed the snapshots before: this one among them, if it is still there.
        if repository.catalog.get(snapshot.key) is None:
            raise SnapshotNotFound(f"{snapshot.reference} was forgotten a moment ago")
        yield
    finally:
        session.abort()
