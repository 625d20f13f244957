"""Records passed on as they are stored: the same ones as those that are parsed, neighbours in one piece."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from casbackup.codec.codec import PLAIN
from casbackup.errors import BlobDamaged, BlobMissing, DataDamage
from casbackup.fs import Buffer
from casbackup.ids import BlobId, new_session_id
from casbackup.spec.record import BlobKind, Record
from casbackup.spec.wire import FrameParser
from casbackup.store.blobstore import BlobStore
from casbackup.store.index import Index
from casbackup.store.writer import StoreWriter
from casbackup.testing.packstorage import MemoryPackStorage


@pytest.fixture
def store() -> Iterator[BlobStore]:
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="casbackup-", dir=base) as folder:
        index = Index.create(folder, "ab" * 16)
        yield BlobStore(index, MemoryPackStorage(), PLAIN)
        index.close()


@pytest.fixture
def records(store: BlobStore) -> list[Record]:
    """Stored in this order, in several packs."""
    noise = random.Random(1)
    made = [PLAIN.encode_blob(BlobKind.CHUNK, noise.randbytes(noise.randrange(1, 3000)), 1) for _ in range(60)]
    writer = StoreWriter(store, new_session_id(), 1, 20_000)
    writer.put(made)
    writer.flush()
    writer.close()
    return made


def pieces(store: BlobStore, ids: Sequence[BlobId]) -> tuple[list[Buffer], dict[BlobId, DataDamage]]:
    stored = list(store.fetch_stored(ids))
    return [p for p in stored if not isinstance(p, tuple)], dict(p for p in stored if isinstance(p, tuple))


def parsed(found: Sequence[Buffer]) -> list[Record]:
    records: list[Record] = []
    for piece in found:  # no record is cut
        parser = FrameParser()
        records += [record for _, record in parser.feed(bytes(piece)) if isinstance(record, Record)]
        parser.end()
    return records


def test_neighbours_come_in_one_piece(store: BlobStore, records: list[Record]) -> None:
    found, lost = pieces(store, [record.id for record in records])
    assert not lost
    assert sorted(parsed(found)) == sorted(records)
    assert len(found) == len(list(store.storage.list()))


def test_what_is_not_asked_for_does_not_come(store: BlobStore, records: list[Record]) -> None:
    some = random.Random(2).sample(records, 25)
    found, lost = pieces(store, [record.id for record in some])
    assert not lost
    assert sorted(parsed(found)) == sorted(some)


def test_damaged_headers_and_strangers_are_said_to_be_lost(
    store: BlobStore, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, stranger = records[7], BlobId(b"x" * 32)
    for place in (0, 4, 5, 8, 12, 16, 47):
        with monkeypatch.context() as patch:
            _damage(store, damaged, place, patch)
            found, lost = pieces(store, [*(record.id for record in records), stranger])
        assert sorted(parsed(found)) == sorted(record for record in records if record is not damaged)
        assert {blob_id: type(loss) for blob_id, loss in lost.items()} == {
            damaged.id: BlobDamaged,
            stranger: BlobMissing,
        }


def _damage(store: BlobStore, record: Record, place: int, patch: pytest.MonkeyPatch) -> None:
    """Flip a bit of its header whenever it is read."""
    read = store.storage.read

    def damaging(pack: object, offset: int, length: int) -> bytes:
        data = bytearray(read(pack, offset, length))  # type: ignore[arg-type]
        at = data.find(record.header)
        if at >= 0:
            data[at + place] ^= 1
        return bytes(data)

    patch.setattr(store.storage, "read", damaging)
