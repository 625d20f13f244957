"""``sync`` between repositories of one key, and ``sync --rekey`` between those of two."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Casbackup, MiB

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(autouse=True)
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def encrypted(history: Casbackup) -> Path:
    """An empty encrypted repository beside a plain one with a history."""
    return made(history, "encrypted")


def made(cb: Casbackup, name: str, *options: object) -> Path:
    cb.ok("init", "-q", "-r", cb.folder / name, "--encrypted", *(options or ("--no-passphrase",)))
    return cb.folder / name


def restored(cb: Casbackup, repository: Path, reference: str) -> bytes:
    out = cb.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    cb.ok("restore", "-q", "-r", repository, reference, "--to", out)
    return (out / "scsi0.raw").read_bytes()


def facts(cb: Casbackup, repository: Path) -> list[tuple[object, ...]]:
    found = cb.json("snapshots", "-r", repository)["snapshots"]
    return [(s["namespace"], s["vm"], s["time"], s["sequence"], s["labels"], s["notes"], s["pinned"]) for s in found]


def test_from_plain_to_encrypted(history: Casbackup, encrypted: Path) -> None:
    history.ok("label", "vm/200", "--add", "weekly", "--notes", "keep it", "-q")
    history.ok("pin", "vm/200", "-q")
    refused = history.fails(12, "sync", history.repository, encrypted)
    assert refused["code"] == "key-mismatch"
    assert "is not encrypted" in refused["message"] and "--rekey" in refused["advice"]
    planned = history.ok("sync", "--rekey", "--dry-run", "--json", history.repository, encrypted).json
    assert planned["rekey"]["expected_read_bytes"] == 5 * MiB
    assert facts(history, encrypted) == []
    told = history("sync", "--rekey", history.repository, encrypted)
    assert told.status == 0
    assert "6 snapshots to copy: about 5.00 MiB of content are read, decrypted and encrypted here, once" in told.err
    assert told.text.splitlines()[-1].startswith("sync: 6 copied; read 5.00 MiB of content, sent ")
    assert facts(history, encrypted) == facts(history, history.repository)
    again = history.json("sync", "--rekey", history.repository, encrypted)
    assert (again["rekey"]["read_bytes"], again["sent_bytes"]) == (0, 0)
    for time_text in ("2026-11-01", "2026-11-05"):
        assert restored(history, encrypted, f"vm/100@{time_text}") == restored(
            history, history.repository, f"vm/100@{time_text}"
        )
    assert history.json("check", "-r", encrypted, "--read-data")["damaged"] is False


def test_back_to_plain_is_warned_of(history: Casbackup, encrypted: Path) -> None:
    history("sync", "--rekey", "-q", history.repository, encrypted)
    plain = history.folder / "plain"
    history.ok("init", "-q", "-r", plain)
    told = history("sync", "--rekey", "-q", encrypted, plain)
    assert (told.status, told.out) == (0, b"")
    assert told.err == "casbackup: the destination is not encrypted: whoever has it can read what is copied\n"
    assert facts(history, plain) == facts(history, history.repository)


def test_keys_of_two_profiles(bare: Casbackup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a passphrase of its own, and the fingerprint that it must have."""
    config = ""
    for name in ("old", "new"):
        (bare.folder / f"{name}.passphrase").write_text(f"the passphrase of {name}\n")
        with monkeypatch.context() as patch:
            patch.setenv("CASBACKUP_PASSPHRASE_FILE", str(bare.folder / f"{name}.passphrase"))
            key = bare.json("init", "-r", bare.folder / name, "--encrypted")["new_key"]["fingerprint"]
        config += f'[profiles.{name}]\nrepository = "{bare.folder / name}"\nkey = "{key}"\n'
        config += f'passphrase-file = "{bare.folder / name}.passphrase"\n'
    (bare.folder / "config.toml").write_text(config)
    monkeypatch.delenv("CASBACKUP_REPOSITORY")
    monkeypatch.setenv("CASBACKUP_CONFIG", str(bare.folder / "config.toml"))
    bare.ok("--profile", "old", "backup", "-q", "vm/100", f"scsi0={bare.disk()}")
    with monkeypatch.context() as patch:  # what a profile has of its own counts before
        patch.setenv("CASBACKUP_KEY", key)
        patch.setenv("CASBACKUP_PASSPHRASE", "of another key")
        document = bare.json("sync", "--rekey", "profile:old", "profile:new")
    assert document["snapshots"][0]["outcome"] == "copied"
    assert None not in (document["rekey"]["source_key"], document["rekey"]["destination_key"])
    shown = bare.json("--profile", "new", "show", "vm/100")["snapshot"]
    assert shown["id"] != bare.json("--profile", "old", "show", "vm/100")["snapshot"]["id"]


def test_with_the_same_key_it_is_no_rekeying(bare: Casbackup, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made(bare, "one")
    (key,) = [path.stem for path in keys.iterdir()]
    other = made(bare, "other", "--key", key)
    bare.ok("backup", "-q", "-r", one, "vm/100", f"scsi0={bare.disk()}")
    assert "same key" in bare.fails(2, "sync", "--rekey", one, other)["message"]
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(bare.folder / "no-keys"))
    document = bare.json("sync", one, other)
    assert (document["equal"], document["rekey"]) == (True, None)
    bare.ok("check", "-q", "-r", other, "--read-data")
    assert bare.fails(12, "restore", "-r", other, "vm/100", "--to", bare.folder / "out")["code"] == "key-missing"


def test_it_may_be_killed(bare: Casbackup, start: Start) -> None:
    """What was complete stays, and the next run completes the rest."""
    plain, target = bare.folder / "plain", made(bare, "target")
    bare.ok("init", "-q", "-r", plain)
    source = random.Random(5)
    contents = {}
    for vm in ("vm/1", "vm/2", "vm/3"):
        contents[vm] = source.randbytes(3 * MiB)
        (bare.folder / "disk").write_bytes(contents[vm])
        bare.ok("backup", "-q", "-r", plain, vm, f"scsi0={bare.folder / 'disk'}")
    process = start("sync", "--rekey", plain, target, "--limit-rate", "1MiB")
    deadline = time.monotonic() + 90
    while not facts(bare, target):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    complete = len(facts(bare, target))
    assert 0 < complete < 3
    bare.ok("gc", "-q", "-r", target)  # what was sent is held for the next run
    document: dict[str, Any] = bare.json("sync", "--rekey", plain, target)
    outcomes = [item["outcome"] for item in document["snapshots"]]
    assert outcomes == ["present"] * complete + ["copied"] * (3 - complete)
    for vm, content in contents.items():
        assert restored(bare, target, vm) == content
    assert bare.json("check", "-r", target, "--read-data")["damaged"] is False
