"""The live backup job: all disks of a running VM at one instant become a snapshot.

Where QEMU has a dirty bitmap that belongs to a snapshot of the VM here, only what it names is read, and laid over that
snapshot's disk. Otherwise the whole disk is read, and what is stored already is not stored again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from casbackup.clock import Clock, SystemClock
from casbackup.errors import BackupBroken, CasbackupError
from casbackup.formats.coverage import Coverage, RangeSet
from casbackup.ids import BlobId, DiskName, Namespace, SessionId, VmName
from casbackup.jobs.assembler import Assembler
from casbackup.jobs.backup import check_annotations, check_configs, parked_on_error
from casbackup.jobs.segment_store import SegmentStore
from casbackup.jobs.spot_check import SpotCheck
from casbackup.jobs.state_sink import StateSink
from casbackup.limits import MAX_DISK_BYTES, SEGMENT_BYTES
from casbackup.peer.api import Peer, PeerSession
from casbackup.peer.disk import BlobCache
from casbackup.progress import NoProgress, Progress
from casbackup.qemu import bitmaps, cleanup
from casbackup.qemu.bitmaps import BasedOn, Tracking
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import LiveDisk
from casbackup.qemu.machine import Machine
from casbackup.qemu.ram_stream import STREAM_MAGIC
from casbackup.qemu.reading import readable
from casbackup.qemu.source import DiskTask, Instant, LiveSource, Report
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import VMSTATE, DiskRecord, LiveOrigin, Manifest
from casbackup.tree.builder import TreeBuilder
from casbackup.tree.edit import TreeEditor
from casbackup.tree.reader import DiskTree


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """What to make of a running VM. ``configs``: besides those of QEMU's own.

    ``full``: read everything, whatever the bitmaps say. ``track``: leave bitmaps in QEMU for the next backup.
    ``verify_share``: of each disk, 0 to 1, is compared with the snapshot before, as far as its bitmap says that it is
    unchanged; if it is not, everything is read.
    """

    namespace: Namespace
    vm: VmName
    configs: Mapping[str, bytes] = field(default_factory=dict)
    labels: Sequence[str] = ()
    notes: str = ""
    host: str = ""
    program: str = ""
    time_ms: int | None = None
    resume: SessionId | None = None
    full: bool = False
    track: bool = True
    verify_share: float = 0.0


class DiskReport(NamedTuple):
    """How a disk was read. ``reason``: why all of it was, if it was. ``lost``: although there had been a bitmap."""

    name: DiskName
    increment: bool
    reason: str
    lost: bool


@dataclass(frozen=True, slots=True)
class LiveReport:
    snapshot: Snapshot
    disks: Sequence[DiskReport]
    instant: Instant


class _Plan(NamedTuple):
    """A disk, what it is based on, and the record that it is laid over."""

    disk: LiveDisk
    based_on: BasedOn
    base: DiskRecord | None


def live_backup(
    peer: Peer,
    machine: Machine,
    request: LiveRequest,
    *,
    control: LiveControl,
    report: Report,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> LiveReport:
    """Back up a running VM.

    On an error the session is parked as by ``backup``, and QEMU is as before but for bitmaps of earlier snapshots,
    which stay true.

    :raise LiveBackupError: when QEMU or the guest does not play along.
    :raise RepositoryError: when the repository cannot take it.
    """
    check_configs(request.configs)
    check_annotations(request.labels, request.notes)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(parked_on_error(peer, request.namespace, request.vm, request.resume))
        job = _LiveBackup(peer, session, machine, request, control, report, progress or NoProgress(), clock)
        return job.run(stack)


class _BitmapLied(Exception):
    """A dirty bitmap calls something unchanged that is not."""


class _LiveBackup:
    def __init__(
        self,
        peer: Peer,
        session: PeerSession,
        machine: Machine,
        request: LiveRequest,
        control: LiveControl,
        report: Report,
        progress: Progress,
        clock: Clock | None,
    ) -> None:
        self._peer = peer
        self._session = session
        self._machine = machine
        self._request = request
        self._control = control
        self._report = report
        self._progress = progress
        self._clock = clock or SystemClock()
        self._store = SegmentStore(session, peer.config, peer.codec, progress)
        self._cache = BlobCache(peer)
        self._target = bitmaps.target_of(peer.config.repository_id, request.namespace, request.vm)

    def run(self, stack: contextlib.ExitStack) -> LiveReport:
        started_s = self._clock.monotonic_s()
        plans = self._plans(stack)
        try:
            token, time_ms, instant, disks = self._attempt(plans)
        except _BitmapLied as lie:
            self._report(f"{lie}: everything is read")
            plans = [_Plan(plan.disk, BasedOn(None, str(lie), lost=True), None) for plan in plans]
            self._store = SegmentStore(self._session, self._peer.config, self._peer.codec, self._progress)
            token, time_ms, instant, disks = self._attempt(plans)
        try:
            snapshot = self._commit(plans, disks, instant, token, time_ms, started_s)
        except BaseException:
            self._remove_bitmaps(token)
            raise
        self._remove_stale_bitmaps(plans, token)
        reports = [DiskReport(p.disk.name, p.based_on.is_increment, p.based_on.reason, p.based_on.lost) for p in plans]
        return LiveReport(snapshot, reports, instant)

    def _attempt(self, plans: Sequence[_Plan]) -> tuple[str, int, Instant, tuple[DiskRecord, ...]]:
        """Read all disks: the token of new bitmaps, the time, and what came of it."""
        token = bitmaps.new_token() if self._request.track else ""
        source = self._machine.source(self._control, self._report, Tracking(self._target, token) if token else None)
        check = self._spot_check(plans)
        time_ms = self._clock.now_ms() if self._request.time_ms is None else self._request.time_ms
        return token, time_ms, *self._read(source, plans, check)

    # --- what each disk is based on

    def _plans(self, stack: contextlib.ExitStack) -> list[_Plan]:
        """``stack`` keeps the snapshots that are built on."""
        known = {
            s.manifest.live.bitmap: s
            for s in reversed(self._peer.snapshots(self._request.namespace, self._request.vm))
            if s.manifest.live is not None and s.manifest.live.bitmap
        }
        plans = [self._plan(disk, known) for disk in self._machine.disks]
        for token in {plan.based_on.token for plan in plans if plan.based_on.token is not None}:
            stack.enter_context(self._peer.reading(known[token]))
        return plans

    def _plan(self, disk: LiveDisk, known: Mapping[str, Snapshot]) -> _Plan:
        if self._request.full:
            return _Plan(disk, BasedOn(None, "asked for"), None)
        sizes = {token: {d.name: d.size_bytes for d in s.manifest.disks} for token, s in known.items()}
        based_on = bitmaps.choose(disk, self._target, sizes)
        if based_on.token is None:
            return _Plan(disk, based_on, None)
        base = next(d for d in known[based_on.token].manifest.disks if d.name == disk.name)
        if base.root != BlobId(bytes(32)) and self._session.missing([base.root]):
            return _Plan(disk, BasedOn(None, "the snapshot before is damaged", lost=True), None)
        return _Plan(disk, based_on, base)

    # --- reading

    def _spot_check(self, plans: Sequence[_Plan]) -> SpotCheck | None:
        based = [number for number, plan in enumerate(plans) if plan.base is not None]
        if not self._request.verify_share or not based:
            return None
        check = SpotCheck(self._request.verify_share, self._cache, self._peer.codec.ids)
        with readable(self._machine.qmp, [plans[number].disk for number in based]) as devices:
            for number, device in zip(based, devices, strict=True):
                base = self._tree(plans[number].base)
                assert base is not None
                self._store.count_read(check.sample(number, base, device))
        return check

    def _read(
        self, source: LiveSource, plans: Sequence[_Plan], check: SpotCheck | None
    ) -> tuple[Instant, tuple[DiskRecord, ...]]:
        leaves = [self._leaves(plan) for plan in plans]
        bases = [self._tree(plan.base) for plan in plans]
        sizes = [plan.disk.size_bytes for plan in plans]
        state = TreeBuilder()
        sink = StateSink(self._store, [*leaves, state], [*bases, None])
        self._progress.start(self._request.vm, sum(_expected_bytes(plan, self._target) for plan in plans))
        with Assembler([*sizes, MAX_DISK_BYTES], sink) as assembler:
            feed = _Feed(assembler, sink, plans)
            instant = source.run([DiskTask(p.disk, self._bitmap(p)) for p in plans], feed)
            try:
                feed.require_complete(state=instant.state is not None)
                feed.require_truth(check)
                assembler.end_stream(len(plans), feed.state_bytes)
                assembler.finish(partial=True)
            except BaseException:
                self._remove_bitmaps(source.token)
                raise
        self._store.count_read(feed.read_bytes)
        disks = tuple(self._disk(*item) for item in zip(plans, leaves, strict=True))
        if instant.state is not None:
            disks += (self._state_disk(plans, state, feed.state_bytes),)
        self._progress.finish()
        return instant, disks

    def _leaves(self, plan: _Plan) -> TreeBuilder | TreeEditor:
        return TreeBuilder() if plan.base is None else TreeEditor(plan.base.root, self._cache.get)

    def _tree(self, base: DiskRecord | None) -> DiskTree | None:
        return None if base is None else DiskTree(base.root, base.size_bytes, self._cache.get)

    def _bitmap(self, plan: _Plan) -> str | None:
        return None if plan.based_on.token is None else bitmaps.bitmap_name(self._target, plan.based_on.token)

    def _disk(self, plan: _Plan, leaves: TreeBuilder | TreeEditor) -> DiskRecord:
        size = plan.disk.size_bytes
        if isinstance(leaves, TreeEditor):
            self._store.known_reused(size - sum(min(SEGMENT_BYTES, size - n * SEGMENT_BYTES) for n in leaves.changed))
        return DiskRecord(plan.disk.name, size, leaves.finish(size, self._store.nodes), plan.disk.source)

    def _state_disk(self, plans: Sequence[_Plan], leaves: TreeBuilder, size_bytes: int) -> DiskRecord:
        name = VMSTATE
        while name in {plan.disk.name for plan in plans}:
            name += "_"
        return DiskRecord(DiskName(name), size_bytes, leaves.finish(size_bytes, self._store.nodes), role=VMSTATE)

    # --- the end

    def _commit(
        self,
        plans: Sequence[_Plan],
        disks: tuple[DiskRecord, ...],
        instant: Instant,
        token: str,
        time_ms: int,
        started_s: float,
    ) -> Snapshot:
        request = self._request
        configs = {**self._machine.configs, **request.configs}
        records = tuple(self._store.config(name, content) for name, content in configs.items())
        return self._session.commit(
            Manifest(
                namespace=request.namespace,
                vm=request.vm,
                time_ms=time_ms,
                sequence=0,
                disks=disks,
                configs=records,
                labels=tuple(request.labels),
                notes=request.notes,
                host=request.host,
                program=request.program,
                stats=self._store.stats(round((self._clock.monotonic_s() - started_s) * 1000)),
                live=LiveOrigin(
                    mode=instant.mode,
                    mode_note=instant.mode_note,
                    qemu=self._machine.version,
                    frozen=instant.frozen,
                    note=instant.note,
                    bitmap=token,
                    increments=tuple(plan.disk.name for plan in plans if plan.based_on.is_increment),
                    vmstate=instant.state.way if instant.state else "",
                    pause_ms=round(instant.state.pause_s * 1000) if instant.state else 0,
                ),
            )
        )

    def _remove_bitmaps(self, token: str) -> None:
        """No snapshot is going to name them. If that fails, the next backup finds that they are of no use."""
        if token:
            with contextlib.suppress(CasbackupError):
                cleanup.remove_bitmaps(self._machine.qmp, token)

    def _remove_stale_bitmaps(self, plans: Sequence[_Plan], token: str) -> None:
        with contextlib.suppress(CasbackupError):
            for plan in plans:
                names = bitmaps.stale(plan.disk, self._target, [token])
                cleanup.remove_named_bitmaps(self._machine.qmp, plan.disk.node, names)


class _Feed:
    """What the source gives, counted and checked, into the assembler."""

    def __init__(self, assembler: Assembler, sink: StateSink, plans: Sequence[_Plan]) -> None:
        self._assembler = assembler
        self._sink = sink
        self._plans = plans
        self._coverage = [Coverage(plan.disk.size_bytes) for plan in plans]
        self.read_bytes = 0
        self._state = RangeSet()

    @property
    def state_bytes(self) -> int:
        """Of the VM's memory, which comes as a disk after the others; mostly, but not always, in order."""
        return max((end for _start, end in self._state), default=0)

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        number = int(disk)
        if number == len(self._plans):
            self._follow(offset, data)
        else:
            self._cover(number, offset, len(data))
        self.read_bytes += len(data)
        self._assembler.put(number, offset, data)

    def zero(self, disk: str, offset: int, length: int) -> None:
        number = int(disk)
        self._cover(number, offset, length)
        self._sink.note_zeros(number, offset, length)
        self._assembler.zeros(number, offset, length)

    def require_complete(self, *, state: bool) -> None:
        """``state``: memory should have come, too.

        :raise BackupBroken: when something of a disk that is read in full never came, or no memory did.
        """
        for plan, coverage in zip(self._plans, self._coverage, strict=True):
            if plan.base is None and not coverage.is_complete:
                gap = next(coverage.missing())
                raise BackupBroken(f"{plan.disk.name}: {gap.length} bytes from {gap.offset} never came")
        if state and [(0, self.state_bytes)] != list(self._state):
            raise BackupBroken("the VM's memory never came, or not all of it")

    def require_truth(self, check: SpotCheck | None) -> None:
        """:raise _BitmapLied: when something had changed that did not come."""
        if check is None:
            return
        for number, plan in enumerate(self._plans):
            found = check.contradiction(number, self._coverage[number])
            if found is not None:
                place = f"{plan.disk.name}: {found[1]} bytes at {found[0]}"
                raise _BitmapLied(f"{place} have changed, and the dirty bitmap does not say so")

    def _follow(self, offset: int, data: memoryview) -> None:
        """:raise BackupBroken: when a piece of the memory comes twice, or is none."""
        twice = any(self._state.overlap(offset, offset + len(data)))
        if twice or (offset == 0 and data[: len(STREAM_MAGIC)] != STREAM_MAGIC):
            raise BackupBroken(f"the VM's memory does not come as it should at byte {offset}")
        self._state.add(offset, offset + len(data))

    def _cover(self, number: int, offset: int, length: int) -> None:
        """:raise BackupBroken: when something comes a second time: which of them is right?"""
        if self._coverage[number].add(offset, length):
            raise BackupBroken(f"{self._plans[number].disk.name}: {length} bytes at {offset} came twice")


def _expected_bytes(plan: _Plan, target: str) -> int:
    if plan.based_on.token is None:
        return plan.disk.size_bytes
    name = bitmaps.bitmap_name(target, plan.based_on.token)
    return next(bitmap.dirty_bytes for bitmap in plan.disk.bitmaps if bitmap.name == name)
