"""A live backup with a file for what its memory has no room for: a target may hang for a while."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from casbackup.errors import BackupBroken
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection
from casbackup.qemu.machine import Machine
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions, Mode

from .conftest import Daemon, Gathering, assert_clean

pytestmark = pytest.mark.qemu
MiB = 1024 * 1024
STALL_S = 0.5


class Hanging(Gathering):
    """Takes nothing before ``go_on`` is set."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sizes)
        self.go_on = threading.Event()

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        self.go_on.wait(30)
        super().write(disk, offset, data)


class Backup:
    """A backup with little memory and a spool, in a thread, of a target that hangs."""

    def __init__(self, daemon: Daemon, spool: Path, spool_bytes: int) -> None:
        self.control = LiveControl()
        self.error: BackupBroken | None = None
        self._daemon = daemon
        self._options = LiveOptions(
            freeze=FreezePolicy.NEVER,
            max_guest_stall_s=STALL_S,
            memory_bytes=4 * MiB,
            spool_bytes=spool_bytes,
            spool_folder=str(spool),
        )
        self.consumer = Hanging([32 * MiB, 32 * MiB])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def finish(self) -> None:
        self.consumer.go_on.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def wait_copying(self) -> None:
        deadline = time.monotonic() + 20
        while self.control.status.phase != "copying":
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _run(self) -> None:
        with self._daemon.qmp() as qmp:
            machine = Machine(qmp, Selection(), self._options, Mode.PUSH)
            tasks = [DiskTask(disk, None) for disk in machine.disks]
            try:
                machine.source(self.control, print, None).run(tasks, self.consumer)
            except BackupBroken as error:
                self.error = error
            assert_clean(qmp)


def write_all_over(daemon: Daemon) -> float:
    """A guest that overwrites half of a disk: 8 MiB are saved first. Returns the longest time that a write took."""
    longest_s = 0.0
    with daemon.guest("a") as guest:
        for number in random.Random(1).sample(range(128), 128):
            began_s = time.monotonic()
            guest.write(number * 64 * 1024, os.urandom(4096))
            longest_s = max(longest_s, time.monotonic() - began_s)
    return longest_s


def test_a_target_that_hangs_for_a_while_costs_neither_backup_nor_guest(daemon: Daemon, tmp_path: Path) -> None:
    before = [path.read_bytes() for path in daemon.disks.values()]
    backup = Backup(daemon, tmp_path, 64 * MiB)
    try:
        backup.wait_copying()
        write_all_over(daemon)
        time.sleep(3 * STALL_S)
        write_all_over(daemon)
        assert backup.control.status.spooled_bytes > 0
        assert os.listdir(tmp_path) == []
    finally:
        backup.finish()
    assert backup.error is None
    assert backup.consumer.each_once
    assert [bytes(disk) for disk in backup.consumer.disks] == before


def test_a_spool_that_is_full_too_breaks_the_backup(daemon: Daemon, tmp_path: Path) -> None:
    backup = Backup(daemon, tmp_path, 2 * MiB)
    try:
        backup.wait_copying()
        longest_s = write_all_over(daemon)
    finally:
        backup.finish()
    assert backup.error is not None and "no data was taken for 0.5 s" in backup.error.message
    assert longest_s < STALL_S + 1.5


@pytest.mark.root
def test_a_full_disk_below_the_spool_breaks_the_backup(daemon: Daemon, tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "spool", tmp_path], check=False).returncode:
        pytest.skip("no tmpfs can be mounted")
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "-l", tmp_path], check=True)
        backup = Backup(daemon, tmp_path, 64 * MiB)
        try:
            backup.wait_copying()
            longest_s = write_all_over(daemon)
        finally:
            backup.finish()
    assert backup.error is not None and "No space left on device" in backup.error.message
    assert longest_s < STALL_S + 1.5
