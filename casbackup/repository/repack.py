"""Moving live blobs out of packs, as they are stored, so that the packs can go.

    1. records are read, verified, appended to new packs, synced;
    2. one index transaction a pack moves the entries.

The caller drops the emptied packs afterwards. Until 2 the old place counts, after it the new one; both hold the same
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from casbackup.codec.records import parse_record
from casbackup.errors import BlobDamaged, PackDamaged
from casbackup.ids import DEFAULT_NAMESPACE, BlobId, VmName
from casbackup.progress import Progress
from casbackup.repository.indextable import IndexTable
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import Session, SessionKind
from casbackup.spec.indexdb import BlobEntry, PackRow, decode_entry
from casbackup.spec.pack import PackEntry
from casbackup.spec.record import HEADER_BYTES, Record
from casbackup.store.index import Transaction
from casbackup.store.writer import StoreWriter

_MAINTENANCE = VmName("vm/maintenance")


@dataclass(slots=True)
class RepackOutcome:
    """``emptied``: numbers of packs without any live blob now. ``damaged``: blobs that could not be moved and stay
    where they are.
    """

    emptied: list[int] = field(default_factory=list)
    damaged: list[BlobId] = field(default_factory=list)
    moved_blobs: int = 0
    written_bytes: int = 0
    notes: list[str] = field(default_factory=list)


class _Mover(StoreWriter):
    """A writer whose index transaction changes where existing entries point, if they still point to the old place."""

    def __init__(self, repository: Repository, session: Session, old: dict[BlobId, BlobEntry]) -> None:
        super().__init__(repository.store, session.id, session.number, repository.config.pack_bytes)
        self._old = old

    def _index_entry(self, txn: Transaction, number: int, entry: PackEntry) -> None:
        blobs = self._store.index.blobs
        value = txn.get(entry.id, db=blobs)
        old = self._old[entry.id]
        if value is None:
            return
        now = decode_entry(value)
        if (now.pack, now.offset) == (old.pack, old.offset):
            txn.put(entry.id, now._replace(pack=number, offset=entry.offset).encode(), db=blobs)


def repack(
    repository: Repository, table: IndexTable, packs: Mapping[int, PackRow], progress: Progress
) -> RepackOutcome:
    """Move all blobs of these packs into new ones, in order of id's place in the old packs (which keeps disks
    together).
    """
    outcome = RepackOutcome()
    old: dict[BlobId, BlobEntry] = {}
    session = repository.sessions.open(DEFAULT_NAMESPACE, _MAINTENANCE, kind=SessionKind.MAINTENANCE)
    mover = _Mover(repository, session, old)
    try:
        for number, row in packs.items():
            clean = True
            for blob_id, entry, record in _records(repository, table, number, row):
                if isinstance(record, Record):
                    old[blob_id] = entry
                    outcome.written_bytes += mover.put([record]).stored_bytes
                    outcome.moved_blobs += 1
                    progress.advance(done=record.total_bytes)
                else:
                    clean = False
                    outcome.damaged.append(blob_id)
                    outcome.notes.append(str(record))
            if clean:
                outcome.emptied.append(number)
            repository.index.release_pages()
        mover.flush(seal=True)
    finally:
        mover.close()
        session.abort()
    return outcome


def _records(
    repository: Repository, table: IndexTable, number: int, row: PackRow
) -> Iterator[tuple[BlobId, BlobEntry, Record | Exception]]:
    """Every entry of a pack in file order, with its verified record or why there is none."""
    rows = np.flatnonzero(table.values["pack"] == number)
    for index in rows[np.argsort(table.values["offset"][rows])].tolist():
        entry = BlobEntry(*(int(value) for value in table.values[index]))
        blob_id = table.id(index)
        yield blob_id, entry, _verified(repository, blob_id, entry, row)


def _verified(repository: Repository, blob_id: BlobId, entry: BlobEntry, row: PackRow) -> Record | Exception:
    try:
        data = repository.store.storage.read(row.pack, entry.offset, HEADER_BYTES + entry.stored_length)
        record = parse_record(data, at=f"{row.pack}:{entry.offset}")
    except (PackDamaged, BlobDamaged, OSError, KeyError) as error:
        return error
    if record.id != blob_id:
        where = f"pack {row.pack}, byte {entry.offset}"
        return BlobDamaged(f"blob {blob_id.hex()[:16]} is not where the index says ({where})")
    return record
