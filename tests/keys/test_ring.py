"""The key folder: private, durable, and nothing in it is ever overwritten by another key."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.codec.master_key import MasterKey
from casbackup.errors import KeyExists, KeyExposed, KeyFileDamaged, KeyMissing, RepositoryFull, UsageError
from casbackup.fs import RealFile
from casbackup.keys.making import key_file_of
from casbackup.keys.ring import KeyRing, PrivateFiles
from casbackup.spec.keyfile import KeyFile


def new_file(comment: str = "") -> KeyFile:
    return key_file_of(MasterKey.generate(), plain=True, comment=comment)


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(str(tmp_path / "config" / "keys"))


def test_what_is_added_is_there(ring: KeyRing) -> None:
    files = [new_file() for _ in range(3)]
    for key_file in files:
        assert ring.add(key_file) == ring.path(key_file.fingerprint)
    assert ring.fingerprints() == sorted(file.fingerprint for file in files)
    assert [ring.read(file.fingerprint) for file in files] == files


def test_only_the_owner_gets_at_it(ring: KeyRing) -> None:
    before = os.umask(0)
    try:
        path = ring.add(new_file())
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(ring.folder).st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_a_file_that_others_get_at_is_refused(ring: KeyRing, mode: int) -> None:
    key_file = new_file()
    os.chmod(ring.add(key_file), mode)
    with pytest.raises(KeyExposed, match=f"{mode & 0o77:03o}"):
        ring.read(key_file.fingerprint)
    with pytest.raises(KeyExposed):
        ring.replace(key_file)


def test_a_folder_that_others_write_to_is_refused(ring: KeyRing) -> None:
    key_file = new_file()
    ring.add(key_file)
    os.chmod(ring.folder, 0o770)
    with pytest.raises(KeyExposed, match="keys:"):
        ring.read(key_file.fingerprint)
    with pytest.raises(KeyExposed):
        ring.add(new_file())
    os.chmod(ring.folder, 0o755)
    assert ring.read(key_file.fingerprint) == key_file


def test_a_key_is_never_overwritten(ring: KeyRing) -> None:
    key_file = new_file("the first")
    ring.add(key_file)
    with pytest.raises(KeyExists):
        ring.add(replace(key_file, comment="the second"))
    assert ring.read(key_file.fingerprint) == key_file
    assert os.listdir(ring.folder) == [f"{key_file.fingerprint}.json"]


def test_a_broken_file_is_not_overwritten_either(ring: KeyRing) -> None:
    key_file = new_file()
    path = Path(ring.add(key_file))
    path.write_bytes(path.read_bytes()[:100])
    for attempt in (ring.add, ring.replace):
        with pytest.raises((KeyExists, KeyFileDamaged)):
            attempt(key_file)
    assert len(path.read_bytes()) == 100
    with pytest.raises(KeyFileDamaged, match=path.name):
        ring.read(key_file.fingerprint)


def test_a_file_is_replaced_by_the_same_key_only(ring: KeyRing) -> None:
    key_file = new_file("the first")
    ring.add(key_file)
    ring.replace(replace(key_file, comment="the second"))
    assert ring.read(key_file.fingerprint).comment == "the second"
    with pytest.raises(KeyMissing):
        ring.replace(new_file())
    assert stat.S_IMODE(os.stat(ring.path(key_file.fingerprint)).st_mode) == 0o600


@pytest.mark.parametrize("step", ["create", "write", "sync", "rename"])
def test_a_disk_that_is_full_costs_no_key(ring: KeyRing, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    key_file = new_file("the first")
    ring.add(key_file)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = RealFile if step in ("write", "sync") else PrivateFiles
    with monkeypatch.context() as patched:
        patched.setattr(owner, step, full)
        patched.setattr(owner, "rename_new", full, raising=False)
        with pytest.raises(RepositoryFull, match=key_file.fingerprint):
            ring.replace(replace(key_file, comment="the second"))
        other = new_file()
        with pytest.raises(RepositoryFull, match=other.fingerprint):
            ring.add(other)
    assert ring.read(key_file.fingerprint) == key_file
    assert os.listdir(ring.folder) == [f"{key_file.fingerprint}.json"]


def test_a_file_called_after_another_key_is_refused(ring: KeyRing) -> None:
    key_file, other = new_file(), new_file()
    os.rename(ring.add(key_file), ring.path(other.fingerprint))
    with pytest.raises(KeyFileDamaged, match=key_file.fingerprint):
        ring.read(other.fingerprint)


def test_what_a_cut_off_writing_left_is_no_key(ring: KeyRing) -> None:
    key_file = new_file()
    path = ring.add(key_file)
    Path(f"{path}.123.456.tmp").write_bytes(b'{"casbackup')
    Path(ring.folder, "notes.txt").write_text("mine")
    Path(ring.folder, "0" * 31 + ".json").write_text("mine")
    assert ring.fingerprints() == [key_file.fingerprint]


def test_names(ring: KeyRing) -> None:
    with pytest.raises(KeyMissing):
        ring.only()
    key_file = new_file()
    ring.add(key_file)
    assert ring.only() == ring.find(key_file.fingerprint[:4].upper()) == key_file.fingerprint
    with pytest.raises(KeyMissing, match="zz"):
        ring.find("zz")
    ring.add(new_file())
    for ambiguous in (ring.only, lambda: ring.find("")):
        with pytest.raises(UsageError):
            ambiguous()
    with pytest.raises(KeyMissing, match="0" * 32):
        ring.read("0" * 32)
