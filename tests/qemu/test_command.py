"""``casbackup backup --qmp`` and ``casbackup job``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casbackup_client.main import main

from .conftest import BootGuest, Daemon, assert_clean, assert_prefix

pytestmark = pytest.mark.qemu
START = "import sys; from casbackup_client.main import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("CASBACKUP_REPOSITORY", str(tmp_path / "repository"))
    assert main(["init", "-q"]) == 0


class Command:
    """The command as a process of its own."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", START, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.started.append(process)
        return process

    def json(self, *arguments: object, status: int = 0) -> Any:
        process = self.start(*arguments, "--json")
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, err.decode()
        return json.loads(out if status == 0 else err)

    def wait_for_job(self, phase: str = "copying") -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while True:
            jobs: list[dict[str, Any]] = self.json("job", "list")["jobs"]
            if jobs and jobs[0]["phase"] == phase:
                return jobs[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def casbackup() -> Iterator[Command]:
    command = Command()
    yield command
    for process in command.started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_backup_and_restore(daemon: Daemon, casbackup: Command, tmp_path: Path) -> None:
    config = tmp_path / "100.conf"
    config.write_text("cores: 2\n")
    snapshot = casbackup.json("backup", "vm/100", "--qmp", daemon.qmp_path, "--config", config)["snapshot"]
    assert [disk["name"] for disk in snapshot["disks"]] == ["a", "b"]
    assert {"100.conf", "qemu-command-line"} <= {item["name"] for item in snapshot["configs"]}
    assert snapshot["live"]["mode"] == "push"
    assert snapshot["live"]["mode_note"]
    assert not snapshot["live"]["frozen"]
    shown = casbackup.start("show", "vm/100").communicate()[0].decode()
    assert "while the VM ran, QEMU" in shown
    casbackup.json("restore", "vm/100", "--to", tmp_path / "out")
    for name, path in daemon.disks.items():
        assert (tmp_path / "out" / f"{name}.raw").read_bytes() == path.read_bytes()
    again = casbackup.json("backup", "vm/100", "--qmp", daemon.qmp_path, "--exclude-disk", "b")["snapshot"]
    assert [disk["name"] for disk in again["disks"]] == ["a"]
    assert again["live"]["increments"] == ["a"]
    assert again["stats"]["read_bytes"] == 0


def test_a_lost_bitmap_is_said_plainly(daemon: Daemon, casbackup: Command) -> None:
    casbackup.json("backup", "vm/100", "--qmp", daemon.qmp_path)
    with daemon.qmp() as qmp:
        for node in qmp.execute("query-named-block-nodes"):
            for bitmap in node.get("dirty-bitmaps", ()):
                arguments = {"node": node["node-name"], "name": bitmap["name"]}
                qmp.execute("block-dirty-bitmap-remove", arguments)
    process = casbackup.start("backup", "vm/100", "--qmp", daemon.qmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"a was read as a whole: the dirty bitmap is lost" in err
    assert b"QEMU pushed the data: " in err


def test_jobs_can_be_steered_from_another_terminal(daemon: Daemon, casbackup: Command) -> None:
    backup = casbackup.start("backup", "vm/100", "--qmp", daemon.qmp_path, "--speed", "1MiB")
    job = casbackup.wait_for_job()
    assert (job["vm"], job["speed_limit_bytes_s"]) == ("vm/100", 1 << 20)
    assert casbackup.json("job", "pause", job["id"])["job"]["paused"]
    os.kill(backup.pid, signal.SIGUSR2)
    assert not casbackup.json("job", "list")["jobs"][0]["paused"]
    os.kill(backup.pid, signal.SIGUSR1)
    assert casbackup.json("job", "list")["jobs"][0]["paused"]
    assert casbackup.json("job", "speed", "vm/100", "1GiB")["job"]["speed_limit_bytes_s"] == 1 << 30
    assert not casbackup.json("job", "resume", "vm/100")["job"]["paused"]
    _, err = backup.communicate(timeout=60)
    assert backup.returncode == 0, err.decode()
    assert casbackup.json("job", "list")["jobs"] == []
    assert casbackup.json("job", "pause", "vm/100", status=2)["error"]["code"] == "backup-job-not-found"


@pytest.mark.parametrize("how", ["cancel", "SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_ending_a_backup_leaves_neither_snapshot_nor_anything_in_qemu(
    running: BootGuest, casbackup: Command, how: str
) -> None:
    backup = casbackup.start("backup", "vm/100", "--qmp", running.qmp_path, "--speed", "2MiB", "--mode", running.mode)
    job = casbackup.wait_for_job()
    if how == "cancel":
        casbackup.json("job", "cancel", job["id"])
    else:
        backup.send_signal(getattr(signal, how))
    _, err = backup.communicate(timeout=60)
    assert backup.returncode == 130, err.decode()
    with running.qmp() as qmp:
        assert_clean(qmp)
    assert casbackup.json("snapshots")["snapshots"] == []
    running.wait_written(running.written() + 64)
    assert running.errors == 0


def test_pulling(newer_guest: BootGuest, casbackup: Command, tmp_path: Path) -> None:
    """Chosen without being asked for; twice, the second time an increment."""
    for increments in ([], ["virtio-a", "virtio-b"]):
        snapshot = casbackup.json("backup", "vm/100", "--qmp", newer_guest.qmp_path)["snapshot"]
        live = snapshot["live"]
        assert (live["mode"], live["mode_note"], live["increments"]) == ("pull", "", increments)
        casbackup.json("restore", "vm/100", "--to", tmp_path / f"out{len(increments)}")
        disks = [(tmp_path / f"out{len(increments)}" / f"virtio-{name}.raw").read_bytes() for name in ("a", "b")]
        assert assert_prefix(*disks) > 0
    assert "(pull)" in casbackup.start("show", "vm/100").communicate()[0].decode()
    with newer_guest.qmp() as qmp:
        assert_clean(qmp, bitmaps=1)
    assert newer_guest.errors == 0


def test_qemu_is_killed(guest: BootGuest, casbackup: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no snapshot, and neither a process nor a socket of ours is left."""
    sinks = place / "tmp"
    sinks.mkdir()
    monkeypatch.setenv("TMPDIR", str(sinks))
    backup = casbackup.start("backup", "vm/100", "--qmp", guest.qmp_path, "--speed", "2MiB", "--json")
    casbackup.wait_for_job()
    assert list(sinks.glob("casbackup-*"))
    guest.kill()
    _, err = backup.communicate(timeout=60)
    assert json.loads(err[err.index(b"{") :])["error"]["code"] == "qmp-lost"
    assert casbackup.json("snapshots")["snapshots"] == []
    assert not list(sinks.glob("casbackup-*"))


@pytest.mark.slow
def test_a_guest_that_writes_is_restored_to_one_instant(guest: BootGuest, casbackup: Command, tmp_path: Path) -> None:
    casbackup.json("backup", "vm/100", "--qmp", guest.qmp_path)
    casbackup.json("backup", "vm/100", "--qmp", guest.qmp_path)
    casbackup.json("restore", "vm/100", "--to", tmp_path / "out")
    disks = [(tmp_path / "out" / f"virtio-{name}.raw").read_bytes() for name in ("a", "b")]
    assert assert_prefix(*disks) > 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--qmp", "/nonexistent"], "qmp-unreachable"),
        (["--speed", "1MiB", "a=/dev/null"], "usage"),
        (["--qmp", "QMP", "a=/dev/null"], "usage"),
        (["--qmp", "QMP", "--disk", "c"], "disk-unknown"),
        (["--qmp", "QMP", "--exclude-disk", "c"], "disk-unknown"),
        (["--qmp", "QMP", "--disk", "x=nothing"], "disk-unknown"),
        (["--qmp", "QMP", "--freeze", "require"], "guest-agent-unavailable"),
        (["--qmp", "QMP", "--mode", "pull"], "live-unsupported"),
        (["--qmp", "QMP", "--memory", "1MiB"], "usage"),
        (["--qmp", "QMP", "--spool", "/nonexistent"], "target-unwritable"),
        (["--qmp", "QMP", "--spool", "/tmp", "--spool-limit", "1KiB"], "usage"),
        (["--qmp", "QMP", "--spool-limit", "1GiB"], "usage"),
        (["--qmp", "QMP", "--max-guest-stall", "0s"], "usage"),
    ],
)
def test_what_makes_no_sense_is_refused(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], arguments: list[str], code: str
) -> None:
    given = [daemon.qmp_path if text == "QMP" else text for text in arguments]
    assert main(["backup", "vm/100", *given, "--json"]) != 0
    assert json.loads(capsys.readouterr().err)["error"]["code"] == code
    with daemon.qmp() as qmp:
        assert_clean(qmp)
