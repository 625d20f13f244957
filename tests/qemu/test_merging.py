"""What is pushed and what is pulled become one stream, in which each cluster comes once."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from casbackup.block.device import Extent
from casbackup.block.memory import MemoryDevice
from casbackup.block.nbd.protocol import Errno
from casbackup.errors import BackupBroken, NbdRequestFailed
from casbackup.qemu.merging import Merger
from casbackup.qemu.pulling import PulledDisk, Puller

from .conftest import Gathering

KiB, MiB = 1024, 1024 * 1024
CLUSTER = 64 * KiB


def content(size: int) -> bytes:
    """Random, with a hole in the midst."""
    data = bytearray(random.Random(size).randbytes(size))
    data[size // 4 : size // 2] = bytes(size // 2 - size // 4)
    return bytes(data)


class Snapshot(MemoryDevice):
    """A view at a point in time: reads of what was pushed fail, as those of QEMU do from our sink."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.pushed: set[int] = set()
        self.error = Errno.EIO
        self.read_bytes = 0
        self.discarded: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.pushed & set(range(offset // CLUSTER, -(-(offset + len(buffer)) // CLUSTER))):
            raise NbdRequestFailed("failed", self.error)
        self.read_bytes += len(buffer)
        super().read_into(offset, buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        quarter = self.size_bytes // 4
        for start, end, zero in ((0, quarter, False), (quarter, 2 * quarter, True), (2 * quarter, 1 << 62, False)):
            first, stop = max(offset, start), min(offset + length, end)
            if first < stop:
                yield Extent(first, stop - first, zero)

    def discard(self, offset: int, length: int) -> None:
        self.discarded.append((offset, length))


def pull_all(disks: list[PulledDisk], merger: Merger) -> None:
    puller = Puller(disks, merger, lambda _read_bytes: True)
    puller.start()
    puller.join(30)
    assert puller.check()


def test_without_a_guest_everything_is_read_once() -> None:
    data = content(20 * MiB + 512)
    device = Snapshot(data)
    gathered = Gathering([len(data)])
    merger = Merger(gathered, [len(data)])
    pull_all([PulledDisk(0, device, [(0, len(data))])], merger)
    assert gathered.each_once
    assert gathered.disks[0] == data
    assert device.read_bytes < len(data) * 0.8, "the hole was read"
    assert merger.left_bytes == 0
    assert sum(length for _offset, length in device.discarded) == len(data)


def test_what_is_pushed_meanwhile_is_not_read_a_second_time() -> None:
    """A guest overwrites at random: QEMU marks a cluster as done, and a moment later its old data is here."""
    size = 24 * MiB
    data = content(size)
    device = Snapshot(data)
    gathered = Gathering([size])
    merger = Merger(gathered, [size])

    def push() -> None:
        rng = random.Random(1)
        for cluster in rng.sample(range(size // CLUSTER), 150):
            device.pushed.add(cluster)
            merger.write("0", cluster * CLUSTER, memoryview(data)[cluster * CLUSTER : (cluster + 1) * CLUSTER])

    guest = threading.Thread(target=push)
    guest.start()
    pull_all([PulledDisk(0, device, [(0, size)])], merger)
    guest.join()
    assert gathered.each_once
    assert gathered.disks[0] == data


def test_only_what_is_dirty_is_wanted() -> None:
    size = 12 * MiB
    data = content(size)
    gathered = Gathering([size])
    merger = Merger(gathered, [size])
    merger.write("0", 8 * MiB, memoryview(data)[8 * MiB : 8 * MiB + CLUSTER])  # before that is known
    wanted = [(0, CLUSTER), (7 * MiB, 5 * MiB)]
    merger.want_only(0, wanted)
    assert merger.wanted_bytes == CLUSTER + 5 * MiB
    device = Snapshot(data)
    pull_all([PulledDisk(0, device, wanted)], merger)
    assert merger.left_bytes == 0
    merger.write("0", 2 * MiB, memoryview(data)[:CLUSTER])  # not wanted
    covered = [(0, CLUSTER // 512), (7 * 2048, 12 * 2048)]
    assert gathered.covered[0].sum() == sum(stop - first for first, stop in covered)
    assert all((gathered.covered[0][first:stop] == 1).all() for first, stop in covered)


def test_segments_of_which_a_part_was_pushed_come_first() -> None:
    size = 64 * MiB
    order: list[int] = []

    class Noting(Gathering):
        def write(self, disk: str, offset: int, data: memoryview) -> None:
            super().write(disk, offset, data)
            order.append(offset)

    merger = Merger(Noting([size]), [size])
    merger.write("0", 60 * MiB + CLUSTER, memoryview(bytes(CLUSTER)))
    pull_all([PulledDisk(0, Snapshot(bytes(size)), [(0, size)])], merger)
    assert {60 * MiB, 60 * MiB + 2 * CLUSTER} <= set(order[1:9]), "of 17, and several threads pull"


@pytest.mark.parametrize(
    ("error", "reason"), [(Errno.EIO, "can no longer be read"), (Errno.EINVAL, "given the point in time up")]
)
def test_what_cannot_be_read_and_is_not_pushed_breaks_the_backup(
    monkeypatch: pytest.MonkeyPatch, error: Errno, reason: str
) -> None:
    monkeypatch.setattr("casbackup.qemu.pulling._PUSHED_S", 0.3)
    size = 1 * MiB
    device = Snapshot(content(size))
    device.pushed.add(3)
    device.error = error
    puller = Puller([PulledDisk(0, device, [(0, size)])], Merger(Gathering([size]), [size]), lambda _read_bytes: True)
    puller.start()
    puller.join(10)
    with pytest.raises(BackupBroken, match=reason):
        puller.check()


def test_what_somebody_else_reads_is_not_discarded() -> None:
    """A segment that was begun is read by one thread while another comes to it in order."""
    size = 4 * MiB
    merger = Merger(Gathering([size]), [size])
    claimed = merger.claim(0, CLUSTER, CLUSTER)
    device = Snapshot(content(size))
    pull_all([PulledDisk(0, device, [(0, size)])], merger)
    assert claimed == [(CLUSTER, CLUSTER)]
    assert not [offset for offset, length in device.discarded if offset < 2 * CLUSTER and offset + length > CLUSTER]
    assert merger.left_bytes == CLUSTER


def test_a_part_of_a_cluster_is_refused() -> None:
    merger = Merger(Gathering([MiB]), [MiB])
    with pytest.raises(BackupBroken, match="whole clusters"):
        merger.write("0", 512, memoryview(bytes(CLUSTER)))


def test_nothing_is_passed_on_when_the_backup_is_lost() -> None:
    gathered = Gathering([MiB])
    merger = Merger(gathered, [MiB])
    merger.close()
    merger.write("0", 0, memoryview(bytes(CLUSTER)))
    merger.zero("0", CLUSTER, CLUSTER)
    assert gathered.events == 0
