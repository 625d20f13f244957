"""What was written over a snapshot, saved as another: equal to the disk, at the cost of what was written."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.block.device import read_bytes
from casbackup.block.filters.overlay import Overlay
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.block.sparse import SparseMemory
from casbackup.errors import DataDamage
from casbackup.ids import DEFAULT_NAMESPACE, DiskName, VmName, parse_disk
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.save import SaveRequest, save_changes
from casbackup.jobs.segments import DeviceSegments
from casbackup.peer.disk import SnapshotDisk
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.gc import execute_gc, plan_gc
from casbackup.repository.repository import Repository

MiB = 1024 * 1024
SIZE = 17 * MiB + 4608
SAVED = VmName("vm/saved")


class Disks:
    """Two disks of a snapshot, their overlays, and what they should hold by now."""

    def __init__(self, peer: LocalPeer) -> None:
        source = random.Random(5)
        self.peer = peer
        self.expected = {
            "scsi0": bytearray(source.randbytes(9 * MiB) + bytes(SIZE - 9 * MiB)),
            "scsi1": bytearray(source.randbytes(2 * MiB)),
        }
        inputs = [
            DiskInput(parse_disk(name), DeviceSegments(MemoryDevice(bytes(content), writable=False)))
            for name, content in self.expected.items()
        ]
        request = BackupRequest(DEFAULT_NAMESPACE, VmName("vm/100"), inputs, {"100.conf": b"cores: 2\n"})
        self.base = backup(peer, request)
        self.overlays = {
            disk.name: Overlay(SnapshotDisk(peer, disk), SparseMemory(disk.size_bytes))
            for disk in self.base.manifest.disks
        }

    def write(self, name: str, offset: int, data: bytes) -> None:
        Guarded(self.overlays[DiskName(name)]).write(offset, data)
        self.expected[name][offset : offset + len(data)] = data

    def zero(self, name: str, offset: int, length: int) -> None:
        Guarded(self.overlays[DiskName(name)]).write_zeros(offset, length)
        self.expected[name][offset : offset + length] = bytes(length)

    def save(self, *names: str) -> Snapshot:
        overlays = {name: overlay for name, overlay in self.overlays.items() if not names or name in names}
        return save_changes(self.peer, SaveRequest(self.base, DEFAULT_NAMESPACE, SAVED), overlays)

    def check(self, snapshot: Snapshot) -> None:
        for disk in snapshot.manifest.disks:
            content = read_bytes(SnapshotDisk(self.peer, disk), 0, disk.size_bytes)
            assert content == self.expected[disk.name], disk.name
        assert not check(self.peer.repository, CheckOptions(read_data=True)).damaged


@pytest.fixture
def disks(repository: Repository) -> Iterator[Disks]:
    yield Disks(LocalPeer(repository))


def test_what_is_saved_is_what_was_seen(disks: Disks) -> None:
    source = random.Random(9)
    for _ in range(60):
        length = source.choice([1, 512, 4096, 100_000, 3 * MiB])
        offset = source.randrange(SIZE - length)
        if source.random() < 0.3:
            disks.zero("scsi0", offset, length)
        else:
            disks.write("scsi0", offset, source.randbytes(length))
    disks.write("scsi0", SIZE - 5, b"end!!")
    disks.write("scsi1", 0, b"x")
    snapshot = disks.save()
    disks.check(snapshot)
    assert snapshot.manifest.configs == disks.base.manifest.configs
    assert {disk.source for disk in snapshot.manifest.disks} == {disks.base.reference}


def test_only_what_was_written_is_read_and_stored(disks: Disks) -> None:
    disks.write("scsi0", 5 * MiB + 10, b"a few bytes")
    disks.write("scsi0", 16 * MiB, random.Random(1).randbytes(64 * 1024))
    snapshot = disks.save()
    stats = snapshot.manifest.stats
    assert stats.read_bytes == 2 * 64 * 1024
    assert 64 * 1024 < stats.new_bytes <= 2 * 64 * 1024
    assert stats.reused_bytes + stats.new_bytes + stats.zero_bytes == SIZE + 2 * MiB
    disks.check(snapshot)


def test_nothing_was_written(disks: Disks) -> None:
    snapshot = disks.save()
    assert [d.root for d in snapshot.manifest.disks] == [d.root for d in disks.base.manifest.disks]
    assert snapshot.manifest.stats.new_stored_bytes == 0 and snapshot.manifest.vm == SAVED


def test_all_of_a_disk_becomes_zero(disks: Disks) -> None:
    disks.zero("scsi0", 0, SIZE)
    snapshot = disks.save()
    assert snapshot.manifest.disks[0].root == bytes(32)
    disks.check(snapshot)


def test_a_disk_that_was_not_served_is_taken_over(disks: Disks) -> None:
    disks.write("scsi1", 100, b"changed")
    snapshot = disks.save("scsi1")
    assert snapshot.manifest.disks[0].root == disks.base.manifest.disks[0].root
    disks.check(snapshot)


def test_a_saved_snapshot_survives_its_base(disks: Disks) -> None:
    disks.write("scsi0", 8 * MiB, b"changed")
    snapshot = disks.save()
    disks.peer.remove([disks.base])
    execute_gc(disks.peer.repository, plan_gc(disks.peer.repository))
    disks.check(snapshot)


def test_a_base_that_is_gone(disks: Disks, tmp_path: Path) -> None:
    with Repository.create(str(tmp_path / "other")) as other:
        disks.peer = LocalPeer(other)
        with pytest.raises(DataDamage, match="nothing can be built on it"):
            disks.save()
        assert other.catalog.all() == []
