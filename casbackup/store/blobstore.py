"""Finding and reading blobs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from casbackup.codec.codec import Codec
from casbackup.errors import BlobDamaged, BlobMissing, DataDamage, PackDamaged
from casbackup.fs import Buffer
from casbackup.ids import BlobId, PackId
from casbackup.spec.indexdb import (
    EPOCH_OFFSET,
    NO_PACK,
    STATE_DAMAGED,
    STATE_OFFSET,
    BlobEntry,
    PackRow,
    decode_entry,
    decode_pack_row,
    pack_key,
)
from casbackup.spec.record import CHECKED_BYTES, HEADER_BYTES, Record, pack_checked, parse_header
from casbackup.store.index import Index, Transaction
from casbackup.store.packstorage import PackStorage

_ALIVE = b"\0\0\0\0"
_MAX_GAP_BYTES = 32 * 1024
_MAX_READ_BYTES = 4 * 1024 * 1024

Fetched = tuple[BlobId, Record | DataDamage]

Lost = tuple[BlobId, DataDamage]

Stored = Buffer | Lost
"""Records back to back, or one that cannot be had."""


class Location(NamedTuple):
    """A blob to be read: where it should be."""

    pack: PackId
    offset: int
    id: BlobId
    entry: BlobEntry

    @property
    def end(self) -> int:
        return self.offset + HEADER_BYTES + self.entry.stored_length


class _Run(NamedTuple):
    """Records that were read together: where they should be, and the bytes from the first one to the last one."""

    places: Sequence[Location]
    data: memoryview

    def records(self) -> Iterator[Fetched]:
        for location, record in self._cut():
            yield location.id, _parsed(location, record)

    def stretches(self) -> Iterator[Stored]:
        """The same bytes with nothing between records that touch; only the parts of headers that the index has as well
        are looked at.
        """
        start = end = 0
        for location, record in self._cut():
            at = location.offset - self.places[0].offset
            if record[:CHECKED_BYTES] != _checked(location):
                yield location.id, _not_there(location)
                continue
            if at != end:
                if start < end:
                    yield self.data[start:end]
                start = at
            end = at + len(record)
        if start < end:
            yield self.data[start:end]

    def _cut(self) -> Iterator[tuple[Location, memoryview]]:
        base = self.places[0].offset
        for location in self.places:
            yield location, self.data[location.offset - base : location.end - base]


class BlobStore:
    """Packs and their index as one thing. Reading is safe from any number of threads."""

    def __init__(self, index: Index, storage: PackStorage, codec: Codec) -> None:
        self.index = index
        self.storage = storage
        self.codec = codec
        self._pack_ids: dict[int, PackId] = {}
        self._lock = threading.Lock()

    def missing(self, ids: Iterable[BlobId]) -> list[BlobId]:
        """Those of ``ids`` that are not stored, or not soundly, or are about to be collected; in order."""
        found: list[BlobId] = []
        blobs = self.index.blobs
        with self.index.read() as txn:
            get = txn.get
            for blob_id in ids:
                value = get(blob_id, db=blobs)
                if value is None or value[STATE_OFFSET] or value[EPOCH_OFFSET : EPOCH_OFFSET + 4] != _ALIVE:
                    found.append(blob_id)
        return found

    def entries(self, ids: Iterable[BlobId]) -> dict[BlobId, BlobEntry]:
        """The index entries of those ids that have one."""
        with self.index.read() as txn:
            return entries_in(txn, self.index, ids)

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        """The records of all ``ids`` (distinct), in the order in which they lie in the packs.

        A blob that cannot be had comes as the error that says why. Records are parsed, not verified: decoding one
        verifies it against its id.
        """
        for item in self._fetch(ids):
            if isinstance(item, _Run):
                yield from item.records()
            else:
                yield item

    def fetch_stored(self, ids: Sequence[BlobId]) -> Iterator[Stored]:
        """``fetch`` for whoever passes records on as they are stored: neighbours come in one piece, up to 4 MiB."""
        for item in self._fetch(ids):
            if isinstance(item, _Run):
                yield from item.stretches()
            else:
                yield item

    def read(self, blob_id: BlobId) -> Buffer:
        """The verified plain bytes of one blob.

        :raise BlobMissing: when it is not stored.
        :raise BlobDamaged: when what is stored is not what it should be.
        """
        return self.read_all([blob_id])[blob_id]

    def read_all(self, ids: Sequence[BlobId]) -> Mapping[BlobId, Buffer]:
        """The verified plain bytes of all ``ids``; raises like ``read``."""
        result: dict[BlobId, Buffer] = {}
        for blob_id, record in self.fetch(ids):
            if isinstance(record, DataDamage):
                raise record
            result[blob_id] = self.codec.decode(record)
        return result

    def pack_id(self, txn: Transaction, number: int) -> PackId | None:
        """The pack with this number; numbers are never reused."""
        known = self._pack_ids.get(number)
        if known is None:
            value = txn.get(pack_key(number), db=self.index.packs)
            if value is None:
                return None
            known = self._pack_ids[number] = decode_pack_row(value).pack
        return known

    def pack_rows(self) -> dict[int, PackRow]:
        with self.index.read() as txn:
            return pack_rows_in(txn, self.index)

    def _fetch(self, ids: Sequence[BlobId]) -> Iterator[_Run | Lost]:
        vanished: list[BlobId] = []
        yield from self._fetch_once(ids, vanished)
        if vanished:
            # A repack moved them between the look-up and the read: their new place is in the index by now.
            still: list[BlobId] = []
            yield from self._fetch_once(vanished, still)
            for blob_id in still:
                yield blob_id, BlobMissing(f"the pack that holds blob {blob_id.hex()[:16]} is gone")

    def _fetch_once(self, ids: Sequence[BlobId], vanished: list[BlobId]) -> Iterator[_Run | Lost]:
        """Yields what can be read or is known to be lost; appends to ``vanished`` the ids whose pack is not there."""
        locations, lost = self._locate(ids)
        for blob_id in lost:
            yield blob_id, BlobMissing(f"blob {blob_id.hex()[:16]} is not in the repository")
        for places in _neighbours(sorted(locations)):
            try:
                yield self._read(places)
            except KeyError:
                vanished += [location.id for location in places]
            except (PackDamaged, OSError) as error:
                yield from self._one_by_one(places, error, vanished)

    def _one_by_one(
        self, places: Sequence[Location], error: Exception, vanished: list[BlobId]
    ) -> Iterator[_Run | Lost]:
        """A read over several records failed: find out which of them it was."""
        for location in places:
            try:
                yield self._read([location])
            except KeyError:
                vanished.append(location.id)
            except (PackDamaged, OSError) as own:
                reason = own if len(places) > 1 else error
                yield location.id, BlobDamaged(f"blob {location.id.hex()[:16]} cannot be read: {reason}")

    def _read(self, places: Sequence[Location]) -> _Run:
        start = places[0].offset
        return _Run(places, memoryview(self.storage.read(places[0].pack, start, places[-1].end - start)))

    def _locate(self, ids: Sequence[BlobId]) -> tuple[list[Location], list[BlobId]]:
        locations: list[Location] = []
        lost: list[BlobId] = []
        with self.index.read() as txn:
            found = entries_in(txn, self.index, ids)
            for blob_id in ids:
                entry = found.get(blob_id)
                pack = self.pack_id(txn, entry.pack) if entry and entry.pack != NO_PACK else None
                if entry is None or pack is None:
                    lost.append(blob_id)
                else:
                    locations.append(Location(pack, entry.offset, blob_id, entry))
        return locations, lost


def entries_in(txn: Transaction, index: Index, ids: Iterable[BlobId]) -> dict[BlobId, BlobEntry]:
    """Like ``BlobStore.entries``, within a transaction."""
    found: dict[BlobId, BlobEntry] = {}
    for blob_id in ids:
        value = txn.get(blob_id, db=index.blobs)
        if value is not None:
            found[blob_id] = decode_entry(value)
    return found


def pack_rows_in(txn: Transaction, index: Index) -> dict[int, PackRow]:
    with txn.cursor(db=index.packs) as cursor:
        return {int.from_bytes(key, "big"): decode_pack_row(value) for key, value in cursor}


def is_damaged(entry: BlobEntry) -> bool:
    return bool(entry.state & STATE_DAMAGED)


def _neighbours(locations: Sequence[Location]) -> Iterator[list[Location]]:
    """Group sorted locations so that each group is worth one read."""
    run: list[Location] = []
    for location in locations:
        if run and (
            location.pack != run[0].pack
            or location.offset - run[-1].end > _MAX_GAP_BYTES
            or location.end - run[0].offset > _MAX_READ_BYTES
        ):
            yield run
            run = []
        run.append(location)
    if run:
        yield run


def _parsed(location: Location, data: memoryview) -> Record | BlobDamaged:
    header = parse_header(data)
    if header is None or header.id != location.id or header.stored_length != len(data) - HEADER_BYTES:
        return _not_there(location)
    return Record(
        header.id, header.kind, header.flags, header.plain_length, bytes(data[:HEADER_BYTES]), data[HEADER_BYTES:]
    )


def _checked(location: Location) -> bytes:
    """What a record's header begins with, if it is there."""
    entry = location.entry
    return pack_checked(entry.kind, entry.flags, entry.stored_length, entry.plain_length, location.id)


def _not_there(location: Location) -> BlobDamaged:
    return BlobDamaged(
        f"blob {location.id.hex()[:16]} is not where the index says (pack {location.pack}, byte {location.offset})"
    )
