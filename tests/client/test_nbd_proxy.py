"""Disks served to a VM by ``nbd-proxy``, and backed up at one instant while it writes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from casbackup.block.device import read_bytes
from casbackup.block.nbd.client import NbdClient
from tests.boot_guest import BOOT_DISK, DISK_BYTES, BootGuest, check_prefix

from .conftest import Casbackup, MiB
from .serving import document_of, ended

Start = Callable[..., subprocess.Popen[bytes]]
SIZE = 6 * MiB
BLOCK = 4096


def write_number(number: int) -> tuple[int, bytes]:
    """Where write ``number`` goes on disk ``number % 2``, and its data."""
    block = (number * 0x9E3779B1 & 0xFFFFFFFF) % (SIZE // BLOCK)
    return block * BLOCK, (number + 1).to_bytes(8, "big") * (BLOCK // 8)


def check_one_instant(first: bytes, second: bytes) -> None:
    """Both disks are as the same number of writes left them."""
    count = max(int.from_bytes(disk[at : at + 8], "big") for disk in (first, second) for at in range(0, SIZE, BLOCK))
    expected = [bytearray(SIZE), bytearray(SIZE)]
    for number in range(count):
        offset, data = write_number(number)
        expected[number % 2][offset : offset + BLOCK] = data
    assert count > 100 and [first, second] == expected


class Writer:
    """A guest without a VM: writes blocks to two disks in turn, as fast as it can."""

    def __init__(self, uris: list[str]) -> None:
        self._disks = [NbdClient.connect(uri) for uri in uris]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._many = threading.Event()
        self.errors: list[Exception] = []

    def __enter__(self) -> Writer:
        self._thread.start()
        assert self._many.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for disk in self._disks:
            disk.close()

    def _run(self) -> None:
        number = 0
        while not self._over.is_set() and not self.errors:
            try:
                self._disks[number % 2].write(*write_number(number))
            except Exception as error:
                self.errors.append(error)
            number += 1
            if number == 200:
                self._many.set()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="cb-"))
    yield folder
    shutil.rmtree(folder)


def test_backups_while_a_guest_writes(cb: Casbackup, start: Start, short: Path) -> None:
    for name in ("root.raw", "data.raw"):
        (cb.folder / name).write_bytes(bytes(SIZE))
    disks = [cb.folder / "root.raw", f"scsi1={cb.folder / 'data.raw'}"]
    process = start("nbd-proxy", *disks, "--listen", f"unix:{short}/proxy", "--scratch-folder", short, "--json")
    exports = document_of(process)["exports"]
    assert [(e["disk"], e["size_bytes"]) for e in exports] == [("root", SIZE), ("scsi1", SIZE)]
    sources = [f"{export['disk']}={export['snapshot_uri']}" for export in exports]
    with Writer([export["uri"] for export in exports]) as writer:
        for _ in range(2):
            cb.ok("backup", "vm/100", *sources, "-q")
            check_one_instant(cb.ok("dump", "vm/100", "root").out, cb.ok("dump", "vm/100", "scsi1").out)
    assert not writer.errors
    assert ended(process) == (0, "", "")
    check_one_instant((cb.folder / "root.raw").read_bytes(), (cb.folder / "data.raw").read_bytes())


def test_too_little_scratch_space_breaks_the_backup_and_not_the_guest(cb: Casbackup, start: Start, short: Path) -> None:
    (cb.folder / "disk.raw").write_bytes(b"a" * SIZE)
    options = ["--listen", f"unix:{short}/proxy", "--scratch-folder", short, "--scratch-limit", "128KiB"]
    process = start("nbd-proxy", cb.folder / "disk.raw", *options, "--json")
    (export,) = document_of(process)["exports"]
    with NbdClient.connect(export["uri"]) as guest, NbdClient.connect(export["snapshot_uri"]):
        for number in range(3):
            guest.write(number * 128 * 1024, b"b" * BLOCK)
        error = cb.fails(5, "backup", "vm/100", f"disk={export['snapshot_uri']}")
        assert error["code"] == "nbd-request-failed" and "131072" in error["message"]
        assert read_bytes(guest, 2 * 128 * 1024, BLOCK) == b"b" * BLOCK
    assert cb.json("snapshots")["snapshots"] == []
    status, _out, err = ended(process)
    assert status == 0 and err.startswith("casbackup: disk@snapshot: ") and "131072" in err


class Machine:
    """A VM whose disks all come from an ``nbd-proxy``, and the images below."""

    def __init__(self, cb: Casbackup, start: Start, folder: Path) -> None:
        self._start = start
        self._folder = folder
        self.images = {name: cb.folder / f"{name}.raw" for name in ("boot", "a", "b")}
        for path in self.images.values():
            path.write_bytes(b"")
            os.truncate(path, DISK_BYTES)
        self.images["boot"].write_bytes(BOOT_DISK)
        self.proxy = self.start_proxy()
        self.guest = BootGuest(folder, [option for export in self.exports for option in _attached(export)])

    def start_proxy(self) -> subprocess.Popen[bytes]:
        where = ["--listen", f"unix:{self._folder}/proxy", "--scratch-folder", self._folder]
        self.proxy = self._start("nbd-proxy", *self.images.values(), *where, "--json")
        self.exports = document_of(self.proxy)["exports"]
        return self.proxy

    @property
    def sources(self) -> list[str]:
        """Its disks as a backup is told of them."""
        return [f"{export['disk']}={export['snapshot_uri']}" for export in self.exports]

    def held_backup(self) -> subprocess.Popen[bytes]:
        """A backup that has the disks open, and waits for a pipe that is never written to before it reads them."""
        return self._start("backup", "vm/100", "held=-", *self.sources, "-q", stdin=subprocess.PIPE)

    def close(self) -> None:
        self.guest.kill()
        self.proxy.kill()
        self.proxy.communicate()


def _attached(export: dict[str, Any]) -> list[str]:
    number = ("boot", "a", "b").index(export["disk"]) + 1
    return [*export["qemu"].split(" ", 1), "-device", f"virtio-blk-pci,drive={export['disk']},bootindex={number}"]


@pytest.fixture
def machine(cb: Casbackup, start: Start, short: Path) -> Iterator[Machine]:
    machine = Machine(cb, start, short)
    machine.guest.wait_written(64)
    yield machine
    machine.close()


def writes_in_backup(cb: Casbackup) -> int:
    """How many writes of the guest the latest backup holds; both disks hold the same ones."""
    assert cb.ok("dump", "vm/100", "boot").out == BOOT_DISK
    return check_prefix(cb.ok("dump", "vm/100", "a").out, cb.ok("dump", "vm/100", "b").out)


@pytest.mark.qemu
def test_backups_of_a_running_vm(cb: Casbackup, machine: Machine) -> None:
    """Each holds its disks at one instant, and the guest sees no error."""
    counts: list[int] = []
    for _ in range(2):
        least = machine.guest.written()
        cb.ok("backup", "vm/100", *machine.sources, "-q")
        counts.append(writes_in_backup(cb))
        assert counts[-1] >= least
        machine.guest.wait_written(64)
    assert machine.guest.written() > counts[1] > counts[0]
    assert not machine.guest.saw_errors()
    assert not cb.json("check", "--read-data")["damaged"]
    machine.guest.kill()
    assert ended(machine.proxy)[0] == 0  # and a line if it was killed within a request
    assert check_prefix(machine.images["a"].read_bytes(), machine.images["b"].read_bytes()) > counts[1]


@pytest.mark.qemu
def test_a_backup_that_is_killed_costs_the_vm_nothing(cb: Casbackup, machine: Machine) -> None:
    backup = machine.held_backup()
    deadline = time.monotonic() + 30
    while not cb.json("sessions")["sessions"]:
        assert backup.poll() is None and time.monotonic() < deadline
    machine.guest.wait_written(64)
    backup.kill()
    backup.communicate()
    killed_at = machine.guest.written()
    machine.guest.wait_written(64)
    assert cb.json("snapshots")["snapshots"] == []
    cb.ok("backup", "vm/100", *machine.sources, "-q")
    assert writes_in_backup(cb) > killed_at
    assert not machine.guest.saw_errors()


@pytest.mark.qemu
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_proxy_that_is_started_again_costs_the_vm_nothing(
    cb: Casbackup, machine: Machine, number: signal.Signals
) -> None:
    """QEMU connects anew to the same socket, and what the guest was told is written, is."""
    backup = machine.held_backup()
    machine.guest.wait_written(64)
    ended(machine.proxy, number)
    _out, err = backup.communicate(timeout=60)
    assert backup.returncode != 0 and b"casbackup: " in err
    machine.start_proxy()
    machine.guest.wait_written(64)
    cb.ok("backup", "vm/100", *machine.sources, "-q")
    assert writes_in_backup(cb) >= 192
    assert not machine.guest.saw_errors()
    machine.guest.kill()
    assert ended(machine.proxy)[0] == 0  # and a line if it was killed within a request
    check_prefix(machine.images["a"].read_bytes(), machine.images["b"].read_bytes())


def test_a_disk_in_use_is_not_served_again(cb: Casbackup, start: Start, short: Path) -> None:
    disk = cb.disk()
    process = start("nbd-proxy", disk, "--listen", f"unix:{short}/proxy", "--json")
    document_of(process)
    assert cb.fails(6, "nbd-proxy", disk)["code"] == "disk-in-use"
    assert ended(process)[0] == 0


@pytest.mark.parametrize(
    ("status", "code", "arguments"),
    [
        (5, "source-not-found", ["missing.raw"]),
        (2, "usage", ["nbd://localhost/x"]),
        (2, "duplicate-disk", ["a=vm.raw", "a=vm.raw"]),
        (2, "invalid-name", ["...raw"]),
        (2, "invalid-value", ["vm.raw", "--scratch-limit", "much"]),
        (6, "target-unwritable", ["vm.raw", "--scratch-folder", "/nowhere"]),
    ],
)
def test_bad_input(
    bare: Casbackup, monkeypatch: pytest.MonkeyPatch, status: int, code: str, arguments: list[str]
) -> None:
    bare.disk()
    monkeypatch.chdir(bare.folder)
    assert bare.fails(status, "nbd-proxy", *arguments)["code"] == code
