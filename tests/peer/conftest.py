"""A snapshot of a disk with data, holes and repeated chunks, in a real repository, and a peer that counts."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from casbackup.block.memory import MemoryDevice
from casbackup.errors import BlobDamaged, ServerUnreachable
from casbackup.ids import DEFAULT_NAMESPACE, BlobId, VmName, parse_disk
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.segments import DeviceSegments
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.store.blobstore import Fetched

MiB = 1024 * 1024
VM = VmName("vm/100")


def disk_content() -> bytes:
    """41.3 MiB: random data, a hole over several segments, data again, and a part of it once more."""
    source = random.Random(7)
    first, second = source.randbytes(9 * MiB), source.randbytes(11 * MiB)
    return first + bytes(15 * MiB) + second + first[: 6 * MiB] + source.randbytes(300_001)


class CountingPeer(LocalPeer):
    """A local peer that knows what was asked of it, and can be told to fail."""

    def __init__(self, repository: Repository) -> None:
        super().__init__(repository)
        self.fetched: list[BlobId] = []
        self.damaged: set[BlobId] = set()
        self.unreachable = False
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        if self.unreachable:
            raise ServerUnreachable("nobody is there")
        self.fetched += ids
        for blob_id, record in super().fetch(ids):
            assert self.may_go_on.wait(30)
            yield blob_id, BlobDamaged("made so") if blob_id in self.damaged else record


@dataclass
class Stored:
    """A snapshot and what its disks hold."""

    peer: CountingPeer
    snapshot: Snapshot
    content: bytes
    complaints: list[str] = field(default_factory=list)


def back_up(peer: LocalPeer, **disks: bytes) -> Snapshot:
    inputs = [
        DiskInput(parse_disk(name), DeviceSegments(MemoryDevice(content, writable=False)))
        for name, content in disks.items()
    ]
    return backup(peer, BackupRequest(DEFAULT_NAMESPACE, VM, inputs, {"100.conf": b"cores: 2\n"}))


@pytest.fixture
def stored(repository: Repository) -> Stored:
    peer, content = CountingPeer(repository), disk_content()
    return Stored(peer, back_up(peer, scsi0=content), content)
