"""A repository on a simulated machine, together with what must be true of it whatever happens to the machine.

The packs, manifests, configuration and locks are simulated; LMDB's index lies in a real folder, which a
``Photo`` copies. Everything runs in the calling thread (``inline``), so that a number of an operation means
the same in every run.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

from casbackup.block.memory import MemoryDevice
from casbackup.fs import write_durably
from casbackup.ids import DEFAULT_NAMESPACE, SnapshotId, VmName, parse_disk
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.restore import RestoreOptions, read_config, restore_disk
from casbackup.jobs.segments import DeviceSegments
from casbackup.limits import BLOCK_BYTES
from casbackup.peer.api import Peer
from casbackup.peer.local import LocalPeer
from casbackup.repository.accounting import account
from casbackup.repository.catalog import Snapshot
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.gc import GcReport, execute_gc, plan_gc
from casbackup.repository.repository import Repository
from casbackup.spec.config import encode_config
from casbackup.store.index import Index
from casbackup.store.writer import StoreWriter
from casbackup.testing.clock import FakeClock
from casbackup.testing.simfs import SimulatedFileSystem, SimulatedMachine

VM = VmName("vm/100")
SMALL_PACK_BYTES = 2**20

Content = Mapping[str, bytes]
"""A VM's disks by name, and its configs under names with a dot."""


@dataclass(slots=True)
class Promises:
    """What was promised to a user. ``attempts``: backups that have not returned; ``leaving``: removals."""

    kept: dict[SnapshotId, Content] = field(default_factory=dict)
    attempts: list[Content] = field(default_factory=list)
    leaving: set[SnapshotId] = field(default_factory=set)
    gone: set[SnapshotId] = field(default_factory=set)

    def copy(self) -> Promises:
        return Promises(dict(self.kept), list(self.attempts), set(self.leaving), set(self.gone))


@dataclass(frozen=True, slots=True)
class Photo:
    """Everything as it was just before an operation."""

    step: str
    machine: SimulatedMachine
    real_files: Mapping[str, bytes]
    promises: Promises
    now_ms: int


class World:
    """A machine, its repository, and the promises made so far."""

    def __init__(self, folder: str) -> None:
        """``folder`` is real and empty; it will hold the index."""
        self.root = os.path.join(folder, "repository")
        self.machine = SimulatedMachine(real_folder=os.path.join(self.root, "index"))
        self.clock = FakeClock()
        self.promises = Promises()
        self.photos: list[Photo] = []
        self._open: list[Repository] = []

    def create(self, *, pack_bytes: int = SMALL_PACK_BYTES) -> Repository:
        """Make the repository, with packs small enough that small disks fill several."""
        fs = self.machine.process()
        made = Repository.create(self.root, fs=fs, clock=self.clock)
        for path in (made.layout.config_backup, made.layout.config):
            write_durably(fs, path, encode_config(replace(made.config, pack_bytes=pack_bytes)), replace=True)
        made.close()
        return self.open()

    def open(self) -> Repository:
        """Open the repository as a new process does."""
        repository = Repository.open(self.root, fs=self.machine.process(), clock=self.clock)
        _observe(repository.index, self.machine)
        self._open.append(repository)
        return repository

    def close(self) -> None:
        """Let go of everything, gracefully or not."""
        for repository in self._open:
            while repository.index._users > 0:
                repository.index.close()
            cast("SimulatedFileSystem", repository.fs).kill()
        self._open = []

    def crash(self, seed: int) -> None:
        """The machine goes off and comes up again, without what ``seed`` loses."""
        self.machine.power_off()
        self.close()
        self.machine.restart(seed)

    # --- what users do

    def backup(self, repository: Repository, content: Content, vm: VmName = VM) -> Snapshot:
        self.promises.attempts.append(content)
        snapshot = backup(LocalPeer(repository), request(content, vm), clock=self.clock)
        self.promises.kept[snapshot.id] = content
        self.promises.attempts.remove(content)
        self.clock.pass_time(60)
        return snapshot

    def forget(self, repository: Repository, *snapshots: Snapshot) -> None:
        ids = {snapshot.id for snapshot in snapshots}
        self.promises.leaving |= ids
        repository.catalog.remove(snapshots)
        self.promises.leaving -= ids
        self.promises.gone |= ids
        for snapshot_id in ids:
            self.promises.kept.pop(snapshot_id, None)

    def gc(self, repository: Repository) -> GcReport:
        with repository.maintenance():
            return execute_gc(repository, plan_gc(repository))

    # --- what must be true

    def verify(self, repository: Repository) -> None:
        """Every promise is kept, nothing else is visible, and a full check finds nothing."""
        promises = self.promises
        found = {snapshot.id: snapshot for snapshot in repository.catalog.all()}
        lost = set(promises.kept) - promises.leaving - set(found)
        assert not lost, f"lost snapshots: {lost}"
        assert not promises.gone & set(found), "a forgotten snapshot is back"
        for snapshot in found.values():
            restored = contents(repository, snapshot)
            expected = promises.kept.get(snapshot.id)
            if expected is not None:
                assert restored == expected, f"{snapshot.reference} is not what was backed up"
            else:
                assert restored in promises.attempts, f"{snapshot.reference} comes from nowhere"
        report = check(repository, CheckOptions(read_data=True))
        assert not report.damaged, report.findings
        account(repository)

    def settle(self, repository: Repository) -> None:
        """Accept as promised what an interrupted operation happened to complete, or not."""
        found = {snapshot.id: snapshot for snapshot in repository.catalog.all()}
        for snapshot_id in self.promises.leaving - set(found):
            self.promises.kept.pop(snapshot_id, None)
            self.promises.gone.add(snapshot_id)
        for snapshot_id, snapshot in found.items():
            self.promises.kept[snapshot_id] = contents(repository, snapshot)
        self.promises.leaving.clear()
        self.promises.attempts.clear()

    # --- photos

    @contextmanager
    def photographed(self) -> Iterator[list[Photo]]:
        """Take a photo just before each operation, and one at the end."""
        photos: list[Photo] = []
        self.machine.before = lambda step: photos.append(self.photo(f"{step.name} {step.path}"))
        yield photos
        self.machine.before = None
        photos.append(self.photo("the end"))

    def photo(self, step: str) -> Photo:
        files = {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in Path(self.root).rglob("*")
            if path.is_file() and path.name != "lock.mdb"
        }
        return Photo(
            step.replace(self.root + "/", ""),
            self.machine.photo(),
            files,
            self.promises.copy(),
            self.clock.now_ms(),
        )

    def return_to(self, photo: Photo, seed: int) -> None:
        """Be the machine that crashed when the photo was taken, after its restart. Photos can be reused."""
        self.close()
        shutil.rmtree(self.root, ignore_errors=True)
        for name, content in photo.real_files.items():
            path = Path(self.root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.machine = photo.machine.photo()
        self.machine.restart(seed)
        self.promises = photo.promises.copy()
        self.clock = FakeClock(photo.now_ms + 60_000)


@contextmanager
def temporary_world() -> Iterator[World]:
    """A world in a folder in memory if there is such a thing: LMDB syncs each transaction."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="casbackup-", dir=base) as folder, inline():
        world = World(folder)
        try:
            yield world
        finally:
            world.close()


@contextmanager
def inline() -> Iterator[None]:
    """Let work that is spread over threads run in the caller's, and ids be the same in each run."""

    def run_workers(work: Callable[[threading.Event], None], count: int) -> None:
        work(threading.Event())

    def hand_over(writer: StoreWriter, pack: Any, *, sealed: bool) -> None:
        if sealed:
            writer._make_durable(pack, sealed=True)
        else:
            pack.appender.sync()

    with ExitStack() as stack:
        for module in ("jobs.backup", "jobs.copying", "jobs.restore", "repository.scrub"):
            stack.enter_context(mock.patch(f"casbackup.{module}.run_workers", run_workers))
        stack.enter_context(mock.patch.object(StoreWriter, "_hand_over", hand_over))
        source = random.Random(0)
        stack.enter_context(mock.patch("casbackup.ids._random_id", lambda: source.randbytes(16).hex()))
        yield


def request(content: Content, vm: VmName = VM, **fields: Any) -> BackupRequest:
    """What to back up: disks, and under names with a dot, configs."""
    disks = [
        DiskInput(parse_disk(name), DeviceSegments(MemoryDevice(data)))
        for name, data in content.items()
        if "." not in name
    ]
    configs = {name: data for name, data in content.items() if "." in name}
    return BackupRequest(DEFAULT_NAMESPACE, vm, disks, configs, **fields)


def contents(repository: Repository, snapshot: Snapshot) -> Content:
    """Restore everything of a snapshot."""
    return restored(LocalPeer(repository), snapshot)


def restored(peer: Peer, snapshot: Snapshot) -> Content:
    """Restore everything of a snapshot of any peer."""
    found: dict[str, bytes] = {}
    for disk in snapshot.manifest.disks:
        target = MemoryDevice(disk.size_bytes)
        restore_disk(peer, disk, target, RestoreOptions(target_is_zero=True))
        found[disk.name] = target.content()
    for config in snapshot.manifest.configs:
        found[config.name] = read_config(peer, config)
    return found


def disk_bytes(seed: int, blocks: int, *, zero_every: int = 0, tail: int = 0) -> bytes:
    """Random blocks of 4 KiB, each ``zero_every``-th group of 8 zero, and ``tail`` more bytes."""
    source = random.Random(seed)
    parts = [
        bytes(BLOCK_BYTES) if zero_every and number // 8 % zero_every == 0 else source.randbytes(BLOCK_BYTES)
        for number in range(blocks)
    ]
    return b"".join(parts) + source.randbytes(tail)


def changed(content: bytes, seed: int, blocks: int) -> bytes:
    """The same disk with some blocks written anew."""
    source = random.Random(seed)
    result = bytearray(content)
    for _ in range(blocks):
        at = source.randrange(max(1, len(content) // BLOCK_BYTES)) * BLOCK_BYTES
        length = min(BLOCK_BYTES, len(content) - at)
        result[at : at + length] = source.randbytes(length)
    return bytes(result)


def _observe(index: Index, machine: SimulatedMachine) -> None:
    """Make operations of each write transaction: before it begins, before its commit, once it is durable."""
    if "write" in vars(index):
        return
    original_write, original_read = index.write, index.read

    def write(change: Callable[[Any], Any]) -> Any:
        def observed(txn: Any) -> Any:
            machine.transactions += 1
            try:
                result = change(txn)
                machine.begin("committing", "")
                return result
            finally:
                machine.transactions -= 1

        machine.begin("transaction", "")
        result = original_write(observed)
        machine.begin("committed", "")
        return result

    @contextmanager
    def read() -> Iterator[Any]:
        machine.look("read transaction")
        with original_read() as txn:
            machine.transactions += 1
            try:
                yield txn
            finally:
                machine.transactions -= 1

    setattr(index, "write", write)  # noqa: B010
    setattr(index, "read", read)  # noqa: B010


__all__ = [
    "VM",
    "Content",
    "Photo",
    "Promises",
    "World",
    "changed",
    "contents",
    "disk_bytes",
    "inline",
    "request",
    "temporary_world",
]
