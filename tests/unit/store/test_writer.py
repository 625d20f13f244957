"""Writing blobs in groups, and finding them again."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from casbackup.codec.codec import PLAIN
from casbackup.errors import BlobDamaged, BlobMissing, PackDamaged, RepositoryFull
from casbackup.fs import Buffer
from casbackup.ids import BlobId, PackId, new_pack_id, new_session_id
from casbackup.spec.indexdb import BlobEntry, PackRow, pack_key
from casbackup.spec.record import BlobKind, Record
from casbackup.store.blobstore import BlobStore
from casbackup.store.index import Index, Transaction
from casbackup.store.packfile import read_footer, scan
from casbackup.store.packstorage import PackAppender
from casbackup.store.writer import NOTHING_STORED, StoredBytes, StoreWriter
from casbackup.testing.packstorage import MemoryPackStorage


@pytest.fixture
def index() -> Iterator[Index]:
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="casbackup-", dir=base) as folder:
        made = Index.create(folder, "ab" * 16)
        yield made
        made.close()


@pytest.fixture(params=["appendable", "object-store-like"])
def store(index: Index, request: pytest.FixtureRequest) -> BlobStore:
    return BlobStore(index, MemoryPackStorage(appendable=request.param == "appendable"), PLAIN)


@pytest.fixture
def writer(store: BlobStore) -> Iterator[StoreWriter]:
    made = writer_of(store)
    yield made
    made.close()


def writer_of(store: BlobStore, pack_bytes: int = 4000) -> StoreWriter:
    return StoreWriter(store, new_session_id(), 1, pack_bytes)


def blobs(seed: int, count: int, size: int = 500) -> list[Record]:
    source = random.Random(seed)
    return [PLAIN.encode_blob(BlobKind.CHUNK, source.randbytes(size), 2) for _ in range(count)]


def ids_of(records: Sequence[Record]) -> list[BlobId]:
    return [record.id for record in records]


def check_stored(store: BlobStore, records: Sequence[Record]) -> None:
    assert store.missing(ids_of(records)) == []
    assert {i: bytes(data) for i, data in store.read_all(ids_of(records)).items()} == {
        record.id: bytes(PLAIN.decode(record)) for record in records
    }


def test_what_was_flushed_is_stored(store: BlobStore, writer: StoreWriter) -> None:
    records = blobs(0, 30)
    total = NOTHING_STORED
    for start in range(0, 30, 4):
        total = total.plus(writer.put(records[start : start + 4]))
    writer.flush()
    assert total == StoredBytes(30, 30 * 500, 30 * 564)
    check_stored(store, records)
    rows = store.pack_rows()
    assert len(rows) == 5, "a pack is full with 7 records"
    assert {row.pack: row.size_bytes for row in rows.values()} == {
        info.pack: info.size_bytes for info in store.storage.list()
    }
    writer.flush(seal=True)
    assert all(row.sealed for row in store.pack_rows().values())
    listed = [entry.id for row in store.pack_rows().values() for entry in read_footer(store.storage, row.pack) or []]
    assert sorted(listed) == sorted(ids_of(records))
    check_stored(store, records)


def test_nothing_is_visible_before_the_flush(store: BlobStore, writer: StoreWriter) -> None:
    records = blobs(1, 3)
    writer.put(records)
    assert store.missing(ids_of(records)) == ids_of(records)
    assert all(writer.pending(record.id) for record in records)
    assert store.pack_rows() == {}
    writer.flush()
    assert store.missing(ids_of(records)) == []
    assert not any(writer.pending(record.id) for record in records)


def test_duplicates_count_and_cost_nothing(store: BlobStore, writer: StoreWriter) -> None:
    records = blobs(2, 3)
    assert writer.put([*records, *records]).blobs == 3
    assert writer.put(records) == NOTHING_STORED
    writer.flush(seal=True)
    (info,) = store.storage.list()
    assert len(read_footer(store.storage, info.pack) or []) == 3


def test_the_first_copy_stays_in_the_index(store: BlobStore, writer: StoreWriter) -> None:
    records = blobs(3, 2)
    other = writer_of(store)
    for each in (writer, other):
        each.put(records)
    writer.flush(seal=True)
    before = store.entries(ids_of(records))
    other.flush(seal=True)
    other.close()
    assert store.entries(ids_of(records)) == before
    check_stored(store, records)


@pytest.mark.parametrize("change", [{"state": 1}, {"state": 2}, {"dying_epoch": 5}], ids=str)
def test_a_new_copy_replaces_one_that_is_not_sound(
    store: BlobStore, writer: StoreWriter, change: dict[str, int]
) -> None:
    (record,) = blobs(4, 1)
    old = BlobEntry(0, 64, 1, 1, 1, 99, 0, 1, 0, 0)._replace(**change)
    store.index.write(lambda txn: txn.put(record.id, old.encode(), db=store.index.blobs))
    assert store.missing([record.id]) == [record.id]
    writer.put([record])
    writer.flush()
    check_stored(store, [record])
    assert store.entries([record.id])[record.id].verified_s == 0


def test_outlines_are_kept_of_what_was_stored(store: BlobStore, writer: StoreWriter) -> None:
    records = blobs(5, 2)
    writer.put(records, {records[0].id: b"outline"})
    writer.flush()
    with store.index.read() as txn:
        assert txn.get(records[0].id, db=store.index.outlines) == b"outline"
        assert txn.get(records[1].id, db=store.index.outlines) is None


def test_closing_without_a_flush_promises_nothing(store: BlobStore) -> None:
    kept, lost = blobs(6, 2), blobs(7, 2)
    writer = writer_of(store)
    writer.put(kept)
    writer.flush()
    writer.put(lost)
    writer.close()
    writer.close()
    check_stored(store, kept)
    assert store.missing(ids_of(lost)) == ids_of(lost)


def test_flushing_nothing(store: BlobStore, writer: StoreWriter) -> None:
    writer.flush()
    writer.flush(seal=True)
    assert list(store.storage.list()) == [] and store.pack_rows() == {}


def test_flushing_again_and_again_appends_to_one_pack(index: Index) -> None:
    store = BlobStore(index, MemoryPackStorage(), PLAIN)
    writer = writer_of(store, 10**6)
    records = blobs(8, 6)
    for record in records:
        writer.put([record])
        writer.flush()
        writer.flush()
        check_stored(store, [record])
    ((number, row),) = store.pack_rows().items()
    assert (number, row.sealed) == (1, False)
    writer.flush(seal=True)
    assert [(row.pack, row.sealed) for row in store.pack_rows().values()] == [(row.pack, True)]
    check_stored(store, records)
    writer.close()


def test_threads_put_and_flush_at_once(store: BlobStore, writer: StoreWriter) -> None:
    common = blobs(9, 10)
    own = [blobs(10 + n, 60) for n in range(3)]
    failures: list[BaseException] = []

    def work(records: list[Record]) -> None:
        try:
            for start in range(0, 60, 5):
                writer.put([*records[start : start + 5], *common])
                writer.flush()
                check_stored(store, records[: start + 5])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[records]) for records in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)
    check_stored(store, [*common, *own[0], *own[1], *own[2]])


# --- errors


class FailingStorage(MemoryPackStorage):
    """Syncs fail, in whatever thread."""

    def create(self, pack: PackId) -> PackAppender:
        appender = super().create(pack)

        def sync() -> None:
            raise RepositoryFull("no space left")

        appender.sync = sync  # type: ignore[method-assign]
        return appender


def test_an_error_in_the_background_reaches_the_next_call(index: Index) -> None:
    store = BlobStore(index, FailingStorage(), PLAIN)
    writer = writer_of(store)
    records = blobs(20, 8)
    writer.put(records)
    for _ in range(2):
        with pytest.raises(RepositoryFull):
            writer.flush()
        with pytest.raises(RepositoryFull):
            writer.put(blobs(21, 1))
    writer.close()
    assert store.missing(ids_of(records)) == ids_of(records)
    assert store.pack_rows() == {}


class OnceFailingStorage(MemoryPackStorage):
    """The first sync fails. Later ones succeed, as they do after a disk has lost what was to be written."""

    def create(self, pack: PackId) -> PackAppender:
        appender = super().create(pack)
        right = appender.sync
        failures = iter([RepositoryFull("no space left")])

        def sync() -> None:
            for failure in failures:
                raise failure
            right()

        appender.sync = sync  # type: ignore[method-assign]
        return appender


def test_nothing_is_promised_after_a_failed_sync(index: Index) -> None:
    store = BlobStore(index, OnceFailingStorage(), PLAIN)
    writer = writer_of(store)
    records = blobs(24, 3)
    writer.put(records)
    for _ in range(2):
        with pytest.raises(RepositoryFull):
            writer.flush()
    with pytest.raises(RepositoryFull):
        writer.flush(seal=True)
    writer.close()
    assert store.missing(ids_of(records)) == ids_of(records)


def test_many_packs_after_an_error_in_the_background_do_not_block(index: Index) -> None:
    writer = writer_of(BlobStore(index, FailingStorage(), PLAIN))
    with pytest.raises(RepositoryFull):
        for seed in range(100):
            writer.put(blobs(seed, 8))
        writer.flush()
    writer.close()


def test_an_error_in_a_flush_reaches_its_caller(index: Index) -> None:
    store = BlobStore(index, FailingStorage(), PLAIN)
    writer = writer_of(store)
    writer.put(blobs(22, 1))
    with pytest.raises(RepositoryFull):
        writer.flush()
    writer.close()
    assert store.pack_rows() == {}


# --- reading


def fetched(store: BlobStore, *ids: BlobId) -> dict[BlobId, object]:
    found = list(store.fetch(ids))
    assert len(found) == len(ids)
    return dict(found)


def test_blobs_that_are_not_there(store: BlobStore, writer: StoreWriter) -> None:
    (record,) = blobs(30, 1)
    writer.put([record])
    writer.flush()
    unknown, nowhere, packless = (BlobId(bytes([n]) * 32) for n in (1, 2, 3))

    def change(txn: Transaction) -> None:
        for blob, pack in ((nowhere, 0), (packless, 77)):
            txn.put(blob, BlobEntry(pack, 64, 1, 1, 1, 0, 0, 1, 0, 0).encode(), db=store.index.blobs)

    store.index.write(change)
    found = fetched(store, unknown, record.id, nowhere, packless)
    assert all(isinstance(found[i], BlobMissing) for i in (unknown, nowhere, packless))
    assert isinstance(found[record.id], Record)
    with pytest.raises(BlobMissing):
        store.read(unknown)


class RepackingStorage(MemoryPackStorage):
    """Before its first read, ``repack`` moves things; then the pack is gone."""

    def read(self, pack: PackId, offset: int, length: int) -> bytes:
        if "repack" in vars(self):
            repack = vars(self).pop("repack")
            repack()
            if "first_error" in vars(self):
                raise vars(self).pop("first_error")
        return super().read(pack, offset, length)


def repacked(store: BlobStore, records: Sequence[Record]) -> None:
    """Move all blobs into a new pack and delete the old ones."""
    old = [info.pack for info in store.storage.list()]
    new = new_pack_id()
    appender = store.storage.create(new)
    data: list[Buffer] = [b"h" * 64]

    def change(txn: Transaction) -> None:
        number = store.index.next_number(txn, "pack")
        txn.put(pack_key(number), PackRow(new, 1, False, 0).encode(), db=store.index.packs)
        offset = 64
        for record in reversed(records):
            entry = BlobEntry(number, offset, len(record.payload), record.plain_length, 1, 0, 0, 1, record.flags, 0)
            txn.put(record.id, entry.encode(), db=store.index.blobs)
            data.extend((record.header, record.payload))
            offset += record.total_bytes

    store.index.write(change)
    appender.append(data)
    appender.sync()
    for pack in old:
        store.storage.delete(pack)


@pytest.mark.parametrize("error", [None, PackDamaged("a read over several records failed"), OSError(5, "I/O error")])
def test_blobs_of_a_pack_repacked_meanwhile_are_looked_up_again(index: Index, error: Exception | None) -> None:
    storage = RepackingStorage()
    store = BlobStore(index, storage, PLAIN)
    writer = writer_of(store)
    records = blobs(31, 20)
    writer.put(records)
    writer.flush(seal=True)
    writer.close()
    vars(storage)["repack"] = lambda: repacked(store, records)
    if error is not None:
        vars(storage)["first_error"] = error
    check_stored(store, records)


def test_a_pack_that_is_really_gone(store: BlobStore, writer: StoreWriter) -> None:
    records = blobs(32, 5)
    writer.put(records)
    writer.flush(seal=True)
    for info in list(store.storage.list()):
        store.storage.delete(info.pack)
    assert all(isinstance(found, BlobMissing) for found in fetched(store, *ids_of(records)).values())


def test_records_that_are_elsewhere_than_the_index_says(store: BlobStore, writer: StoreWriter) -> None:
    a, b, c = blobs(33, 3)
    writer.put([a, b, c])
    writer.flush(seal=True)
    entries = store.entries([a.id, b.id, c.id])

    def change(txn: Transaction) -> None:
        for blob, entry in (
            (a.id, entries[b.id]),
            (b.id, entries[b.id]._replace(offset=10**6)),
        ):
            txn.put(blob, entry.encode(), db=store.index.blobs)

    store.index.write(change)
    found = fetched(store, a.id, b.id, c.id)
    assert isinstance(found[a.id], BlobDamaged) and isinstance(found[b.id], BlobDamaged)
    assert isinstance(found[c.id], Record), "what lies beyond the end of a pack does not harm its neighbours"
    (info,) = store.storage.list()
    assert len(list(scan(store.storage, info.pack))) == 3


def test_a_truncated_pack_loses_only_its_last_records(index: Index, tmp_path: Path) -> None:
    storage = MemoryPackStorage()
    store = BlobStore(index, storage, PLAIN)
    writer = writer_of(store, 10**6)
    records = blobs(34, 4)
    writer.put(records)
    writer.flush()
    writer.close()
    (info,) = storage.list()
    data = storage.read(info.pack, 0, info.size_bytes - 1)
    storage.delete(info.pack)
    appender = storage.create(info.pack)
    appender.append([data])
    appender.sync()
    found = fetched(store, *ids_of(records))
    assert [isinstance(found[record.id], Record) for record in records] == [True, True, True, False]
    assert isinstance(found[records[3].id], BlobDamaged)
