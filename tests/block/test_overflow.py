"""What the memory of a spool has no room for goes to a file, before anybody waits or the backup breaks."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casbackup.block.device import BlockDevice
from casbackup.block.filters.faults import Fault, Faults, Rule
from casbackup.block.filters.operation import Operation
from casbackup.block.sink import SinkDevice
from casbackup.block.sparse import SparseMemory, temporary_device
from casbackup.block.spool import Spool
from casbackup.errors import BackupBroken, TargetUnwritable
from casbackup.units import KiB, MiB

CLUSTER = 64 * KiB
SIZE = 32 * MiB
MEMORY = 4 * MiB


class Consumer:
    """Keeps the contents of one disk. Takes nothing before ``go_on`` is set."""

    def __init__(self) -> None:
        self.disk = bytearray(b"\xee" * SIZE)
        self.go_on = threading.Event()

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        self.go_on.wait(60)
        self.disk[offset : offset + len(data)] = data

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.go_on.wait(60)
        self.disk[offset : offset + length] = bytes(length)


class Overflowing:
    """A sink with little memory and an overflow."""

    def __init__(self, overflow: BlockDevice, *, max_guest_stall_s: float = 20.0) -> None:
        self.consumer = Consumer()
        self.overflow = overflow
        self.spool = Spool(self.consumer, limit_bytes=MEMORY, overflow=overflow)
        self.sink = SinkDevice(self.spool, "a", SIZE, max_guest_stall_s=max_guest_stall_s)

    def fill(self, upto: int = SIZE, seed: int = 1) -> bytes:
        """Write clusters, some of them zeros, in any order. Returns what the disk is to hold."""
        rng = random.Random(seed)
        wanted = bytearray(self.consumer.disk)
        for number in rng.sample(range(upto // CLUSTER), upto // CLUSTER):
            offset = number * CLUSTER
            data = bytes(CLUSTER) if number % 5 == 0 else rng.randbytes(CLUSTER)
            if number % 5:
                self.sink.write(offset, data)
            else:
                self.sink.write_zeros(offset, CLUSTER)
            wanted[offset : offset + CLUSTER] = data
        return bytes(wanted)

    def close(self) -> None:
        self.consumer.go_on.set()
        self.spool.close()
        self.overflow.close()


@pytest.fixture
def overflowing() -> Iterator[Callable[..., Overflowing]]:
    made: list[Overflowing] = []

    def make(overflow: BlockDevice, **options: float) -> Overflowing:
        made.append(Overflowing(overflow, **options))
        return made[-1]

    yield make
    for item in made:
        item.close()


@pytest.mark.parametrize("kind", ["simulated", "real"])
def test_a_hung_consumer_fills_the_file_and_nothing_is_lost(
    overflowing: Callable[..., Overflowing], tmp_path: Path, kind: str
) -> None:
    overflow = SparseMemory(SIZE) if kind == "simulated" else temporary_device(SIZE, str(tmp_path))
    made = overflowing(overflow)
    began_s = time.monotonic()
    wanted = made.fill()
    assert time.monotonic() - began_s < 15, "somebody waited for the consumer"
    assert made.spool.failure is None
    assert made.spool.waiting_bytes <= MEMORY
    assert made.spool.overflown_bytes > SIZE // 2
    assert os.listdir(tmp_path) == [], "the file has a name"
    made.consumer.go_on.set()
    made.spool.finish(timeout_s=20)
    assert made.consumer.disk == wanted
    assert (made.spool.waiting_bytes, made.spool.overflown_bytes) == (0, 0)


def test_a_consumer_that_keeps_up_costs_no_file(overflowing: Callable[..., Overflowing]) -> None:
    """Where something is written to it after all, that fails."""
    broken = Faults(SparseMemory(SIZE), Rule(frozenset({Operation.WRITE})))
    made = overflowing(broken)
    made.consumer.go_on.set()
    rng = random.Random(3)
    for number in range(SIZE // CLUSTER):
        made.sink.write(number * CLUSTER, rng.randbytes(CLUSTER))
        made.spool.finish(timeout_s=5)
    assert made.spool.overflown_bytes == 0


def test_places_in_the_file_are_used_again(overflowing: Callable[..., Overflowing]) -> None:
    """Many times its size goes through it."""
    made = overflowing(SparseMemory(SIZE, limit_bytes=24 * MiB))
    for seed in range(4):
        made.consumer.go_on.clear()
        wanted = made.fill(20 * MiB, seed)
        made.consumer.go_on.set()
        made.spool.finish(timeout_s=20)
        assert made.consumer.disk == wanted


def test_when_the_file_is_full_too_the_backup_breaks_and_nobody_waits_longer(
    overflowing: Callable[..., Overflowing],
) -> None:
    made = overflowing(SparseMemory(8 * MiB), max_guest_stall_s=0.3)
    longest_s = 0.0
    for number in range(SIZE // CLUSTER):
        began_s = time.monotonic()
        made.sink.write(number * CLUSTER, b"x" * CLUSTER)
        longest_s = max(longest_s, time.monotonic() - began_s)
    assert "no data was taken for 0.3 s" in str(made.spool.failure)
    assert 0.25 < longest_s < 1.5


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.SHORT])
@pytest.mark.parametrize("nth", [1, 7])
def test_a_file_that_cannot_be_written_to_breaks_the_backup_only(
    overflowing: Callable[..., Overflowing], fault: Fault, nth: int
) -> None:
    made = overflowing(Faults(SparseMemory(SIZE), Rule(frozenset({Operation.WRITE}), fault, nth=nth)))
    began_s = time.monotonic()
    made.fill()
    assert time.monotonic() - began_s < 10
    assert "the spool file cannot be written to" in str(made.spool.failure)
    with pytest.raises(BackupBroken, match="the spool file"):
        made.spool.finish()


def test_a_file_that_cannot_be_read_breaks_the_backup_only(overflowing: Callable[..., Overflowing]) -> None:
    made = overflowing(Faults(SparseMemory(SIZE), Rule(frozenset({Operation.READ}), nth=3)))
    made.fill()
    made.consumer.go_on.set()
    with pytest.raises(BackupBroken):
        made.spool.finish(timeout_s=20)
    made.fill()
    assert made.spool.waiting_bytes == 0


def test_a_slow_file_makes_nobody_wait_while_there_is_memory(overflowing: Callable[..., Overflowing]) -> None:
    slow = Faults(SparseMemory(SIZE), Rule(frozenset({Operation.WRITE}), Fault.DELAY, delay_s=0.2))
    made = overflowing(slow)
    longest_s = 0.0
    for number in range(MEMORY // CLUSTER - 8):
        began_s = time.monotonic()
        made.sink.write(number * CLUSTER, b"x" * CLUSTER)
        longest_s = max(longest_s, time.monotonic() - began_s)
    assert longest_s < 0.15
    made.consumer.go_on.set()
    made.spool.finish(timeout_s=20)


def test_a_size_limit_of_the_system_breaks_the_backup_only(
    overflowing: Callable[..., Overflowing], tmp_path: Path
) -> None:
    """EFBIG stands for a disk that is full, for anybody can have it."""
    overflow = temporary_device(SIZE, str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MiB, before[1]))
    try:
        made = overflowing(overflow)
        made.fill()
        assert "the spool file cannot be written to" in str(made.spool.failure)
        assert "File too large" in str(made.spool.failure)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.root
def test_a_full_disk_breaks_the_backup_only(overflowing: Callable[..., Overflowing], tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "spool", tmp_path], check=False).returncode:
        pytest.skip("no tmpfs can be mounted")
    try:
        made = overflowing(temporary_device(SIZE, str(tmp_path)))
        made.fill()
        assert "No space left on device" in str(made.spool.failure)
        made.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(TargetUnwritable, match="no temporary file"):
        temporary_device(SIZE, "/nonexistent")
