"""Snapshots with a VM's memory: from the command to the VM that goes on, and through everything in between."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casbackup_client.main import main

from .conftest import BootGuest, assert_clean, writes_in
from .test_vmstate import MEMORY, assert_guest_goes_on, assert_vm_goes_on, loaded

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]
VM = "vm/100"


class Command:
    """The command in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self.errors = ""

    def run(self, *arguments: object, status: int = 0) -> str:
        self._capture.readouterr()
        found = main([str(argument) for argument in arguments])
        output, self.errors = self._capture.readouterr()
        assert found == status, self.errors
        return output

    def json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def backup(self, guest: BootGuest, *arguments: object) -> Any:
        return self.json("backup", VM, "--qmp", guest.qmp_path, *arguments)["snapshot"]


@pytest.fixture
def casbackup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("CASBACKUP_REPOSITORY", str(tmp_path / "repository"))
    command = Command(capsys)
    command.run("init", "-q")
    return command


def disks_in(folder: Path) -> list[bytes]:
    return [(folder / f"virtio-{name}.raw").read_bytes() for name in "ab"]


def test_backup_and_restore(guest: BootGuest, casbackup: Command, place: Path) -> None:
    out = place / "out"
    before = guest.written()
    first = casbackup.backup(guest, "--with-vmstate")
    assert "the guest stood still for 0." in casbackup.errors
    assert [disk.get("role") for disk in first["disks"]] == [None, None, "vmstate"]
    assert first["live"]["vmstate"] == "background"
    assert 0 < first["live"]["pause_ms"] < 2000
    assert not first["live"]["frozen"]
    assert "with its memory (background), for which it stood still for" in casbackup.run("show", VM)
    guest.wait_written(guest.written() + 64)

    second = casbackup.backup(guest)
    assert len(second["disks"]) == 2
    assert second["live"]["increments"] == ["virtio-a", "virtio-b"], "one without memory is an increment of it"
    casbackup.run("restore", VM, "--to", place / "without", "--vmstate", place / "nothing", status=14)
    assert "without the VM's memory" in casbackup.errors
    assert not (place / "without").exists()
    assert not (place / "nothing").exists()

    third = casbackup.backup(guest, "--with-vmstate=auto")
    assert third["live"]["increments"] == ["virtio-a", "virtio-b"]
    with guest.qmp() as qmp:
        assert_clean(qmp, bitmaps=1)
    assert_guest_goes_on(guest)

    text = casbackup.run("-v", "restore", first["id"], "--to", out)
    assert f"-incoming 'exec:cat {out}/vmstate.bin'" in text
    assert writes_in(*disks_in(out)) >= before
    assert_vm_goes_on(place / "first", disks_in(out), (out / "vmstate.bin").read_bytes())
    casbackup.run("restore", third["id"], "--to", place / "out3", "--vmstate", place / "state", "--format", "raw")
    assert not (place / "out3" / "vmstate.bin").exists()
    assert_vm_goes_on(place / "third", disks_in(place / "out3"), (place / "state").read_bytes())


def test_everything_else_takes_it_as_well(guest: BootGuest, casbackup: Command, place: Path) -> None:
    snapshot = casbackup.backup(guest, "--with-vmstate")
    casbackup.run("restore", VM, "--vmstate", place / "state")
    state = (place / "state").read_bytes()
    assert len(state) == snapshot["disks"][2]["size_bytes"]
    casbackup.run("dump", VM, "vmstate", "-o", place / "dumped")
    assert (place / "dumped").read_bytes() == state

    casbackup.run("check", "--read-data")
    casbackup.run("-r", place / "copy", "init", "-q")
    casbackup.run("sync", os.environ["CASBACKUP_REPOSITORY"], place / "copy")
    [copy] = casbackup.json("-r", place / "copy", "snapshots")["snapshots"]
    assert copy["disks"] == snapshot["disks"]

    casbackup.run("export", VM, place / "it.vma")
    casbackup.run("archive", "verify", place / "it.vma")
    casbackup.run("import", "vm/101", place / "it.vma")
    casbackup.run("restore", "vm/101", "--to", place / "out")
    imported = (place / "out" / "vmstate.bin").read_bytes()
    assert imported == state + bytes(-len(state) % 512)
    casbackup.run("restore", VM, "--to", place / "again", "--format", "qcow2")
    assert (place / "again" / "vmstate.bin").read_bytes() == state, "a stream is no image"
    disks = [path.read_bytes() for path in sorted((place / "out").glob("*.raw"))]
    assert_vm_goes_on(place / "vm101", disks, imported)


@pytest.fixture
def large_guest(place: Path) -> Iterator[BootGuest]:
    (place / "content").write_bytes(os.urandom(MEMORY))
    made = BootGuest(place, loaded(place))
    with contextlib.closing(made):
        made.wait_written(64)
        yield made


def test_memory_that_did_not_change_is_stored_once(large_guest: BootGuest, casbackup: Command, place: Path) -> None:
    first = casbackup.backup(large_guest, "--with-vmstate")
    assert first["disks"][2]["size_bytes"] > MEMORY
    assert first["stats"]["new_bytes"] > MEMORY
    assert_guest_goes_on(large_guest)
    second = casbackup.backup(large_guest, "--with-vmstate")
    assert second["stats"]["new_bytes"] < 0.2 * MEMORY
    casbackup.run("restore", VM, "--to", place / "out")
    assert_vm_goes_on(
        place / "again", disks_in(place / "out"), (place / "out" / "vmstate.bin").read_bytes(), extra=loaded(place)[:2]
    )


def test_what_makes_no_sense(casbackup: Command, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(4096))
    casbackup.run("backup", VM, f"a={tmp_path}/a.raw", "--with-vmstate", status=2)
    casbackup.run("backup", VM, "--qmp", "/nowhere", "--freeze", "require", "--with-vmstate", status=2)
    assert "contradict each other" in casbackup.errors
    casbackup.run("backup", VM, "--qmp", "/nowhere", "--with-vmstate=soon", status=2)
    casbackup.run("backup", VM, f"a={tmp_path}/a.raw")
    casbackup.run("restore", VM, "--vmstate", "-", status=14)
