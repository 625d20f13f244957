"""A repository against a model in plain Python, under sessions, gc, crashes and clocks that jump.

Sessions go in small steps that remember answers as real clients do: what ``missing`` said about a leaf is
acted upon later, when a gc may have begun, ended, or be in the middle of its work. Every look at the index
and every operation of a gc is a place where a few steps of others may happen. Here others lost data.

The model: a snapshot that was committed is there, whole, until it is forgotten; a session that keeps to the
protocol can always commit; what is being read can be read to its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from casbackup.errors import DataDamage, RepositoryBusy, SessionNotFound
from casbackup.ids import DEFAULT_NAMESPACE, ZERO_ID, BlobId, DiskName, SessionId, SnapshotId, VmName
from casbackup.limits import SEGMENT_BYTES
from casbackup.peer.disk import fetch_nodes
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.gc import GcPlan, execute_gc, plan_gc
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import LEASE_S, Session
from casbackup.spec.manifest import DiskRecord, Manifest
from casbackup.spec.node import Extent, zero_extent
from casbackup.spec.record import Record
from casbackup.testing.peer import chunk, inner, leaf
from casbackup.testing.simfs import SimulatedCrash
from casbackup.testing.world import World, temporary_world
from casbackup.tree.reader import DiskTree

CHUNKS = [chunk(random.Random(number).randbytes(1500 + 700 * number)) for number in range(7)]
LEAF_CHUNKS = [(0, 1), (1, 2, 3), (4,), (5, 0), (6, 2), (3, 6, 4)]
VMS = [VmName("vm/1"), VmName("vm/2")]

Disk = tuple[int, ...]
"""Which of the leaves each segment of a disk is."""

DISKS: list[Disk] = [(0,), (1,), (0, 1), (2, 3), (0, 1, 4), (5, 5)]
THRESHOLDS = st.sampled_from([0.01, 0.25, 2.0])
JUMPS = [1, 3600, 2 * LEASE_S, 315_360_000, -1, -3600, -315_360_000]


def leaf_record(number: int) -> Record:
    parts = [CHUNKS[n] for n in LEAF_CHUNKS[number]]
    extents = [Extent(part.plain_length, 0, part.id) for part in parts]
    rest = SEGMENT_BYTES - sum(extent.length for extent in extents)
    return leaf([*extents, zero_extent(rest)])


LEAVES = [leaf_record(number) for number in range(len(LEAF_CHUNKS))]


class Writer:
    """A client that backs up ``disk``. Each step asks, sends or commits, by what it was told before."""

    def __init__(self, process: Process, session: Session, vm: VmName, disk: Disk) -> None:
        self.process = process
        self.session = session
        self.vm = vm
        self.disk = disk
        self.steps = self._run()
        self.snapshot: Snapshot | None = None

    def step(self) -> bool:
        """Go on; False when the backup is committed."""
        return next(self.steps, None) is not None

    def _run(self) -> Iterator[str]:
        for number in self.disk:
            if not self.session.missing([LEAVES[number].id]):
                yield "a leaf is there"
                continue
            yield "a leaf is missing"
            parts = [CHUNKS[n] for n in LEAF_CHUNKS[number]]
            missing = self.session.missing([part.id for part in parts])
            yield "asked for chunks"
            for part in parts:
                if part.id in missing:
                    self.session.send([part])
                    yield "sent a chunk"
            self.session.send([LEAVES[number]])
            yield "sent a leaf"
        root = LEAVES[self.disk[0]].id
        if len(self.disk) > 1:
            record = inner(1, [LEAVES[number].id for number in self.disk])
            root = record.id
            missing = self.session.missing([root])
            yield "asked for the root"
            if missing:
                self.session.send([record])
                yield "sent the root"
        self.snapshot = self.session.commit(self._draft(root))

    def _draft(self, root: BlobId) -> Manifest:
        now_ms = self.process.repository.clock.now_ms()
        record = DiskRecord(DiskName("d"), len(self.disk) * SEGMENT_BYTES, root)
        return Manifest(DEFAULT_NAMESPACE, self.vm, now_ms, 0, (record,))


class Process:
    """A process that uses the repository: its writers, its readers, and the gc that it may be doing."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.writers: list[Writer] = []
        self.readers: list[tuple[Snapshot, Disk, AbstractContextManager[None]]] = []


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.world: World = self.stack.enter_context(temporary_world())
        self.world.create().close()
        self.processes = [Process(self.world.open()) for _ in range(2)]
        self.kept: dict[SnapshotId, Disk] = {}
        self.unsure: list[Disk] = []
        self.parked: list[tuple[SessionId, VmName, Disk, int]] = []
        self.plan: tuple[Process, GcPlan, AbstractContextManager[None]] | None = None
        self.collected_ms: list[int] = []

    def teardown(self) -> None:
        self.world.machine.crash_at(0)
        try:
            self.drop_plan()
            for process in self.processes:
                self.go_on_reading(process)
                for writer in process.writers:
                    writer.session.park()
            self.check_all()
            repository = self.processes[0].repository
            self.world.clock.pass_time(2 * LEASE_S)
            self.collect(0)
            self.collect(0)
            self.check_all()
            if not self.kept:
                assert list(repository.store.storage.list()) == [], "all garbage goes in the end"
        finally:
            self.stack.close()

    # --- things that happen

    @rule(who=st.integers(0, 1), vm=st.sampled_from(VMS), disk=st.sampled_from(DISKS), steps=st.integers(0, 3))
    def begin(self, who: int, vm: VmName, disk: Disk, steps: int) -> None:
        self.happen(lambda: self.begin_backup(who, vm, disk, steps))

    @precondition(lambda self: self.writers())
    @rule(which=st.integers(0, 9), steps=st.integers(1, 4))
    def go_on(self, which: int, steps: int) -> None:
        self.happen(lambda: self.advance(which, steps))

    @precondition(lambda self: self.writers())
    @rule(which=st.integers(0, 9))
    def finish(self, which: int) -> None:
        self.happen(lambda: self.advance(which, 100))

    @rule(who=st.integers(0, 1), vm=st.sampled_from(VMS), disk=st.sampled_from(DISKS))
    def back_up(self, who: int, vm: VmName, disk: Disk) -> None:
        self.happen(lambda: self.begin_backup(who, vm, disk, 100))

    @precondition(lambda self: self.writers())
    @rule(which=st.integers(0, 9), how=st.sampled_from(["flush", "park", "park", "abort"]))
    def interrupt(self, which: int, how: str) -> None:
        def action() -> None:
            writer = self.writers()[which % len(self.writers())]
            if how == "flush":
                writer.session.flush()
                return
            if how == "park":
                self.leave(writer)
            writer.process.writers.remove(writer)
            if how == "park":
                writer.session.park()
            else:
                writer.session.abort()

        self.happen(action)

    @precondition(lambda self: self.parked)
    @rule(who=st.integers(0, 1), which=st.integers(0, 5), disk=st.none() | st.sampled_from(DISKS))
    def resume(self, who: int, which: int, disk: Disk | None) -> None:
        def action() -> None:
            session_id, vm, old_disk, since_ms = self.parked.pop(which % len(self.parked))
            process = self.processes[who]
            try:
                session = process.repository.sessions.resume(session_id)
            except SessionNotFound:
                expired = any(abs(when - since_ms) > LEASE_S * 1000 for when in self.collected_ms)
                assert expired, "a parked session was lost"
            else:
                process.writers.append(Writer(process, session, vm, disk or old_disk))

        self.happen(action)

    @precondition(lambda self: self.kept)
    @rule(which=st.integers(0, 9), who=st.integers(0, 1))
    def forget(self, which: int, who: int) -> None:
        self.happen(lambda: self.forget_one(which, who))

    @precondition(lambda self: self.kept and not any(process.readers for process in self.processes))
    @rule(which=st.integers(0, 9), who=st.integers(0, 1))
    def begin_reading(self, which: int, who: int) -> None:
        self.happen(lambda: self.begin_to_read(which, who))

    @precondition(lambda self: any(process.readers for process in self.processes))
    @rule(who=st.integers(0, 1))
    def finish_reading(self, who: int) -> None:
        self.happen(lambda: self.go_on_reading(self.processes[who]))

    # --- gc

    @rule(who=st.integers(0, 1), threshold=THRESHOLDS, data=st.data())
    def gc(self, who: int, threshold: float, data: st.DataObject) -> None:
        self.happen(lambda: self.collect(who, threshold), self.interference(data))

    @precondition(lambda self: self.plan is None)
    @rule(who=st.integers(0, 1), threshold=THRESHOLDS, data=st.data())
    def plan_gc(self, who: int, threshold: float, data: st.DataObject) -> None:
        def action() -> None:
            process = self.processes[who]
            lock = process.repository.maintenance()
            lock.__enter__()
            try:
                plan = plan_gc(process.repository, repack_garbage=threshold)
            except BaseException:
                lock.__exit__(None, None, None)
                raise
            self.plan = process, plan, lock

        self.happen(action, self.interference(data))

    @precondition(lambda self: self.plan is not None)
    @rule(data=st.data())
    def execute_gc(self, data: st.DataObject) -> None:
        def action() -> None:
            assert self.plan is not None
            process, plan, lock = self.plan
            self.plan = None
            with ExitStack() as stack:
                stack.callback(lock.__exit__, None, None, None)
                stack.enter_context(suppress(RepositoryBusy))  # an expired session was resumed since the plan
                execute_gc(process.repository, plan)
                self.collected_ms.append(self.world.clock.now_ms())

        self.happen(action, self.interference(data))

    # --- failures

    @rule(what=st.sampled_from(["jump", "jump", "crash", "crash soon", "kill"]), n=st.integers(0, 30))
    def disaster(self, what: str, n: int) -> None:
        if what == "jump":
            self.world.clock.jump(JUMPS[n % len(JUMPS)])
        elif what == "crash":
            self.restart(n)
        elif what == "crash soon":
            self.world.machine.crash_at(len(self.world.machine.log) + 1 + n)
        else:
            self.kill(n % 2)

    def kill(self, who: int) -> None:
        process = self.processes[who]
        if self.plan is not None and self.plan[0] is process:
            self.plan = None
        process.repository.fs.kill()  # type: ignore[attr-defined]
        self.bury(process)
        process.repository.index.close()
        self.happen(lambda: self.processes.__setitem__(who, Process(self.world.open())))

    # --- what must be true

    @rule()
    def check(self) -> None:
        self.happen(self.check_all)

    @invariant()
    def every_snapshot_is_there(self) -> None:
        if not self.world.machine.is_off and self.world.machine._crash_at == 0:
            self.check_snapshots()

    def check_all(self) -> None:
        self.check_snapshots()
        report = check(self.processes[0].repository, CheckOptions(read_data=True))
        assert not report.damaged, report.findings

    def check_snapshots(self) -> None:
        repository = self.processes[0].repository
        found = {snapshot.id: snapshot for snapshot in repository.catalog.all()}
        assert set(self.kept) == set(found)
        for snapshot_id, disk in self.kept.items():
            assert read_disk(repository, found[snapshot_id]) == expected(disk)

    # --- how it is done

    def happen(self, action: Callable[[], None], meanwhile: Callable[[], None] | None = None) -> None:
        """Do something, while others may interfere; a crash that was arranged may end it."""
        self.world.machine.meanwhile = meanwhile
        try:
            action()
        except SimulatedCrash:
            self.restart(len(self.world.machine.log))
        finally:
            self.world.machine.meanwhile = None

    def interference(self, data: st.DataObject) -> Callable[[], None]:
        """What others do in the middle of something: small actions, each after some number of chances."""
        actions: dict[str, Callable[[int], None]] = {
            "advance": lambda n: self.advance(n, 1 + n % 4),
            "finish": lambda n: self.advance(n, 100),
            "forget": lambda n: self.forget_one(n, n % 2),
            "read": lambda n: self.begin_to_read(n, n % 2),
            "stop reading": lambda n: self.go_on_reading(self.processes[n % 2]),
            "begin": lambda n: self.begin_backup(n % 2, VMS[n // 2 % 2], DISKS[n % len(DISKS)], n % 4),
            "back up": lambda n: self.begin_backup(n % 2, VMS[n // 2 % 2], DISKS[n % len(DISKS)], 100),
        }
        one = st.tuples(st.integers(0, 15), st.sampled_from(sorted(actions)), st.integers(0, 30))
        planned = data.draw(st.lists(one, max_size=6), label="meanwhile")
        pending = [(gap, actions[name], number) for gap, name, number in reversed(planned)]
        waited = 0

        def meanwhile() -> None:
            nonlocal waited
            waited += 1
            if pending and waited > pending[-1][0]:
                waited = 0
                _, action, number = pending.pop()
                self.world.machine.meanwhile = None
                try:
                    action(number)
                finally:
                    self.world.machine.meanwhile = meanwhile

        return meanwhile

    def writers(self) -> list[Writer]:
        return [writer for process in self.processes for writer in process.writers]

    def begin_backup(self, who: int, vm: VmName, disk: Disk, steps: int) -> None:
        process = self.processes[who]
        if len(self.writers()) < 4:
            session = process.repository.sessions.open(DEFAULT_NAMESPACE, vm)
            process.writers.append(Writer(process, session, vm, disk))
            self.advance(self.writers().index(process.writers[-1]), steps)

    def advance(self, which: int, steps: int) -> None:
        if not self.writers():
            return
        writer = self.writers()[which % len(self.writers())]
        self.unsure.append(writer.disk)
        for _ in range(steps):
            if not writer.step():
                assert writer.snapshot is not None
                self.kept[writer.snapshot.id] = writer.disk
                writer.process.writers.remove(writer)
                break
        self.unsure.remove(writer.disk)

    def forget_one(self, which: int, who: int) -> None:
        if not self.kept:
            return
        snapshot_id = list(self.kept)[which % len(self.kept)]
        catalog = self.processes[who].repository.catalog
        (snapshot,) = [s for s in catalog.all() if s.id == snapshot_id]
        disk = self.kept.pop(snapshot_id)
        self.unsure.append(disk)
        catalog.remove([snapshot])
        self.unsure.remove(disk)

    def begin_to_read(self, which: int, who: int) -> None:
        process = self.processes[who]
        if not self.kept or len(process.readers) > 2:
            return
        snapshot_id = list(self.kept)[which % len(self.kept)]
        (snapshot,) = [s for s in process.repository.catalog.all() if s.id == snapshot_id]
        reading = LocalPeer(process.repository).reading(snapshot)
        reading.__enter__()
        process.readers.append((snapshot, self.kept[snapshot_id], reading))

    def go_on_reading(self, process: Process) -> None:
        while process.readers:
            snapshot, disk, reading = process.readers.pop()
            assert read_disk(process.repository, snapshot) == expected(disk), "lost while it was read"
            reading.__exit__(None, None, None)

    def collect(self, who: int, threshold: float = 0.25) -> None:
        if self.plan is None:
            repository = self.processes[who].repository
            with repository.maintenance():
                execute_gc(repository, plan_gc(repository, repack_garbage=threshold))
            self.collected_ms.append(self.world.clock.now_ms())

    def drop_plan(self) -> None:
        if self.plan is not None:
            self.plan[2].__exit__(None, None, None)
            self.plan = None

    def leave(self, writer: Writer) -> None:
        """A backup that can be resumed, until gc finds its last sign of life too far from what the clock says then."""
        index = writer.process.repository.index
        sessions = writer.process.repository.sessions
        with type(index).read(index) as txn:
            row = sessions.get(txn, writer.session.id)
        if row is not None:
            self.parked.append((writer.session.id, writer.vm, writer.disk, row.seen_ms))

    def bury(self, process: Process) -> None:
        """A process is gone: its backups can be resumed, its readers are no more."""
        for writer in process.writers:
            if writer.snapshot is None:
                self.leave(writer)
        machine = self.world.machine
        was_off, machine.is_off = machine.is_off, True  # so that nothing is tidied up by what is dead
        for _, _, reading in process.readers:
            with suppress(SimulatedCrash):
                reading.__exit__(None, None, None)
        machine.is_off = was_off
        process.writers, process.readers = [], []

    def restart(self, seed: int) -> None:
        """The power fails. What was promised stays; what was under way is settled either way."""
        for process in self.processes:
            self.bury(process)
        self.plan = None
        self.world.crash(seed)
        self.processes = [Process(self.world.open()) for _ in range(2)]
        repository = self.processes[0].repository
        with repository.index.read() as txn:
            rows = {row.id for row in repository.sessions.rows(txn)}
        self.parked = [parked for parked in self.parked if parked[0] in rows]
        for snapshot in repository.catalog.all():
            if snapshot.id not in self.kept:
                found = read_disk(repository, snapshot)
                (disk,) = {disk for disk in self.unsure if expected(disk) == found}
                self.kept[snapshot.id] = disk
        self.unsure = []


def expected(disk: Disk) -> list[tuple[int, BlobId]]:
    """The chunks of a disk and where they are."""
    found: list[tuple[int, BlobId]] = []
    for number, which in enumerate(disk):
        offset = number * SEGMENT_BYTES
        for n in LEAF_CHUNKS[which]:
            found.append((offset, CHUNKS[n].id))
            offset += CHUNKS[n].plain_length
    return found


def read_disk(repository: Repository, snapshot: Snapshot) -> list[tuple[int, BlobId]]:
    """The same of a snapshot, with all chunks read and verified."""
    (record,) = snapshot.manifest.disks
    peer = LocalPeer(repository)

    def fetch(ids: Sequence[BlobId]) -> Any:
        found = fetch_nodes(peer, ids)
        assert set(found) == set(ids)
        return found

    tree = DiskTree(record.root, record.size_bytes, fetch)
    found = [(offset, e.id) for offset, e in tree.extents(0, record.size_bytes) if e.id != ZERO_ID]
    for plain in fetch(list({blob_id for _, blob_id in found})).values():
        if isinstance(plain, DataDamage):
            raise plain
    return found


class TestModel(Model.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(
        max_examples=60,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.slow
class TestModelForLong(Model.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(
        max_examples=3000,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
