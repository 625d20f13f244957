"""An encrypted repository in the hands of somebody who can write to it, and has no key.

Whatever they do, a client with the key gets what was backed up, or an error; never anything else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.block.memory import MemoryDevice
from casbackup.codec.codec import keyed_codec
from casbackup.codec.master_key import MasterKey
from casbackup.codec.records import make_record, parse_record
from casbackup.errors import BlobDamaged, CasbackupError, DataDamage, KeyMissing
from casbackup.ids import DEFAULT_NAMESPACE, BlobId, VmName, parse_disk
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.restore import read_config
from casbackup.jobs.segments import DeviceSegments
from casbackup.peer.disk import SnapshotDisk
from casbackup.peer.local import LocalPeer
from casbackup.peer.sealed import SealedPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.repository import Repository
from casbackup.spec.indexdb import decode_entry
from casbackup.spec.record import HEADER_BYTES, BlobKind, Record

KEY = MasterKey(bytes(range(32)))
DISKS = [b"the first secret " * 1500, b"the second secret " * 1500]
CONFIG = b"secret: yes\n"


def saved(peer: SealedPeer, number: int) -> Snapshot:
    disk = DiskInput(parse_disk("scsi0"), DeviceSegments(MemoryDevice(DISKS[number], writable=False)))
    request = BackupRequest(
        DEFAULT_NAMESPACE, VmName("vm/100"), [disk], {"vm.conf": CONFIG}, notes="private", time_ms=10**12 + number
    )
    return backup(peer, request)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tampering") / "repository"
    with Repository.create(str(folder), key_fingerprint=KEY.fingerprint) as repository:
        peer = SealedPeer(LocalPeer(repository), KEY)
        for number in range(2):
            saved(peer, number)
        peer.annotate(peer.snapshots()[0], notes="private too")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "repository"))


def contents(peer: SealedPeer) -> dict[int, tuple[bytes, bytes]]:
    """Disk and config of each snapshot, by its time."""
    found: dict[int, tuple[bytes, bytes]] = {}
    for snapshot in peer.snapshots():
        disk = snapshot.manifest.disks[0]
        content = bytearray(disk.size_bytes)
        SnapshotDisk(peer, disk).read_into(0, memoryview(content))
        config = read_config(peer, snapshot.manifest.configs[0])
        found[snapshot.manifest.time_ms] = bytes(content), bytes(config)
    return found


RIGHT = {10**12 + number: (disk, CONFIG) for number, disk in enumerate(DISKS)}


def is_noticed(folder: Path) -> bool:
    """Do the snapshots give an error? Otherwise they must be right, what is left of them."""
    try:
        with Repository.open(str(folder)) as repository:
            found = contents(SealedPeer(LocalPeer(repository), KEY))
    except CasbackupError:
        return True
    assert found.items() <= RIGHT.items()
    return found != RIGHT


def files(folder: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.rglob(pattern))


def test_untouched_it_is_right(folder: Path) -> None:
    assert not is_noticed(folder)


@pytest.mark.parametrize("pattern", ["*.pack", "*.snap", "*.meta", "config.json"])
def test_every_changed_byte_is_noticed_or_harmless(folder: Path, pattern: str) -> None:
    """With the index's copies of manifests and without them."""
    noticed = 0
    for path in files(folder, pattern):
        data = path.read_bytes()
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            if pattern == "*.snap":
                forget_copies(folder)
            noticed += is_noticed(folder)
        path.write_bytes(data)
    assert not is_noticed(folder)
    assert noticed or pattern == "*.meta", "nothing was ever noticed: this tests nothing"


@pytest.mark.parametrize("pattern", ["*.pack", "*.snap", "*.meta", "config.json"])
def test_every_cut_is_noticed_or_harmless(folder: Path, pattern: str) -> None:
    for path in files(folder, pattern):
        data = path.read_bytes()
        for length in range(0, len(data), 7):
            path.write_bytes(data[:length])
            is_noticed(folder)
        path.write_bytes(data)


def forget_copies(folder: Path) -> None:
    with Repository.open(str(folder)) as repository:
        repository.index.write(lambda txn: txn.drop(repository.index.snapshots, delete=False))


# --- the index tells what it likes


def entries(repository: Repository) -> Iterator[tuple[BlobId, bytes]]:
    with repository.index.read() as txn, txn.cursor(db=repository.index.blobs) as cursor:
        for key, value in cursor:
            yield BlobId(bytes(key)), bytes(value)


def test_no_blob_passes_for_another(folder: Path) -> None:
    """Each blob in the place of each other one, as the index would have it."""
    with Repository.open(str(folder)) as repository:
        right = dict(entries(repository))
    assert len(right) >= 5
    swaps = [(a, b) for a in right for b in right if a != b]
    for a, b in swaps:
        with Repository.open(str(folder)) as repository:
            repository.index.write(lambda txn, a=a, b=b: txn.put(a, right[b], db=repository.index.blobs))
        is_noticed(folder)
        with Repository.open(str(folder)) as repository:
            repository.index.write(lambda txn, a=a: txn.put(a, right[a], db=repository.index.blobs))
    assert not is_noticed(folder)


class Lying:
    """A peer whose server gives something else for a blob."""

    def __init__(self, peer: LocalPeer, lies: dict[BlobId, Record]) -> None:
        self._peer = peer
        self._lies = lies

    def __getattr__(self, name: str) -> object:
        return getattr(self._peer, name)

    def fetch(self, ids: list[BlobId]) -> Iterator[tuple[BlobId, Record | DataDamage]]:
        for blob_id, record in self._peer.fetch(ids):
            yield blob_id, self._lies.get(blob_id, record)


def stored_records(repository: Repository) -> dict[BlobId, Record]:
    found: dict[BlobId, Record] = {}
    for blob_id, value in entries(repository):
        entry = decode_entry(value)
        row = repository.store.pack_rows()[entry.pack]
        data = repository.store.storage.read(row.pack, entry.offset, HEADER_BYTES + entry.stored_length)
        found[blob_id] = parse_record(data, at="here")
    return found


def test_a_server_cannot_substitute_anything(folder: Path) -> None:
    """Not even with records whose header and checksum say that they are what was asked for: chunks, subtrees and
    configs of the same repository are what it has.
    """
    with Repository.open(str(folder)) as repository:
        local = LocalPeer(repository)
        records = stored_records(repository)
        for asked, own in records.items():
            for given, other in records.items():
                if asked == given:
                    continue
                for kind in (own.kind, other.kind):
                    lie = make_record(asked, kind, other.flags, other.plain_length, other.payload)
                    peer = SealedPeer(Lying(local, {asked: lie}), KEY)  # type: ignore[arg-type]
                    try:
                        found = contents(peer)
                    except CasbackupError:
                        continue
                    assert found == RIGHT, "a blob that nothing of this needs"


def test_a_subtree_cannot_be_exchanged(folder: Path) -> None:
    """A leaf of the repository's own in the place of another one."""
    with Repository.open(str(folder)) as repository:
        local = LocalPeer(repository)
        old, new = (s.manifest.disks[0].root for s in repository.catalog.all())
        records = stored_records(repository)
        lie = make_record(new, BlobKind.NODE, records[old].flags, records[old].plain_length, records[old].payload)
        peer = SealedPeer(Lying(local, {new: lie}), KEY)  # type: ignore[arg-type]
        snapshot = peer.snapshots()[1]
        with pytest.raises(BlobDamaged, match="do not have that id"):
            SnapshotDisk(peer, snapshot.manifest.disks[0]).read_into(0, memoryview(bytearray(100)))


# --- without the key


def test_nothing_is_read_without_the_key(folder: Path) -> None:
    with Repository.open(str(folder)) as repository:
        peer = LocalPeer(repository)
        snapshot = peer.snapshots()[0]
        with pytest.raises(KeyMissing, match=KEY.fingerprint):
            SnapshotDisk(peer, snapshot.manifest.disks[0]).read_into(0, memoryview(bytearray(100)))
        with pytest.raises(KeyMissing, match=KEY.fingerprint):
            read_config(peer, snapshot.manifest.configs[0])
        assert (snapshot.notes, snapshot.manifest.host) != ("private", "")


def test_no_plain_text_is_in_any_file(folder: Path) -> None:
    """Content, and names and notes that describe it; also keys."""
    secrets = [b"secret", b"private", b"vm.conf", KEY.reveal(), KEY.reveal().hex().encode()]
    secrets += [bytes(part) for part in keyed_codec(KEY).ids]
    for path in files(folder, "*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [secret for secret in secrets if secret in data], path


def test_what_a_chunk_is_cannot_be_guessed(folder: Path) -> None:
    """Whoever guesses the content of a chunk right finds nothing with its id."""
    from casbackup.codec.hashing import PUBLIC_KEYS

    with Repository.open(str(folder)) as repository:
        guess = PUBLIC_KEYS.id(BlobKind.CONFIG, CONFIG)
        assert repository.store.missing([guess]) == [guess]
        right = keyed_codec(KEY).ids.id(BlobKind.CONFIG, CONFIG)
        assert repository.store.missing([right]) == []


def test_check_finds_damage_without_the_key(folder: Path) -> None:
    with Repository.open(str(folder)) as repository:
        assert not check(repository, CheckOptions(read_data=True)).damaged
        records = stored_records(repository)
        chunk = next(i for i, record in records.items() if record.kind == BlobKind.CHUNK)
        entry = repository.store.entries([chunk])[chunk]
        name = f"{repository.store.pack_rows()[entry.pack].pack}.pack"
    with open(files(folder, name)[0], "r+b") as file:
        file.seek(entry.offset + HEADER_BYTES + 20)
        file.write(b"\0\0\0\0")
    with Repository.open(str(folder)) as repository:
        assert check(repository, CheckOptions(read_data=True)).damaged


# --- saying that it is not encrypted


def test_a_repository_that_says_it_is_not_encrypted_gives_nothing(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_bytes())
    del content["key_fingerprint"]
    path.write_bytes(json.dumps(content).encode())
    with Repository.open(str(folder)) as repository:
        peer = LocalPeer(repository)
        with pytest.raises(DataDamage):
            SnapshotDisk(peer, peer.snapshots()[0].manifest.disks[0]).read_into(0, memoryview(bytearray(100)))
    assert is_noticed(folder)
