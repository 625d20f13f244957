"""Repair: put back what there is another copy of, move the sound rest out of damaged packs, put those aside.

    1. damaged manifests are rewritten from the index's copies;
    2. damaged blobs are looked for in other packs;
    3. sound blobs of packs with damage are moved to new packs;
    4. what is left damaged loses its place in the index but stays known as lost;
    5. the packs go to ``quarantine/``.

Nothing is deleted, and each step leaves a sound repository. What is lost heals when a later backup stores a blob
with the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from casbackup.codec.records import parse_record
from casbackup.errors import DataDamage, PackDamaged
from casbackup.ids import BlobId, PackId
from casbackup.progress import NoProgress, Progress
from casbackup.repository.damage import AffectedDisk, DamageMap, damaged_ids, note_damage
from casbackup.repository.indextable import read_index
from casbackup.repository.repack import repack
from casbackup.repository.repository import Repository
from casbackup.spec.indexdb import NO_PACK, STATE_DAMAGED, BlobEntry, PackRow, decode_entry, pack_key
from casbackup.spec.record import HEADER_BYTES, BlobKind, RecordHeader
from casbackup.store.index import Transaction
from casbackup.store.packfile import headers


@dataclass(slots=True)
class RepairReport:
    restored_manifests: int = 0
    healed_blobs: int = 0
    moved_blobs: int = 0
    lost_blobs: int = 0
    quarantined: list[str] = field(default_factory=list)
    affected: list[AffectedDisk] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def repair(repository: Repository, progress: Progress | None = None) -> RepairReport:
    """Repair what earlier checks found. Takes the maintenance lock.

    :raise RepositoryBusy: when a gc, check or repair is running.
    """
    report, progress = RepairReport(), progress or NoProgress()
    with repository.maintenance():
        _restore_manifests(repository, report)
        damaged = damaged_ids(repository)
        if damaged:
            report.healed_blobs = _use_other_copies(repository, damaged)
        damaged = damaged_ids(repository)
        _empty_damaged_packs(repository, damaged, report, progress)
        damaged = damaged_ids(repository)
        report.lost_blobs = len(damaged)
        report.affected = DamageMap(repository, damaged).affected(repository.catalog.survey()[0])
    return report


def _restore_manifests(repository: Repository, report: RepairReport) -> None:
    for key, error in repository.catalog.verify_files():
        if repository.catalog.put_back(key):
            report.restored_manifests += 1
        else:
            report.notes.append(f"{error}; there is no copy of it")


def _use_other_copies(repository: Repository, damaged: Sequence[BlobId]) -> int:
    """Repoint damaged blobs to sound records of the same id in any pack; returns how many."""
    wanted = set(damaged)
    healed = 0
    for number, row in repository.store.pack_rows().items():
        try:
            listed = headers(repository.store.storage, row.pack)
            found = [(offset, header) for offset, header in listed if header.id in wanted]
        except (KeyError, PackDamaged, OSError):
            continue
        for offset, header in found:
            if header.id in wanted and _is_sound(repository, row.pack, offset, header.stored_length, header.id):
                _repoint(repository, number, offset, header)
                wanted.discard(header.id)
                healed += 1
    return healed


def _is_sound(repository: Repository, pack: PackId, offset: int, stored_length: int, blob_id: BlobId) -> bool:
    try:
        data = repository.store.storage.read(pack, offset, HEADER_BYTES + stored_length)
        record = parse_record(data, at=f"{pack}:{offset}")
        repository.codec.verify_content(record)
    except (DataDamage, OSError, KeyError):
        return False
    return record.id == blob_id


def _repoint(repository: Repository, number: int, offset: int, header: RecordHeader) -> None:
    def change(txn: Transaction) -> None:
        value = txn.get(header.id, db=repository.index.blobs)
        if value is None:
            return
        entry = decode_entry(value)._replace(
            pack=number,
            offset=offset,
            stored_length=header.stored_length,
            plain_length=header.plain_length,
            kind=header.kind,
            flags=header.flags,
            state=0,
        )
        txn.put(header.id, entry.encode(), db=repository.index.blobs)

    repository.index.write(change)


def _empty_damaged_packs(
    repository: Repository, damaged: Sequence[BlobId], report: RepairReport, progress: Progress
) -> None:
    entries = repository.store.entries(damaged)
    numbers = {entry.pack for entry in entries.values() if entry.pack != NO_PACK}
    rows = repository.store.pack_rows()
    with repository.index.read() as txn:
        unfinished = {row.number for row in repository.sessions.rows(txn)}
    packs: dict[int, PackRow] = {}
    for number in sorted(numbers & rows.keys()):
        if rows[number].session in unfinished:
            report.notes.append(f"pack {rows[number].pack} belongs to a backup that is not finished and stays for now")
        else:
            packs[number] = rows[number]
    if packs:
        table = read_index(repository.index)
        outcome = repack(repository, table, packs, progress)
        report.moved_blobs = outcome.moved_blobs
        # What turned out to be damaged only now must not be vouched for either, once its pack is gone.
        nodes = table.ids_where(table.values["kind"] == BlobKind.NODE)
        suspects = DamageMap(repository, [*damaged, *outcome.damaged]).suspects(nodes)
        note_damage(repository, outcome.damaged, suspects)
    damaged = damaged_ids(repository)
    repository.index.write(lambda txn: _unplace(repository, txn, damaged))
    for number, row in packs.items():
        _quarantine(repository, number, row, report)


def _unplace(repository: Repository, txn: Transaction, damaged: Sequence[BlobId]) -> None:
    """Damaged blobs no longer have a place, but an entry that says so."""
    for blob_id in damaged:
        value = txn.get(blob_id, db=repository.index.blobs)
        if value is not None and decode_entry(value).state & STATE_DAMAGED:
            entry: BlobEntry = decode_entry(value)._replace(pack=NO_PACK, offset=0)
            txn.put(blob_id, entry.encode(), db=repository.index.blobs)


def _quarantine(repository: Repository, number: int, row: PackRow, report: RepairReport) -> None:
    repository.index.write(lambda txn: txn.delete(pack_key(number), db=repository.index.packs))
    try:
        report.quarantined.append(repository.store.storage.quarantine(row.pack))
    except FileNotFoundError:
        report.notes.append(f"pack {row.pack} is missing")
