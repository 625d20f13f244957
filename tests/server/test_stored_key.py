"""The wrapped copy of a key that a server keeps: who may read it, and who may change it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casbackup.codec.crypto import Argon2Cost
from casbackup.codec.master_key import MasterKey
from casbackup.errors import CasbackupError, KeyExists, KeyFileDamaged, KeyMismatch, RightMissing, UsageError
from casbackup.keys.making import key_file_of
from casbackup.keys.wrapping import wrap_by_passphrase
from casbackup.repository.repository import Repository
from casbackup.spec.keyfile import KeyFile, encode_key_file
from casbackup_server.rights import Right

from .conftest import Result, Running, grant, serving, token_gate

KEY = MasterKey(bytes(range(32)))
COST = Argon2Cost(1, 64, 1)


def wrapped(key: MasterKey = KEY, passphrase: bytes = b"secret") -> bytes:
    return encode_key_file(KeyFile(key.fingerprint, "", "", (wrap_by_passphrase(key, passphrase, COST),)))


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Running]:
    """A server of an encrypted repository that wants tokens."""
    folder = tmp_path / "repository"
    Repository.create(str(folder), key_fingerprint=KEY.fingerprint).close()
    with serving(folder, token_gate) as running:
        yield running


def test_a_copy_comes_back_as_it_was(encrypted: Running) -> None:
    with encrypted.peer(grant(encrypted.folder, Right.BACKUP)) as peer:
        assert peer.config.key_fingerprint == KEY.fingerprint
        assert peer.stored_key() is None
        copy = wrapped()
        peer.store_key(copy, replace=False)
        assert peer.stored_key() == copy == encrypted.local().stored_key()
        peer.store_key(copy, replace=False)  # an answer that was lost, and the request made once more


@pytest.mark.parametrize("right", Right)
def test_who_may_read_it(encrypted: Running, right: Right) -> None:
    encrypted.local().store_key(wrapped(), replace=False)
    with encrypted.peer(grant(encrypted.folder, right)) as peer:
        if right in (Right.BACKUP, Right.RESTORE, Right.ADMIN):
            assert peer.stored_key() == encrypted.local().stored_key()
        else:
            with pytest.raises(RightMissing):
                peer.stored_key()


@pytest.mark.parametrize("right", Right)
def test_who_may_store_one(encrypted: Running, right: Right) -> None:
    """Whoever makes backups may store the first; so a client that was taken over cannot destroy it."""
    first, second = wrapped(), wrapped(passphrase=b"another")
    with encrypted.peer(grant(encrypted.folder, right)) as peer:
        if right not in (Right.BACKUP, Right.ADMIN):
            with pytest.raises(RightMissing):
                peer.store_key(first, replace=False)
            return
        peer.store_key(first, replace=False)
        with pytest.raises(KeyExists):
            peer.store_key(second, replace=False)
        if right is Right.BACKUP:
            with pytest.raises(RightMissing):
                peer.store_key(second, replace=True)
            assert peer.stored_key() == first
        else:
            peer.store_key(second, replace=True)
            assert peer.stored_key() == second


def test_what_is_refused(encrypted: Running) -> None:
    plain = encode_key_file(key_file_of(KEY, plain=True))
    refused: list[tuple[bytes, type[CasbackupError]]] = [
        (plain, UsageError),
        (wrapped(MasterKey.generate()), KeyMismatch),
        (wrapped()[:100], KeyFileDamaged),
        (b"", KeyFileDamaged),
    ]
    with encrypted.peer(grant(encrypted.folder, Right.ADMIN)) as peer:
        for data, error in refused:
            with pytest.raises(error):
                peer.store_key(data, replace=True)
        assert peer.stored_key() is None


def test_a_plain_repository_has_no_place_for_one(guarded: Running) -> None:
    with guarded.peer(grant(guarded.folder, Right.ADMIN)) as peer:
        assert peer.stored_key() is None
        with pytest.raises(KeyMismatch):
            peer.store_key(wrapped(), replace=False)


def test_a_client_with_nothing_but_a_passphrase(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The administrator of the server is told a fingerprint; the client makes the key, and stores a copy of it."""
    disk, keys = tmp_path / "vm.raw", tmp_path / "keys"
    disk.write_bytes(random.Random(1).randbytes(300_000))
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(keys))
    monkeypatch.setenv("CASBACKUP_PASSPHRASE", "secret")

    def ok(*arguments: object) -> str:
        result = run(*arguments)
        assert (result.status, result.err) == (0, ""), (arguments, result.err)
        return result.out

    fingerprint = json.loads(ok("key", "create", "--json"))["key"]["fingerprint"]
    folder = tmp_path / "repository"
    ok("-r", folder, "init", "--encrypted", "--key", fingerprint)
    with serving(folder, token_gate) as server:
        monkeypatch.setenv("CASBACKUP_TOKEN", grant(folder, Right.BACKUP, Right.RESTORE))
        ok("-r", server.url, "key", "store")
        ok("-r", server.url, "backup", "vm/100", f"scsi0={disk}", "-q")
        shutil.rmtree(keys)
        ok("-r", server.url, "restore", "vm/100", "--to", tmp_path / "out", "-q")
        assert not keys.exists()
        ok("-r", server.url, "key", "import", "--from-repository")
        assert fingerprint in ok("key", "list")
        shutil.rmtree(keys)
        monkeypatch.setenv("CASBACKUP_TOKEN", grant(folder, Right.READ))
        assert "vm/100" in ok("-r", server.url, "snapshots")
    assert (tmp_path / "out" / "scsi0.raw").read_bytes() == disk.read_bytes()
