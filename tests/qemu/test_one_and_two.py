"""A backup of a running VM costs one read of each cluster, and two writes where the guest overwrites it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.block.filters.operation import Operation
from casbackup.block.filters.trace import Record, Trace
from casbackup.block.memory import MemoryDevice
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.uri import NbdAddress
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection
from casbackup.qemu.machine import Machine
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions, Mode

from .conftest import Daemon, assert_clean

pytestmark = pytest.mark.qemu
MiB = 1024 * 1024
CLUSTER = 64 * 1024
SIZE = 16 * MiB
CLUSTERS = SIZE // CLUSTER


def clusters(offset: int, length: int) -> range:
    return range(offset // CLUSTER, -(-(offset + length) // CLUSTER))


class Traced:
    """A disk that QEMU has from us, so that we see every access to it."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.reads: Counter[int] = Counter()
        self.writes: Counter[int] = Counter()
        self._lock = threading.Lock()
        self.memory = MemoryDevice(content)
        self._server = NbdServer([Export.of("disk", Trace(self.memory, self._count))])
        self.address = self._server.listen(NbdAddress("disk", str(folder / "traced.sock")))

    def close(self) -> None:
        self._server.close()

    def _count(self, record: Record) -> None:
        counts = {Operation.READ: self.reads, Operation.WRITE: self.writes}.get(record.operation)
        if counts is not None:
            with self._lock:
                counts.update(clusters(record.offset, record.length))


class Counted:
    """What reaches the backup, and how often."""

    def __init__(self) -> None:
        self.disk = bytearray(SIZE)
        self.writes: Counter[int] = Counter()

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        self.disk[offset : offset + len(data)] = data
        self.writes.update(clusters(offset, len(data)))

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.writes.update(clusters(offset, length))


@pytest.fixture
def traced(place: Path) -> Iterator[Traced]:
    made = Traced(place, random.Random(1).randbytes(SIZE))
    yield made
    made.close()


def attach(qmp: QmpClient, traced: Traced) -> None:
    """As the node ``traced``, and for the guest as the export of that name."""
    server = {"type": "unix", "path": traced.address.socket_path}
    qmp.execute("blockdev-add", {"driver": "nbd", "node-name": "traced", "export": "disk", "server": server})
    export = {"type": "nbd", "id": "e-traced", "node-name": "traced", "name": "traced", "writable": True}
    qmp.execute("block-export-add", export)


def test_one_read_and_two_writes_of_each_cluster(daemon: Daemon, traced: Traced) -> None:
    before = traced.memory.content()
    overwritten = random.Random(2).sample(range(CLUSTERS), 60)
    consumer = Counted()
    control = LiveControl(speed_limit_bytes_s=8 * MiB)
    with daemon.qmp() as qmp:
        attach(qmp, traced)
        options = LiveOptions(freeze=FreezePolicy.NEVER)
        machine = Machine(qmp, Selection(only=("disk=traced",)), options, Mode.PUSH)
        guest = threading.Thread(target=overwrite, args=(daemon.guest("traced"), control, overwritten))
        guest.start()
        machine.source(control, print, None).run([DiskTask(machine.disks[0], None)], consumer)
        guest.join()
        assert_clean(qmp)
    assert consumer.disk == before, "the backup is of one instant"
    assert traced.reads == dict.fromkeys(range(CLUSTERS), 1)
    assert consumer.writes == dict.fromkeys(range(CLUSTERS), 1)
    assert traced.writes == dict.fromkeys(overwritten, 1)
    assert traced.memory.content() != before


def overwrite(guest: NbdClient, control: LiveControl, numbers: list[int]) -> None:
    """While the backup is copying."""
    with guest:
        while control.status.phase == "starting":
            time.sleep(0.001)
        for number in numbers:
            guest.write(number * CLUSTER, b"new" * (CLUSTER // 3) + b"!")
