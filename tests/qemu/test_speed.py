"""How fast a live backup is, as a ratio to a target that does nothing."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection, find_disks
from casbackup.qemu.features import detect
from casbackup.qemu.machine import Machine
from casbackup.qemu.push import PushSource
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions, Mode
from casbackup.repository.repository import Repository

from .conftest import Daemon, Vm, need
from .test_live import Backups

pytestmark = [pytest.mark.qemu, pytest.mark.bench, pytest.mark.timeout(600)]
GiB = 1 << 30
REPEATS = 3


class Nothing:
    def write(self, disk: str, offset: int, data: memoryview) -> None: ...

    def zero(self, disk: str, offset: int, length: int) -> None: ...


def to_nbdkit(qmp: QmpClient, folder: Path) -> None:
    """QEMU's own job, with its defaults, to a target that drops everything."""
    path = folder / "null.sock"
    path.unlink(missing_ok=True)
    server = subprocess.Popen([need("nbdkit"), "--exit-with-parent", "-f", "-U", path, "null", f"size={GiB}"])
    try:
        while not path.exists():
            time.sleep(0.01)
        server_address = {"type": "unix", "path": str(path)}
        qmp.execute("blockdev-add", {"driver": "nbd", "node-name": "null", "export": "", "server": server_address})
        qmp.execute("blockdev-backup", {"job-id": "j", "device": "a", "target": "null", "sync": "full"})
        while qmp.execute("query-jobs"):
            qmp.wait_event(0.05)
        qmp.execute("blockdev-del", {"node-name": "null"})
    finally:
        server.kill()
        server.wait()


def to_nobody(qmp: QmpClient) -> None:
    disks = find_disks(qmp, Selection())
    options = LiveOptions(freeze=FreezePolicy.NEVER)
    PushSource(qmp, detect(qmp), options, LiveControl(), print).run([DiskTask(d, None) for d in disks], Nothing())


def in_mode(qmp: QmpClient, mode: Mode) -> None:
    machine = Machine(qmp, Selection(), LiveOptions(freeze=FreezePolicy.NEVER), mode)
    machine.source(LiveControl(), print, None).run([DiskTask(disk, None) for disk in machine.disks], Nothing())


def best_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.monotonic()
        run()
        times.append(time.monotonic() - began)
    return min(times)


def test_speed(place: Path, repository: Repository) -> None:
    disk = place / "a.raw"
    with disk.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(GiB // 64))
    daemon = Daemon(place, {"a": disk})
    backups = Backups(repository)
    try:
        with daemon.qmp() as qmp:
            null = best_s(lambda: to_nbdkit(qmp, place))
            sink = best_s(lambda: to_nobody(qmp))
            backups.take(qmp, track=False)
            repeat = best_s(lambda: backups.take(qmp, track=False))
            began = time.monotonic()
            backups.take(qmp)
            backups.take(qmp)
            increment = time.monotonic() - began - repeat
    finally:
        daemon.close()
    rate = GiB / 1e6
    print(
        f"\nnbdkit null {rate / null:.0f} MB/s, sink {rate / sink:.0f} MB/s ({null / sink:.2f}x), "
        f"repeat {rate / repeat:.0f} MB/s ({null / repeat:.2f}x), empty increment {increment:.2f} s"
    )
    assert null / sink >= 0.5


def test_pulling_is_as_fast_as_pushing(place: Path) -> None:
    disk = place / "a.raw"
    with disk.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(GiB // 64))
    vm = Vm(place, {"a": disk})
    try:
        with vm.qmp() as qmp:
            push, pull = (best_s(lambda mode=mode: in_mode(qmp, mode)) for mode in (Mode.PUSH, Mode.PULL))  # type: ignore[misc]
    finally:
        vm.close()
    rate = GiB / 1e6
    print(f"\npush {rate / push:.0f} MB/s, pull {rate / pull:.0f} MB/s ({push / pull:.2f}x)")
    assert push / pull >= 0.8
