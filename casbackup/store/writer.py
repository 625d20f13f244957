"""Writing blobs into packs, many at a time, made durable in groups.

Write order of a group (``docs/architecture.md`` has the crash table):

    1. records appended to the session's pack, the pack synced;
    2. one index transaction: the pack's row and the entries of all its new records.

Before step 2 nobody else knows of the blobs, and a crash leaves bytes that gc removes. After step 2 they are
stored for good. A full pack gets its footer and is handed to a background thread for both steps, so that the next
one fills meanwhile.
"""

from __future__ import annotations

import operator
import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from casbackup.fs import Buffer
from casbackup.ids import BlobId, SessionId, new_pack_id
from casbackup.spec.indexdb import BlobEntry, PackRow, decode_entry, pack_key
from casbackup.spec.pack import HEADER_BYTES, PackEntry
from casbackup.spec.record import Record
from casbackup.store.blobstore import BlobStore
from casbackup.store.index import Transaction
from casbackup.store.packfile import encode_footer, encode_header
from casbackup.store.packstorage import PackAppender

_BUFFERED_BYTES = 1024 * 1024
_SYNC_EVERY_BYTES = 16 * 1024 * 1024
_MAX_SEALING = 2
_NO_OUTLINES: Mapping[BlobId, bytes] = {}


class StoredBytes(NamedTuple):
    """What ``put`` really added: duplicates count nothing."""

    blobs: int
    plain_bytes: int
    stored_bytes: int

    def plus(self, other: StoredBytes) -> StoredBytes:
        return StoredBytes(*map(operator.add, self, other))


NOTHING_STORED = StoredBytes(0, 0, 0)


class _OpenPack:
    """The pack being filled: what is buffered, what is listed, what the index knows already."""

    def __init__(self, appender: PackAppender, session: SessionId) -> None:
        self.appender = appender
        self.buffers: list[Buffer] = [encode_header(appender.pack, session)]
        self.buffered_bytes = HEADER_BYTES
        self.size_bytes = HEADER_BYTES
        self.synced_bytes = 0
        self.entries: list[PackEntry] = []
        self.indexed = 0
        self.number = 0

    def add(self, record: Record) -> PackEntry:
        entry = PackEntry(
            self.size_bytes, len(record.payload), record.plain_length, record.kind, record.flags, record.id
        )
        self.entries.append(entry)
        self.buffers += (record.header, record.payload)
        self.buffered_bytes += record.total_bytes
        self.size_bytes += record.total_bytes
        return entry

    def write_out(self) -> _Written:
        buffers, self.buffers, self.buffered_bytes = self.buffers, [], 0
        if buffers:
            self.appender.append(buffers)
        return _Written(self, len(self.entries), self.size_bytes)

    def finish(self) -> _Written:
        footer = encode_footer(self.appender.pack, self.entries, self.size_bytes)
        self.buffers.append(footer)
        self.size_bytes += len(footer)
        return self.write_out()


class _Written(NamedTuple):
    """A pack up to where it was written out: its first ``records`` records, which end at ``size_bytes``."""

    pack: _OpenPack
    records: int
    size_bytes: int


class StoreWriter:
    """The one writer of a session. ``put`` is safe from several threads; after an error the writer is of no use."""

    def __init__(self, store: BlobStore, session: SessionId, session_number: int, pack_bytes: int) -> None:
        self._store = store
        self._session = session
        self._session_number = session_number
        self._pack_bytes = pack_bytes
        self._pending: dict[BlobId, PackEntry] = {}
        self._outlines: dict[BlobId, bytes] = {}
        self._pack: _OpenPack | None = None
        self._lock = threading.RLock()
        """Held while records are appended."""
        self._indexing = threading.Lock()
        """Held while a pack is made durable, which takes long; whoever has it does not wait for ``_lock``."""
        self._sealing: queue.Queue[tuple[_Written, bool] | None] = queue.Queue(_MAX_SEALING)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def pending(self, blob_id: BlobId) -> PackEntry | None:
        """The listing of a blob that was put but that the index may not know yet."""
        return self._pending.get(blob_id)

    def put(self, records: Iterable[Record], outlines: Mapping[BlobId, bytes] = _NO_OUTLINES) -> StoredBytes:
        """Append records; ``outlines`` are what accounting keeps of tree nodes. Nothing is promised until ``flush``
        returns.

        :raise RepositoryFull: when the disk is full.
        """
        blobs = plain = stored = 0
        with self._lock:
            self._raise_failure()
            self._outlines.update(outlines)
            for record in records:
                if record.id not in self._pending:
                    self._append(record)
                    blobs, plain, stored = blobs + 1, plain + record.plain_length, stored + record.total_bytes
        return StoredBytes(blobs, plain, stored)

    def flush(self, *, seal: bool = False) -> None:
        """Make everything that was put durable and known to the index; ``seal`` also ends the open pack.

        Others may ``put`` meanwhile.
        """
        with self._lock:
            self._drain()
            pack = self._pack
            if pack is None:
                return
            if seal or not pack.appender.can_continue:
                self._pack = None
                self._make_durable(pack.finish(), sealed=True)
                return
            written = pack.write_out()
        self._make_durable(written, sealed=False)

    def close(self) -> None:
        """Stop without promising anything more about what was put since the last ``flush``."""
        with self._lock:
            if self._thread is not None:
                self._sealing.put(None)
                self._thread.join()
                self._thread = None
            if self._pack is not None:
                with self._indexing:
                    self._pack.appender.close()
                self._pack = None

    def _append(self, record: Record) -> None:
        pack = self._pack
        if pack is None:
            pack = self._pack = _OpenPack(self._store.storage.create(new_pack_id()), self._session)
        self._pending[record.id] = pack.add(record)
        if pack.size_bytes >= self._pack_bytes:
            self._pack = None
            self._hand_over(pack.finish(), sealed=True)
        elif pack.buffered_bytes >= _BUFFERED_BYTES:
            written = pack.write_out()
            if pack.appender.can_continue and pack.size_bytes - pack.synced_bytes >= _SYNC_EVERY_BYTES:
                pack.synced_bytes = pack.size_bytes
                self._hand_over(written, sealed=False)

    def _hand_over(self, written: _Written, *, sealed: bool) -> None:
        """To the background: sealed packs to be made durable; others only to be synced early, which evens out the
        disk's load.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._seal_packs, name="pack-writer", daemon=True)
            self._thread.start()
        self._sealing.put((written, sealed))

    def _seal_packs(self) -> None:
        while (item := self._sealing.get()) is not None:
            written, sealed = item
            try:
                if self._failure is None:
                    if sealed:
                        self._make_durable(written, sealed=True)
                    else:
                        written.pack.appender.sync()
            except BaseException as error:  # noqa: BLE001  handed to the thread that calls put or flush next
                self._failure = error
            finally:
                self._sealing.task_done()

    def _drain(self) -> None:
        self._sealing.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _make_durable(self, written: _Written, *, sealed: bool) -> None:
        """A failure is final: after a failed sync the system may have dropped what it could not write, and the next
        sync would succeed all the same.
        """
        with self._indexing:
            self._raise_failure()
            try:
                self._sync_and_index(written, sealed=sealed)
            except Exception as error:
                self._failure = error
                raise

    def _sync_and_index(self, written: _Written, *, sealed: bool) -> None:
        pack = written.pack
        if not sealed and pack.indexed >= written.records:
            return  # by somebody else, who may have sealed it since
        pack.appender.sync()
        if sealed:
            pack.appender.close()
        entries = pack.entries[pack.indexed : written.records]
        row = PackRow(pack.appender.pack, self._session_number, sealed, written.size_bytes)
        pack.number = self._store.index.write(lambda txn: self._index(txn, pack.number, row, entries))
        pack.indexed = written.records
        for entry in entries:
            self._pending.pop(entry.id, None)
            self._outlines.pop(entry.id, None)

    def _index(self, txn: Transaction, pack_number: int, row: PackRow, entries: Sequence[PackEntry]) -> int:
        """Write the pack's row and its new entries; returns the pack's number, 0 meaning that it has none yet."""
        index = self._store.index
        number = pack_number or index.next_number(txn, "pack")
        txn.put(pack_key(number), row.encode(), db=index.packs)
        for entry in sorted(entries, key=_by_id):
            self._index_entry(txn, number, entry)
        return number

    def _index_entry(self, txn: Transaction, number: int, entry: PackEntry) -> None:
        """Make one new record known. If another session was quicker, its copy stays and ours is garbage."""
        index = self._store.index
        old = txn.get(entry.id, db=index.blobs)
        if old is not None and decode_entry(old).is_present:
            return
        value = BlobEntry(
            number, entry.offset, entry.stored_length, entry.plain_length,
            self._session_number, 0, 0, entry.kind, entry.flags, 0,
        )  # fmt: skip
        txn.put(entry.id, value.encode(), db=index.blobs)
        if entry.id in self._outlines:
            txn.put(entry.id, self._outlines[entry.id], db=index.outlines)


def _by_id(entry: PackEntry) -> bytes:
    return entry.id
