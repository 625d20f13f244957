"""A repository that was encrypted, and says that it is not any more, or has another key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .conftest import Casbackup


@pytest.fixture
def enc(bare: Casbackup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Casbackup:
    """The command, and an encrypted repository."""
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "keys"))
    bare.ok("init", "--encrypted", "--no-passphrase", "-q")
    return bare


def pretend_plain(repository: Path) -> str:
    """What whoever keeps the repository can do; gives the key that it had."""
    path = repository / "config.json"
    content = json.loads(path.read_bytes())
    fingerprint: str = content.pop("key_fingerprint")
    path.write_text(json.dumps(content))
    return fingerprint


def packs(repository: Path) -> list[Path]:
    return list(repository.rglob("*.pack"))


def test_nothing_is_sent_to_a_repository_that_says_it_is_plain(enc: Casbackup) -> None:
    fingerprint = pretend_plain(enc.repository)
    error = enc.fails(12, "backup", "vm/100", f"scsi0={enc.disk()}")
    assert error["code"] == "key-mismatch"
    assert fingerprint in error["message"] and "no key" in error["message"]
    assert packs(enc.repository) == []


def test_an_empty_plain_repository_in_its_place_is_no_better(enc: Casbackup, tmp_path: Path) -> None:
    enc.ok("-r", tmp_path / "other", "init", "-q")
    shutil.rmtree(enc.repository)
    shutil.move(tmp_path / "other", enc.repository)
    assert enc.fails(12, "backup", "vm/100", f"scsi0={enc.disk()}")["code"] == "key-mismatch"
    assert packs(enc.repository) == []


def test_nor_is_one_with_another_key(enc: Casbackup, tmp_path: Path) -> None:
    enc.ok("-r", tmp_path / "other", "init", "--encrypted", "--no-passphrase", "-q")
    shutil.rmtree(enc.repository)
    shutil.move(tmp_path / "other", enc.repository)
    assert enc.fails(12, "snapshots")["code"] == "key-mismatch"


def test_a_link_to_it_is_the_same_place(enc: Casbackup, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(enc.repository)
    pretend_plain(enc.repository)
    assert enc.fails(12, "-r", tmp_path / "link", "snapshots")["code"] == "key-mismatch"


def test_whoever_replaces_it_with_init_is_believed(enc: Casbackup) -> None:
    shutil.rmtree(enc.repository)
    enc.ok("init", "-q")
    enc.ok("backup", "vm/100", f"scsi0={enc.disk()}", "-q")
    shutil.rmtree(enc.repository)
    enc.ok("init", "--encrypted", "--no-passphrase", "-q")
    enc.ok("backup", "vm/100", f"scsi0={enc.disk()}", "-q")


def test_the_file_that_the_message_names_can_be_edited(enc: Casbackup, tmp_path: Path) -> None:
    pretend_plain(enc.repository)
    message = enc.fails(12, "snapshots")["message"]
    path = Path(message.rpartition(" ")[2])
    assert json.loads(path.read_bytes()).keys() == {str(enc.repository)}
    path.write_text("{}")
    enc.ok("snapshots")
