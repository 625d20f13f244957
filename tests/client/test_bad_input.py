"""Wrong requests: each has an error of its own, and nothing is lost or left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import Casbackup, MiB


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["vm/100", "scsi0=missing.raw"], "source-not-found"),
        (["vm/100", "scsi0=/"], "source-unreadable"),
        (["vm/100", "scsi0=/dev/null"], "source-unreadable"),
        (["vm/100", "scsi0=nbd+unix:///?socket=/nowhere"], "nbd-connection-failed"),
        (["vm/100", "--config", "missing.conf"], "source-not-found"),
        (["vm/100", "--config", "/"], "invalid-name"),
    ],
)
def test_sources_that_cannot_be_read(cb: Casbackup, arguments: list[str], code: str) -> None:
    error = cb.fails(2 if code == "invalid-name" else 5, "backup", *arguments)
    assert error["code"] == code
    assert cb.json("snapshots") == {"snapshots": []}
    assert cb.json("sessions") == {"sessions": []}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["vm/100", "scsi0={disk}", "scsi0={disk}"], "duplicate-disk"),
        (["vm/100", "../x={disk}"], "invalid-name"),
        (["vm/100", "=x"], "invalid-name"),
        (["vm/100", "{disk}"], "usage"),
        (["vm/100", "scsi0="], "usage"),
        (["vm/100", "a=-", "b=-"], "usage"),
        (["vm/100"], "usage"),
        (["100", "scsi0={disk}"], "invalid-name"),
        (["vm/..", "scsi0={disk}"], "invalid-name"),
        (["vm/100", "scsi0={disk}", "--label", "a b"], "invalid-name"),
        (["vm/100", "scsi0={disk}", "--namespace", "a//b"], "invalid-name"),
        (["vm/100", "scsi0={disk}", "--time", "yesterday"], "invalid-value"),
        (["vm/100", "scsi0={disk}", "--resume", "x"], "invalid-name"),
        (["vm/100", "scsi0={disk}", "--config", "{disk}", "--config", "{disk}"], "usage"),
    ],
)
def test_requests_that_make_no_sense(cb: Casbackup, arguments: list[str], code: str) -> None:
    disk = cb.disk()
    assert cb.fails(2, "backup", *(a.format(disk=disk) for a in arguments))["code"] == code
    assert cb.json("snapshots", "--all-namespaces") == {"snapshots": []}
    assert cb.json("sessions") == {"sessions": []}


def test_a_session_that_is_not_there(cb: Casbackup) -> None:
    error = cb.fails(1, "backup", "vm/100", f"scsi0={cb.disk()}", "--resume", "0" * 32)
    assert error["code"] == "session-not-found"
    assert cb.fails(1, "sessions", "abort", "0" * 32)["code"] == "session-not-found"


def test_a_repository_that_is_none(bare: Casbackup) -> None:
    disk = bare.disk()
    backup = ["backup", "vm/100", f"scsi0={disk}"]
    assert bare.fails(10, *backup)["code"] == "repository-not-found"
    bare.repository.mkdir()
    assert bare.fails(10, *backup)["code"] == "not-a-repository"
    assert list(bare.repository.iterdir()) == []
    assert bare.fails(10, *backup, "-r", disk)["code"] == "not-a-repository"


def test_no_repository_is_named(bare: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASBACKUP_REPOSITORY")
    error = bare.fails(2, "snapshots")
    assert "CASBACKUP_REPOSITORY" in error["message"]


@pytest.mark.parametrize(
    ("number", "status", "code"), [("2", 13, "unsupported-format"), ('"x"', 4, "repository-config-damaged")]
)
def test_a_repository_of_another_version(cb: Casbackup, number: str, status: int, code: str) -> None:
    config = cb.repository / "config.json"
    text = config.read_text()
    assert '"format": 1' in text
    config.write_text(text.replace('"format": 1', f'"format": {number}'))
    for arguments in (["snapshots"], ["check"], ["migrate"]):
        assert cb.fails(status, *arguments)["code"] == code


def test_two_inits(cb: Casbackup) -> None:
    before = (cb.repository / "config.json").read_bytes()
    assert cb.fails(1, "init")["code"] == "repository-exists"
    assert (cb.repository / "config.json").read_bytes() == before


def test_init_in_a_place_of_something_else(bare: Casbackup) -> None:
    disk = bare.disk()
    assert bare.fails(1, "init", "-r", bare.folder)["code"] == "repository-exists"
    assert bare.fails(6, "init", "-r", disk)["code"] == "target-unsuitable"
    assert sorted(bare.folder.iterdir()) == [disk]


def test_a_repository_that_was_moved(cb: Casbackup) -> None:
    disk = cb.disk()
    cb.ok("backup", "vm/100", f"scsi0={disk}")
    moved = cb.folder / "elsewhere"
    shutil.move(cb.repository, moved)
    assert cb.ok("dump", "vm/100", "scsi0", "-r", moved).out == disk.read_bytes()
    cb.ok("check", "--read-data", "-q", "-r", moved)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder bind-mounted on itself read-only: file rights do not stop root."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]):
        done = subprocess.run(list(map(str, command)), capture_output=True)
        if done.returncode != 0:
            subprocess.run(["umount", str(folder)], capture_output=True)
            pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_read_only_folder(cb: Casbackup) -> None:
    disk = cb.disk()
    cb.ok("backup", "vm/100", f"scsi0={disk}")
    with read_only(cb.repository):
        writing: list[list[object]] = [
            ["backup", "vm/100", f"scsi0={disk}"],
            ["gc"],
            ["forget", "--keep-last", "1"],
            ["pin", "vm/100"],
            ["label", "vm/100", "--add", "x"],
            ["repair"],
        ]
        for arguments in writing:
            assert cb.fails(1, *arguments)["code"] == "repository-read-only", arguments
        assert cb.ok("dump", "vm/100", "scsi0").out == disk.read_bytes()
        assert len(cb.json("snapshots")["snapshots"]) == 1
        assert cb.json("stats")["total"]["logical_bytes"] == 6 * MiB
        cb.ok("check", "--read-data")


def test_snapshots_that_are_not_there(cb: Casbackup) -> None:
    disk = cb.disk()
    cb.ok("backup", "vm/100", f"scsi0={disk}")
    cb.ok("backup", "vm/100", f"scsi0={disk}")
    for reference, code in (
        ("vm/101", "snapshot-not-found"),
        ("vm/100@1999", "snapshot-not-found"),
        ("vm/100@20", "snapshot-ambiguous"),
        ("ffffffffffffffffff", "snapshot-not-found"),
    ):
        assert cb.fails(14, "show", reference)["code"] == code
    assert cb.fails(2, "show", "xyz")["code"] == "invalid-name"
    for missing in (["scsi9"], ["--config", "none"]):
        assert cb.fails(14, "dump", "vm/100", *missing, "-o", "x")["code"] == "snapshot-not-found"


def test_command_lines_that_are_wrong(bare: Casbackup) -> None:
    wrong = ["bakup", "gc --what", "show", "init --compression-level 99", "check --older-than x"]
    for arguments in map(str.split, wrong):
        assert bare.fails(2, *arguments)["exit_status"] == 2
    assert "did you mean 'backup'" in bare("bakup").err
    assert "`casbackup gc --help`" in bare("gc", "--what").err
