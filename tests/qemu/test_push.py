"""Push backups: what reaches the consumer, and what QEMU and the guest see of it."""

from __future__ import annotations

import pytest

from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection, find_disks
from casbackup.qemu.features import detect
from casbackup.qemu.push import PushSource
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions

from .conftest import BootGuest, Daemon, Gathering, assert_clean, assert_prefix

pytestmark = pytest.mark.qemu


def test_all_of_all_disks_comes_once(daemon: Daemon) -> None:
    with daemon.qmp() as qmp:
        disks = find_disks(qmp, Selection())
        assert [(disk.name, disk.size_bytes) for disk in disks] == [("a", 32 << 20), ("b", 32 << 20)]
        gathered = Gathering([disk.size_bytes for disk in disks])
        source = PushSource(qmp, detect(qmp), LiveOptions(), LiveControl(), print)
        instant = source.run([DiskTask(disk, None) for disk in disks], gathered)
        assert not instant.frozen
        assert_clean(qmp)
    assert gathered.each_once
    for name, content in zip(("a", "b"), gathered.disks, strict=True):
        assert content == daemon.disks[name].read_bytes()


def test_two_disks_of_a_running_guest_share_an_instant(guest: BootGuest) -> None:
    with guest.qmp() as qmp:
        disks = find_disks(qmp, Selection())
        assert [disk.name for disk in disks] == ["virtio-a", "virtio-b"]
        gathered = Gathering([disk.size_bytes for disk in disks])
        source = PushSource(
            qmp,
            detect(qmp),
            LiveOptions(freeze=FreezePolicy.NEVER),
            LiveControl(speed_limit_bytes_s=64 << 20),
            print,
        )
        source.run([DiskTask(disk, None) for disk in disks], gathered)
        assert_clean(qmp)
    assert gathered.each_once
    count = assert_prefix(bytes(gathered.disks[0]), bytes(gathered.disks[1]))
    assert count >= 64
    guest.wait_written(guest.written() + 64)
    assert guest.written() > count
    assert guest.errors == 0
