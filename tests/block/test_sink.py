"""The sink that QEMU writes a live backup to: nothing is lost, nothing fails, nobody waits beyond the bound."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from casbackup.block.buffers import BufferPool
from casbackup.block.device import read_bytes
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.sink import SinkDevice
from casbackup.block.spool import Spool
from casbackup.errors import BackupBroken, NbdRequestFailed, RepositoryFull, SourceUnreadable
from casbackup.units import KiB, MiB

CLUSTER = 64 * KiB
SIZE = 16 * MiB


class Consumer:
    """Keeps what comes as the contents of disks. Waits and fails as a test says."""

    def __init__(self, **sizes: int) -> None:
        self.disks = {name: bytearray(b"\xee" * size) for name, size in sizes.items()}
        self.events: list[tuple[str, int, int, bool]] = []
        self.before: Callable[[], object] = lambda: None

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        self.before()
        self.disks[disk][offset : offset + len(data)] = data
        self.events.append((disk, offset, len(data), False))

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.before()
        self.disks[disk][offset : offset + length] = bytes(length)
        self.events.append((disk, offset, length, True))


class Served:
    """Sinks for some disks behind an NBD server."""

    def __init__(self, folder: Path, consumer: Consumer, **options: Any) -> None:
        self.consumer = consumer
        self.spool = Spool(consumer, limit_bytes=options.pop("limit_bytes", 8 * MiB))
        self.sinks = {name: SinkDevice(self.spool, name, len(disk), **options) for name, disk in consumer.disks.items()}
        exports = [Export.of(name, sink, receiver=sink) for name, sink in self.sinks.items()]
        self.exports = {export.name: export for export in exports}
        self.server = NbdServer(exports)
        self.address = self.server.listen(NbdAddress(socket_path=str(folder / "sink.sock")))

    def client(self, disk: str) -> NbdClient:
        return NbdClient.connect(NbdAddress(disk, self.address.socket_path))

    def close(self) -> None:
        self.consumer.before = lambda: None
        self.server.close()
        self.spool.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as stack:

        def start(consumer: Consumer, **options: Any) -> Served:
            served = Served(tmp_path, consumer, **options)
            stack.callback(served.close)
            return served

        yield start


def test_events_of_several_disks(serve: Callable[..., Served]) -> None:
    served = serve(Consumer(a=SIZE, b=1 * MiB + 512))
    data = random.Random(1).randbytes(SIZE)
    with served.client("a") as a, served.client("b") as b:
        a.write(0, data)
        b.write(1 * MiB, b"x" * 512)
        b.write_zeros(0, 1 * MiB)
        b.flush()
        b.discard(0, 4096)
        with pytest.raises(NbdRequestFailed, match="a backup's target can only be written to"):
            read_bytes(a, 0, 512)
        assert list(a.extents(0, 4096)) == [(0, 4096, False)]
    served.spool.finish(timeout_s=10)
    assert served.consumer.disks == {"a": data, "b": bytes(1 * MiB) + b"x" * 512}
    assert served.sinks["b"].flushes == 1
    assert served.exports["b"].wait_unused(5)


def test_what_was_written_may_be_read_back(serve: Callable[..., Served]) -> None:
    consumer = Consumer(a=SIZE)

    def read_back(offset: int, buffer: memoryview) -> None:
        buffer[:] = consumer.disks["a"][offset : offset + len(buffer)]

    served = serve(consumer, read_back=read_back)
    with served.client("a") as client:
        client.write(CLUSTER, b"old data")
        served.spool.finish()
        assert read_bytes(client, CLUSTER, 8) == b"old data"


def test_the_end_of_a_disk_of_odd_size() -> None:
    """QEMU rounds the size up to 512 bytes and writes that far."""
    consumer = Consumer(a=CLUSTER + 100)
    spool = Spool(consumer, limit_bytes=2 * MiB)
    sink = SinkDevice(spool, "a", CLUSTER + 100)
    sink.write(CLUSTER, b"x" * 512)
    sink.write(CLUSTER + 100, b"y" * 412)
    sink.write_zeros(0, CLUSTER + 512)
    sink.write_zeros(CLUSTER + 100, 412)
    spool.finish(timeout_s=5)
    assert consumer.events == [("a", CLUSTER, 100, False), ("a", 0, CLUSTER + 100, True)]
    assert spool.waiting_bytes == 0
    spool.close()


def test_a_write_far_outside_is_acknowledged_and_breaks_the_backup(serve: Callable[..., Served]) -> None:
    served = serve(Consumer(a=1 * MiB))
    with served.client("a") as client:
        client.write(1 * MiB, b"x" * 1024)
        client.write(0, b"x")
    assert "write of 1024 bytes at 1048576 refused: beyond the end" in str(served.spool.failure)
    with pytest.raises(BackupBroken):
        served.spool.finish()


# --- a consumer that fails, is slow, or hangs


@pytest.mark.parametrize("error", [RepositoryFull("no space left"), RuntimeError("a fault of the program")])
def test_a_consumer_that_fails(serve: Callable[..., Served], error: Exception) -> None:
    consumer = Consumer(a=SIZE)

    def fail() -> None:
        if len(consumer.events) == 2:
            raise error

    consumer.before = fail
    served = serve(consumer)
    with served.client("a") as client:
        for _ in range(4):
            client.write(0, bytes(SIZE))
            client.write_zeros(0, SIZE)
            client.flush()
    assert len(consumer.events) == 2
    assert str(error) in str(served.spool.failure)
    with pytest.raises(BackupBroken, match=str(error)):
        served.spool.finish()
    assert served.spool.waiting_bytes == 0


def test_a_hung_consumer_makes_nobody_wait_beyond_the_bound(serve: Callable[..., Served]) -> None:
    go_on = threading.Event()
    consumer = Consumer(a=SIZE, b=SIZE)
    consumer.before = lambda: go_on.wait(30)
    served = serve(consumer, limit_bytes=2 * MiB, max_guest_stall_s=0.3)
    longest_s = 0.0
    with served.client("a") as a, served.client("b") as b:
        for number, client in zip(range(100), itertools.cycle((a, b)), strict=False):
            start_s = time.monotonic()
            client.write(number * CLUSTER, b"x" * CLUSTER)
            client.write_zeros(0, CLUSTER)
            longest_s = max(longest_s, time.monotonic() - start_s)
    go_on.set()
    assert 0.25 < longest_s < 1.5
    assert "no data was taken for 0.3 s; the guest goes first" in str(served.spool.failure)


def test_a_slow_consumer_only_slows_down(serve: Callable[..., Served]) -> None:
    consumer = Consumer(a=SIZE)
    consumer.before = lambda: time.sleep(0.01)
    served = serve(consumer, limit_bytes=2 * MiB)
    data = random.Random(2).randbytes(SIZE)
    with served.client("a") as client:
        client.write(0, data)
    served.spool.finish(timeout_s=10)
    assert consumer.disks["a"] == data


def test_memory_is_bounded(serve: Callable[..., Served]) -> None:
    consumer, most = Consumer(a=SIZE), 0

    def look() -> None:
        nonlocal most
        most = max(most, served.spool.waiting_bytes)

    consumer.before = look
    served = serve(consumer, limit_bytes=3 * MiB)
    with served.client("a") as client:
        for number in range(200):
            client.write(number * CLUSTER, b"x" * (1 + number * 300))
            client.write_zeros(0, 512)
    served.spool.finish(timeout_s=10)
    assert 0 < most <= 3 * MiB


def test_finishing_takes_too_long() -> None:
    consumer, go_on = Consumer(a=SIZE), threading.Event()
    consumer.before = lambda: go_on.wait(30)
    spool = Spool(consumer, limit_bytes=2 * MiB)
    SinkDevice(spool, "a", SIZE).write(0, b"x")
    with pytest.raises(BackupBroken, match=r"not stored within 0\.05 s"):
        spool.finish(timeout_s=0.05)
    go_on.set()
    spool.finish(timeout_s=5)
    spool.close()
    with pytest.raises(BackupBroken, match="was ended"):
        spool.finish()


def test_reading_fails_where_there_is_nothing() -> None:
    with pytest.raises(SourceUnreadable):
        read_bytes(SinkDevice(Spool(Consumer(), limit_bytes=2 * MiB), "a", SIZE), 0, 1)


def test_buffers_are_used_again() -> None:
    pool = BufferPool(2 * MiB)
    first = pool.take(CLUSTER)
    assert first is not None
    block = first.obj
    pool.give_back(first)
    second = pool.take(CLUSTER - 5)
    assert second is not None and second.obj is block and len(second) == CLUSTER - 5
    assert pool.take(2 * MiB // 2, spare_bytes=1 * MiB, timeout_s=0) is None
    rest = [pool.take(1 * MiB, timeout_s=0), pool.take(1 * MiB, timeout_s=0)]
    assert rest[0] is not None and rest[1] is None
    pool.close()
    assert pool.take(1) is None
    with pytest.raises(ValueError, match="too small"):
        BufferPool(2 * MiB - 1)


# --- QEMU


def disk_file(path: Path, seed: int, size_bytes: int = SIZE) -> bytes:
    """A disk of data with a hole."""
    data = random.Random(seed).randbytes(size_bytes - 4 * MiB)
    with open(path, "wb") as file:
        file.write(data[: 2 * MiB])
        file.seek(6 * MiB)
        file.write(data[2 * MiB :])
    return path.read_bytes()


BACKUP = {"sync": "full", "auto_dismiss": False, "x_perf": {"max-workers": 4, "max-chunk": 262144}}


@pytest.mark.qemu
def test_a_job_of_qemu_pushes_both_disks(
    serve: Callable[..., Served], daemon: Callable[..., Any], tmp_path: Path
) -> None:
    """Each cluster comes once, and the guest's writes during the job are not in it."""
    a, b = tmp_path / "a.raw", tmp_path / "b.raw"
    before = {"a": disk_file(a, 1), "b": disk_file(b, 2, SIZE + 100_352)}
    served = serve(Consumer(a=SIZE, b=SIZE + 100_352))
    qemu = daemon(a=a, b=b)
    for name in ("a", "b"):
        qemu.add_target(name, served.address)
    with NbdClient.connect(qemu.export("a", tmp_path / "guest.sock")) as guest:
        jobs = [
            {
                "type": "blockdev-backup",
                "data": {
                    "job-id": f"job-{n}",
                    "device": n,
                    "target": f"to-{n}",
                    "sync": "full",
                    "auto-dismiss": False,
                    "speed": 16 * MiB,
                },
            }
            for n in ("a", "b")
        ]
        qemu.run("transaction", actions=jobs, properties={"completion-mode": "grouped"})
        for number in range(0, 200, 3):
            guest.write(number * CLUSTER + 1000, b"new" * 100)
        assert [qemu.wait_concluded(f"job-{n}") for n in ("a", "b")] == [None, None]
    for name in ("a", "b"):
        qemu.run("blockdev-del", node_name=f"to-{name}")
        assert served.exports[name].wait_unused(5) and served.sinks[name].flushes == 1
    served.spool.finish(timeout_s=10)
    assert served.consumer.disks == before
    assert a.read_bytes() != before["a"]
    clusters = Counter(
        (disk, cluster)
        for disk, offset, length, _zero in served.consumer.events
        for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER))
    )
    assert set(clusters.values()) == {1} and len(clusters) == SIZE // CLUSTER + -(-(SIZE + 100_352) // CLUSTER)
    assert any(zero for *_range, zero in served.consumer.events)


@pytest.mark.qemu
def test_a_filter_of_qemu_pushes_what_the_guest_overwrites(
    serve: Callable[..., Served], daemon: Callable[..., Any], tmp_path: Path
) -> None:
    """The other shape: copy-before-write above the disk, and nothing else is copied."""
    path = tmp_path / "a.raw"
    before = disk_file(path, 3)
    served = serve(Consumer(a=SIZE))
    qemu = daemon(a=path)
    qemu.add_target("a", served.address)
    qemu.run("blockdev-add", driver="copy-before-write", node_name="filter", file="a", target="to-a")
    with NbdClient.connect(qemu.export("filter", tmp_path / "guest.sock")) as guest:
        guest.write(CLUSTER - 500, b"n" * 1000)
        guest.write(CLUSTER, b"m" * 1000)
        guest.write(8 * MiB + 12_345, b"o" * 2 * MiB)
        guest.flush()
    served.spool.finish(timeout_s=10)
    touched = {0, 1, *range(8 * MiB // CLUSTER, -(-(10 * MiB + 12_345) // CLUSTER))}
    arrived = Counter(
        n
        for _d, offset, length, _z in served.consumer.events
        for n in range(offset // CLUSTER, (offset + length) // CLUSTER)
    )
    assert arrived == dict.fromkeys(touched, 1)
    for number in touched:
        part = slice(number * CLUSTER, (number + 1) * CLUSTER)
        assert served.consumer.disks["a"][part] == before[part]


@pytest.mark.qemu
@pytest.mark.parametrize("trouble", ["fails", "hangs"])
def test_the_guest_of_qemu_never_sees_it(
    serve: Callable[..., Served], daemon: Callable[..., Any], tmp_path: Path, trouble: str
) -> None:
    path = tmp_path / "a.raw"
    disk_file(path, 4)
    go_on, consumer = threading.Event(), Consumer(a=SIZE)

    def misbehave() -> None:
        if len(consumer.events) == 5 and trouble == "fails":
            raise RepositoryFull("no space left")
        if len(consumer.events) == 5:
            go_on.wait(30)

    consumer.before = misbehave
    served = serve(consumer, limit_bytes=2 * MiB, max_guest_stall_s=0.3)
    qemu = daemon(a=path)
    qemu.add_target("a", served.address)
    longest_s = 0.0
    with NbdClient.connect(qemu.export("a", tmp_path / "guest.sock")) as guest:
        qemu.run("blockdev-backup", job_id="job", device="a", target="to-a", **BACKUP)
        for number in random.Random(5).sample(range(256), 256):
            start_s = time.monotonic()
            guest.write(number * CLUSTER, b"new")
            longest_s = max(longest_s, time.monotonic() - start_s)
        assert qemu.wait_concluded("job") is None  # as far as QEMU knows; the backup is not committed
    go_on.set()
    assert served.spool.failure is not None
    assert longest_s < 1.5
    assert os.path.getsize(path) == SIZE and path.read_bytes()[255 * CLUSTER :][:3] == b"new"


@pytest.mark.qemu
def test_an_odd_size_of_qemu(serve: Callable[..., Served], daemon: Callable[..., Any], tmp_path: Path) -> None:
    """QEMU sees a disk of 100 bytes more than 4 MiB as one of 512 more, and writes the last of them."""
    path, size = tmp_path / "a.raw", 4 * MiB + 100
    path.write_bytes(random.Random(6).randbytes(size))
    served = serve(Consumer(a=size))
    qemu = daemon(a=path)
    qemu.add_target("a", served.address)
    qemu.run("blockdev-backup", job_id="job", device="a", target="to-a", **BACKUP)
    assert qemu.wait_concluded("job") is None
    qemu.run("blockdev-del", node_name="to-a")
    served.spool.finish(timeout_s=10)
    assert served.consumer.disks["a"] == path.read_bytes()[:size]
