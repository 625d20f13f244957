"""``check`` and ``repair`` of encrypted repositories, with the key at hand and without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.codec.codec import keyed_codec
from casbackup.codec.master_key import MasterKey
from casbackup.codec.records import make_record
from casbackup.jobs.sync import SyncRequest, sync
from casbackup.keys.ring import KeyRing
from casbackup.keys.wrapping import unwrap
from casbackup.peer.local import LocalPeer
from casbackup.repository.damage import damaged_ids
from casbackup.repository.repository import Repository
from casbackup.spec.manifest import encode_manifest
from casbackup.spec.record import FLAG_SEALED, HEADER_BYTES, BlobKind, Record
from tests.client.conftest import Casbackup


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "keys"
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(folder))
    return folder


@pytest.fixture
def encrypted(bare: Casbackup, keys: Path) -> Casbackup:
    bare.ok("init", "-q", "--encrypted", "--no-passphrase")
    bare.ok("backup", "-q", "vm/100", f"scsi0={bare.disk()}")
    return bare


@pytest.fixture
def without(encrypted: Casbackup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Casbackup:
    """The command on a machine where the key is not; ``CASBACKUP_KEY_FOLDER`` decides that."""
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "no-keys"))
    return encrypted


def key_of(keys: Path) -> MasterKey:
    ring = KeyRing(str(keys))
    return unwrap(ring.read(ring.only()), "the test's key", identities=(), passphrases=iter(()))


def forge_chunk(folder: Path) -> None:
    """Somebody without the key puts other bytes in a chunk's place, with a checksum that is right."""
    with Repository.open(str(folder)) as repository:
        ids = [i for i, entry in _entries(repository) if entry.kind == BlobKind.CHUNK]
        ((_, record),) = repository.store.fetch(ids[:1])
        assert isinstance(record, Record) and record.flags & FLAG_SEALED
        payload = bytes(record.payload)[:-1] + bytes([record.payload[-1] ^ 1])
        forged = make_record(record.id, record.kind, record.flags, record.plain_length, payload)
        entry = repository.store.entries([record.id])[record.id]
        pack = repository.store.pack_rows()[entry.pack].pack
        (path,) = Path(repository.layout.packs).rglob(f"{pack}*")
    content = bytearray(path.read_bytes())
    content[entry.offset : entry.offset + HEADER_BYTES + len(payload)] = forged.header + forged.payload
    path.write_bytes(content)


def _entries(repository: Repository):  # type: ignore[no-untyped-def]
    from casbackup.spec.indexdb import decode_entry

    with repository.index.read() as txn, txn.cursor(db=repository.index.blobs) as cursor:
        return [(bytes(key), decode_entry(value)) for key, value in cursor]


def forge_manifest(folder: Path) -> None:
    with Repository.open(str(folder)) as repository:
        (snapshot,) = repository.catalog.all()
        forged = replace(snapshot.manifest, labels=("trusted",), time_ms=snapshot.manifest.time_ms + 1000)
        session = repository.sessions.open(forged.namespace, forged.vm)
        session.adopt(encode_manifest(forged)[0])
        session.finish()


def test_it_says_what_it_went_by(encrypted: Casbackup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert encrypted.json("check", "--read-data")["verified_by"] == "key"
    assert "seals and ids verified with the key" in encrypted.ok("check").text
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "no-keys"))
    found = encrypted.json("check", "--read-data")
    assert (found["verified_by"], found["damaged"]) == ("checksums", False)
    assert "checksums only" in encrypted.ok("check").text
    encrypted.ok("init", "-q", "-r", tmp_path / "plain")
    assert encrypted.json("check", "-r", tmp_path / "plain")["verified_by"] == "ids"


def test_a_key_that_needs_a_passphrase_is_not_asked_for(
    bare: Casbackup, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "correct horse")
    bare.ok("init", "-q", "--encrypted")
    monkeypatch.delenv("CASBACKUP_PASSPHRASE")
    assert bare.json("check")["verified_by"] == "checksums"
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "correct horse")
    assert bare.json("check")["verified_by"] == "key"


def test_a_forged_chunk_is_found_with_the_key_and_stays_found(
    encrypted: Casbackup, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge_chunk(encrypted.repository)
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "no-keys"))
    assert encrypted("check", "--read-data").status == 0
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(keys))
    found = encrypted("check", "--read-data", "--json")
    assert found.status == 4
    assert "seal" in found.json["findings"][0]["message"]
    assert found.json["affected"][0]["disk"] == "scsi0"
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "no-keys"))
    assert encrypted("check", "--read-data").status == 4  # its checksum is right still, but somebody knew better
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(keys))
    encrypted.ok("backup", "-q", "vm/100", f"scsi0={encrypted.disk()}")
    assert encrypted.json("check", "--read-data")["damaged"] is False


def test_a_forged_manifest_is_found_with_the_key(
    encrypted: Casbackup, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge_manifest(encrypted.repository)
    found = encrypted("check", "--json")
    assert found.status == 4
    (finding,) = found.json["findings"]
    assert (finding["severity"], finding["object"].endswith(".snap")) == ("damage", True)
    assert "not what was sealed in it" in finding["message"]
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "no-keys"))
    assert encrypted("check").status == 0


def test_repair_takes_nothing_forged_when_the_key_is_at_hand(encrypted: Casbackup, keys: Path, tmp_path: Path) -> None:
    """The partner has a forged copy of what is damaged here."""
    partner = tmp_path / "partner"
    encrypted.ok("init", "-q", "--encrypted", "--key", key_of(keys).fingerprint, "-r", partner)
    with Repository.open(str(encrypted.repository)) as here, Repository.open(str(partner)) as there:
        assert sync(LocalPeer(here), LocalPeer(there), SyncRequest()).is_complete
    forge_chunk(encrypted.repository)
    assert encrypted("check", "--read-data").status == 4
    encrypted.ok("repair", "-q", "--from", partner)
    assert encrypted.json("check", "--read-data")["damaged"] is False
    forge_chunk(encrypted.repository)
    forge_chunk(partner)
    assert encrypted("check", "--read-data").status == 4
    assert encrypted("repair", "--from", partner).status == 4
    with Repository.open(str(encrypted.repository)) as repository:
        assert len(damaged_ids(repository)) == 1


def test_the_wrong_key_is_not_used(encrypted: Casbackup, keys: Path) -> None:
    other = MasterKey.generate()
    with Repository.open(str(encrypted.repository)) as repository:
        with pytest.raises(Exception, match=other.fingerprint):
            repository.unlock(other)
        assert repository.codec.is_blind
        repository.unlock(key_of(keys))
        assert repository.codec.ids == keyed_codec(key_of(keys)).ids
