"""Backups of disks that a guest writes to through the proxy, pulled over NBD and pushed in this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.block.device import read_bytes
from casbackup.block.filters.faults import Fault, Faults, Rule
from casbackup.block.filters.operation import Operation
from casbackup.block.filters.point_in_time import OnFailure, Policy
from casbackup.block.memory import MemoryDevice
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.proxy import DiskProxy
from casbackup.block.sparse import SparseMemory, temporary_device
from casbackup.block.spool import Spool
from casbackup.errors import BackupBroken, NbdRequestFailed, RepositoryFull
from casbackup.units import KiB, MiB
from tests.waiting import wait_until

CLUSTER = 64 * KiB
SIZE = 4 * MiB
BLOCK = 4096


class Guest:
    """Writes numbered blocks to two disks in turn, over NBD, and knows which write came when."""

    def __init__(self, address: NbdAddress) -> None:
        self._disks = [NbdClient.connect(replace(address, export=name)) for name in ("a", "b")]
        self._going = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest_s = 0.0
        self.errors = list[Exception]()
        self.written = 0

    def __enter__(self) -> Guest:
        self._going.set()
        self._thread.start()
        wait_until(lambda: self.written > 200)
        return self

    def __exit__(self, *_: object) -> None:
        self._going.clear()
        self._thread.join()
        for disk in self._disks:
            disk.close()

    def _run(self) -> None:
        while self._going.is_set():
            start_s = time.monotonic()
            try:
                self._disks[self.written % 2].write(*write_number(self.written))
            except Exception as error:
                self.errors.append(error)
            self.longest_s = max(self.longest_s, time.monotonic() - start_s)
            self.written += 1


def write_number(number: int) -> tuple[int, bytes]:
    """Offset and data of the guest's write."""
    block = (number * 0x9E3779B1 & 0xFFFFFFFF) % (SIZE // BLOCK)
    return block * BLOCK, (number + 1).to_bytes(8, "big") * (BLOCK // 8)


def replay(count: int) -> list[bytes]:
    """Both disks after the first ``count`` writes."""
    disks = [bytearray(SIZE), bytearray(SIZE)]
    for number in range(count):
        offset, data = write_number(number)
        disks[number % 2][offset : offset + BLOCK] = data
    return [bytes(disk) for disk in disks]


def check_one_instant(disks: list[bytes]) -> None:
    """Both are the state after the same number of writes."""
    count = max(int.from_bytes(disk[at : at + 8], "big") for disk in disks for at in range(0, SIZE, BLOCK))
    assert count > 100 and disks == replay(count)


@contextlib.contextmanager
def proxied(folder: Path, **options: object) -> Iterator[tuple[DiskProxy, NbdAddress]]:
    settings = {"scratch": SparseMemory, "limit_bytes": SIZE, **options}
    disks = {"a": MemoryDevice(SIZE), "b": MemoryDevice(SIZE)}
    with DiskProxy(disks, **settings) as proxy, NbdServer(proxy.exports) as server:  # type: ignore[arg-type]
        yield proxy, server.listen(NbdAddress(socket_path=str(folder / "proxy.sock")))


@pytest.mark.parametrize("scratch", [SparseMemory, temporary_device])
def test_pulled_over_nbd(tmp_path: Path, scratch: object) -> None:
    with proxied(tmp_path, scratch=scratch) as (_proxy, address), Guest(address) as guest:
        for _ in range(3):
            snapshots = [NbdClient.connect(replace(address, export=f"{name}@snapshot")) for name in ("a", "b")]
            check_one_instant([read_bytes(snapshot, 0, SIZE) for snapshot in snapshots])
            for snapshot in snapshots:
                snapshot.close()
            written = guest.written
            wait_until(lambda written=written: guest.written > written + 100)  # type: ignore[misc]
    assert not guest.errors


class Disks:
    """A consumer that keeps both disks, and takes its time."""

    def __init__(self) -> None:
        self.disks = {"a": bytearray(b"\xee" * SIZE), "b": bytearray(b"\xee" * SIZE)}
        self.pause_s = 0.001
        self.taken_bytes = 0
        self.fails_at_bytes = 1 << 60

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        time.sleep(self.pause_s)
        self.taken_bytes += len(data)
        if self.taken_bytes > self.fails_at_bytes:
            raise RepositoryFull("no space left")
        self.disks[disk][offset : offset + len(data)] = data

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.disks[disk][offset : offset + length] = bytes(length)


@contextlib.contextmanager
def spooled(consumer: Disks) -> Iterator[Spool]:
    spool = Spool(consumer, limit_bytes=4 * MiB)
    try:
        yield spool
    finally:
        spool.close()


def test_pushed_in_this_process(tmp_path: Path) -> None:
    with proxied(tmp_path) as (proxy, address), Guest(address) as guest:
        for _ in range(3):
            consumer = Disks()
            with spooled(consumer) as spool:
                proxy.push(spool)
            check_one_instant([bytes(consumer.disks["a"]), bytes(consumer.disks["b"])])
            assert consumer.taken_bytes <= 2 * SIZE
    assert not guest.errors


def test_a_consumer_that_fails_breaks_only_the_backup(tmp_path: Path) -> None:
    with proxied(tmp_path) as (proxy, address), Guest(address) as guest:
        consumer = Disks()
        consumer.fails_at_bytes = 2 * MiB
        with spooled(consumer) as spool, pytest.raises(BackupBroken, match="no space left"):
            proxy.push(spool)
        consumer = Disks()
        with spooled(consumer) as spool:
            proxy.push(spool)
        check_one_instant([bytes(consumer.disks["a"]), bytes(consumer.disks["b"])])
    assert not guest.errors


def test_a_consumer_that_hangs_makes_the_guest_wait_for_the_bound(tmp_path: Path) -> None:
    with proxied(tmp_path, policy=Policy(timeout_s=0.3)) as (proxy, address), Guest(address) as guest:
        consumer = Disks()
        consumer.pause_s = 3
        with spooled(consumer) as spool:
            with pytest.raises(BackupBroken):
                proxy.push(spool)
            written = guest.written
            wait_until(lambda: guest.written > written + 100)
    assert not guest.errors and guest.longest_s < 1.5


def test_a_slow_consumer_does_not_slow_the_guest_down(tmp_path: Path) -> None:
    """50 MB/s, and the guest's writes go to memory that the background has left them."""
    with proxied(tmp_path) as (proxy, address), Guest(address) as guest:
        consumer = Disks()
        consumer.pause_s = 0.02
        with spooled(consumer) as spool:
            proxy.push(spool)
    assert not guest.errors and guest.longest_s < 1.5


@pytest.mark.parametrize("on_failure", OnFailure)
def test_more_is_overwritten_than_may_be_kept(tmp_path: Path, on_failure: OnFailure) -> None:
    with (
        proxied(tmp_path, limit_bytes=4 * CLUSTER, policy=Policy(on_failure)) as (proxy, address),
        NbdClient.connect(replace(address, export="a")) as guest,
    ):
        guest.write(0, b"a" * SIZE)
        with NbdClient.connect(replace(address, export="a@snapshot")) as snapshot:
            for number in range(4):
                guest.write(number * CLUSTER, b"b")
            if on_failure is OnFailure.BREAK_GUEST_WRITE:
                with pytest.raises(NbdRequestFailed, match="bytes 262144 to 262145 were not saved before a write"):
                    guest.write(4 * CLUSTER, b"b")
                assert read_bytes(snapshot, 0, SIZE) == b"a" * SIZE
            else:
                guest.write(4 * CLUSTER, b"b")
                with pytest.raises(NbdRequestFailed, match="more than 262144 bytes that were not yet read"):
                    read_bytes(snapshot, 0, SIZE)
        wait_until(lambda: proxy._disks["a"].point is None)
        guest.write(4 * CLUSTER, b"c")


def test_a_snapshot_is_in_the_way_of_a_push(tmp_path: Path) -> None:
    with (
        proxied(tmp_path) as (proxy, address),
        spooled(Disks()) as spool,
        NbdClient.connect(replace(address, export="b@snapshot")) as snapshot,
    ):
        with pytest.raises(ValueError, match="being kept already"):
            proxy.push(spool)
        assert not snapshot.capabilities.writable


def test_writes_under_way_that_do_not_end() -> None:
    under_way, go_on = threading.Event(), threading.Event()

    def hang(_seconds: float) -> None:
        under_way.set()
        go_on.wait(30)

    slow = Faults(MemoryDevice(SIZE), Rule(frozenset({Operation.WRITE}), Fault.DELAY, delay_s=1), sleep=hang)
    with DiskProxy({"a": slow}, scratch=SparseMemory, limit_bytes=SIZE) as proxy, spooled(Disks()) as spool:
        live = proxy.exports[0].acquire()
        thread = threading.Thread(target=live.write, args=(0, b"x"))
        thread.start()
        under_way.wait(30)
        with pytest.raises(BackupBroken, match="no instant without writes under way"):
            proxy.push(spool)
        go_on.set()
        thread.join()
