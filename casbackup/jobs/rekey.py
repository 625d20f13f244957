"""Copying snapshots to a repository that has another key, or to or from one that is not encrypted.

Ids, the places where chunks end and seals all depend on the key, so nothing can be copied as it is stored: the disks
are read, verified and decrypted, and cut, hashed, encrypted and sent as a backup does it. A copy has another id; its
manifest names the snapshot that it is a copy of, which in an encrypted repository is sealed with the rest of it. So the
next run knows what it need not copy.

What costs is reading, so as little as possible is read. Holes are not. Nor is a segment whose leaf was met before, in
this run or in the VM's latest snapshot that has a copy: the leaf of the copy is asked for, and if it is there, all that
it needs is.

A run that was interrupted leaves whole snapshots only. The next one reads the others again, and sends of them only what
had not arrived.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from casbackup.buffers import aligned_buffer
from casbackup.errors import DataDamage, RightMissing, SnapshotConflict, SnapshotNotFound, UsageError
from casbackup.ids import ZERO_ID, BlobId, Namespace, SnapshotId, VmName
from casbackup.jobs.copying import Tally
from casbackup.jobs.ratelimit import NO_LIMIT, RateLimit
from casbackup.jobs.restore import read_config
from casbackup.jobs.segment_store import SegmentStore
from casbackup.jobs.segments import Filled
from casbackup.jobs.sync import SyncRequest, require_readable
from casbackup.jobs.sync_plan import plan_sync
from casbackup.jobs.sync_report import Outcome, SnapshotResult, SyncReport
from casbackup.jobs.sync_run import SyncRun
from casbackup.limits import BLOCK_BYTES, SEGMENT_BYTES
from casbackup.peer.api import Peer, PeerSession
from casbackup.peer.disk import BlobCache, SnapshotDisk, fetch_nodes
from casbackup.peer.sealed import SealedPeer
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import DiskRecord, Manifest, encode_manifest
from casbackup.spec.record import BlobKind, Record
from casbackup.store.writer import StoredBytes
from casbackup.tree.builder import TreeBuilder
from casbackup.tree.leaves import leaves
from casbackup.workers import run_workers

WORKERS = 6
"""More than processors: over HTTP, each waits for what it reads."""
_KNOWN_LEAVES = 2**19
"""Leaves whose copies are remembered, 2 TiB of different segments in 120 MB; of what is beyond, some is read twice."""
_CONTENT_ERRORS = (DataDamage, SnapshotConflict, SnapshotNotFound)
"""What keeps one snapshot from being copied, and no other."""


@dataclass(frozen=True, slots=True)
class RekeyCost:
    """What copying takes, about: bytes of content that are read, decrypted and encrypted, and as many bytes as they
    take at the source. None: the source does not tell.
    """

    content_bytes: int | None
    stored_bytes: int | None


@dataclass(frozen=True, slots=True)
class RekeyReport:
    """``sync`` as for copying as it is, but without a proof: ids are others. ``read_bytes``: of content, as it was."""

    sync: SyncReport
    expected: RekeyCost
    read_bytes: int


def rekey(
    source: Peer,
    destination: Peer,
    request: SyncRequest,
    announce: Callable[[RekeyCost, int], None] = lambda _cost, _snapshots: None,
    *,
    limit: RateLimit = NO_LIMIT,
    progress: Progress | None = None,
) -> RekeyReport:
    """Copy what is meant and missing. A snapshot that cannot be copied is reported; the others are copied.

    ``announce`` is told what it costs, and how many snapshots there are to copy, before anything is copied.

    :raise UsageError: when both have the same key, or a mirroring would remove too much. :raise KeyMissing: when an end
        was opened without its key. :raise CasbackupError: when an end fails altogether. What was copied until then is
        there.
    """
    if source.config.key_fingerprint == destination.config.key_fingerprint:
        raise UsageError("both repositories have the same key, or none: `sync` without --rekey copies what is stored")
    _ = source.codec.ids, destination.codec.ids
    where = request.chosen.only_vm
    found, unreadable = source.survey(*where)
    there, _damaged = destination.survey(*where)
    require_readable(request, unreadable)
    origin = _Origins(found)
    plan = plan_sync(found, there, request.chosen, mirror=request.mirror, origin=origin)
    copies = {origin(snapshot): snapshot for snapshot in there}
    copied = [snapshot for snapshot in found if snapshot.id in copies]
    cost = expected_cost(source, plan.copy, copied)
    announce(cost, len(plan.copy))
    run = SyncRun(destination, plan)
    if request.dry_run:
        for snapshot in plan.copy:
            run.note(SnapshotResult(snapshot, Outcome.PLANNED))
        return RekeyReport(run.report(unreadable, None), cost, 0)
    progress = progress or NoProgress()
    work = _Rekey(source, destination, run, limit, progress)
    for snapshot in copied:
        work.learn(snapshot, copies[snapshot.id])
    progress.start("rekeying", plan.size_bytes)
    run.copy(work.copy)
    progress.finish()
    run.change()
    return RekeyReport(run.report(unreadable, None), cost, work.read_bytes)


def expected_cost(source: Peer, copy: Sequence[Snapshot], copied: Sequence[Snapshot]) -> RekeyCost:
    """What the one need that the others do not."""
    if not copy:
        return RekeyCost(0, 0)
    try:
        everything, already = source.usage([[*copy, *copied], copied]).groups
    except (DataDamage, RightMissing):
        return RekeyCost(None, None)
    return RekeyCost(everything.plain_bytes - already.plain_bytes, everything.stored_bytes - already.stored_bytes)


class _Origins:
    """Tells of what snapshot of the source one of the destination is a copy: what its manifest says, or that the one of
    the source was copied from there. Both are as trustworthy as manifests are, that is sealed where there is a key.
    """

    def __init__(self, source: Sequence[Snapshot]) -> None:
        self._copied_back = {s.manifest.copy_of: s.id for s in source if s.manifest.copy_of is not None}

    def __call__(self, snapshot: Snapshot) -> SnapshotId:
        return snapshot.manifest.copy_of or self._copied_back.get(snapshot.id, snapshot.id)


class _Rekey:
    """The copying. Snapshots come of each VM the oldest first."""

    def __init__(self, source: Peer, destination: Peer, run: SyncRun, limit: RateLimit, progress: Progress) -> None:
        self._source = source
        self._destination = destination
        self._run = run
        self._limit = limit
        self._progress = progress
        self._latest: dict[tuple[Namespace, VmName], tuple[Snapshot, Snapshot]] = {}
        self._copies: dict[SnapshotId, SnapshotId] = {}
        self._leaves = _KnownLeaves()
        self.read_bytes = 0

    def learn(self, snapshot: Snapshot, copy: Snapshot) -> None:
        """There is a copy of a snapshot already."""
        self._copies[snapshot.id] = copy.id
        self._latest[snapshot.manifest.namespace, snapshot.manifest.vm] = snapshot, copy

    def copy(self, snapshots: Sequence[Snapshot], session: PeerSession) -> None:
        for snapshot in snapshots:
            sending = _Sending(session, self._limit)
            try:
                with self._source.reading(snapshot):
                    self._look_at_copy(snapshot)
                    self._copy(snapshot, sending)
            except _CONTENT_ERRORS as error:
                self._run.note(SnapshotResult(snapshot, Outcome.FAILED, sending.tally, error))
            else:
                self._run.note(SnapshotResult(snapshot, Outcome.COPIED, sending.tally))

    def _look_at_copy(self, snapshot: Snapshot) -> None:
        """Learn which leaves are copies of each other from the VM's latest snapshot that has a copy."""
        pair = self._latest.pop((snapshot.manifest.namespace, snapshot.manifest.vm), None)
        if pair is None:
            return
        with contextlib.suppress(DataDamage):  # then more is read than need be
            for ours, theirs in _same_disks(*pair):
                found = dict(leaves(theirs.root, theirs.size_bytes, partial(fetch_nodes, self._destination)))
                for number, leaf in leaves(ours.root, ours.size_bytes, partial(fetch_nodes, self._source)):
                    if number in found:
                        self._leaves.note(leaf, found[number])

    def _copy(self, snapshot: Snapshot, sending: _Sending) -> None:
        manifest = snapshot.manifest
        store = SegmentStore(sending, self._destination.config, self._destination.codec, self._progress)
        cache = BlobCache(self._source)
        disks = [self._disk(disk, store, sending, cache) for disk in manifest.disks]
        configs = [store.config(config.name, read_config(self._source, config)) for config in manifest.configs]
        self.read_bytes += sum(config.size_bytes for config in configs)
        sending.settle()
        made = replace(
            manifest,
            disks=tuple(disks),
            configs=tuple(configs),
            parent=self._copies.get(manifest.parent) if manifest.parent else None,
            copy_of=snapshot.id,
        )
        self._copies[snapshot.id] = sending.adopt(_as_stored(self._destination, made), snapshot.sidecar).id

    def _disk(self, disk: DiskRecord, store: SegmentStore, sending: _Sending, cache: BlobCache) -> DiskRecord:
        builder = TreeBuilder()
        done_before = store.done_bytes
        waiting = self._unknown(disk, builder, store, sending)
        device = SnapshotDisk(self._source, disk, cache)
        lock = threading.Lock()

        def work(stop: threading.Event) -> None:
            sending.stop = stop
            buffer = aligned_buffer(SEGMENT_BYTES)
            view = memoryview(buffer)
            while not stop.is_set():
                with lock:
                    if not waiting:
                        return
                    number, leaf = waiting.popleft()
                filled = _filled(device, number, view)
                copied = store.segment(buffer, view, filled)
                builder.set_leaf(number, copied)
                self._leaves.note(leaf, copied)
                with lock:
                    self.read_bytes += filled.read_bytes

        run_workers(work, min(WORKERS, len(waiting)))
        store.known_zeros(disk.size_bytes - (store.done_bytes - done_before))
        return replace(disk, root=builder.finish(disk.size_bytes, store.nodes))

    def _unknown(
        self, disk: DiskRecord, builder: TreeBuilder, store: SegmentStore, sending: _Sending
    ) -> deque[tuple[int, BlobId]]:
        """Set the leaves whose copies are there; gives the others, by segment, with their ids at the source."""
        all_leaves = list(leaves(disk.root, disk.size_bytes, partial(fetch_nodes, self._source)))
        copies = {leaf: copy for _, leaf in all_leaves if (copy := self._leaves.get(leaf)) is not None}
        missing = sending.missing(list(dict.fromkeys(copies.values())))
        unknown: deque[tuple[int, BlobId]] = deque()
        for number, leaf in all_leaves:
            copy = copies.get(leaf)
            if copy is None or copy in missing:
                unknown.append((number, leaf))
                continue
            builder.set_leaf(number, copy)
            length = min(SEGMENT_BYTES, disk.size_bytes - number * SEGMENT_BYTES)
            store.known_reused(length)
            self._progress.advance(done=length, reused=length)
        return unknown


class _KnownLeaves:
    """Which leaf of the destination has the same content as one of the source. Safe from several threads."""

    def __init__(self) -> None:
        self._copies: dict[BlobId, BlobId] = {}
        self.get = self._copies.get

    def note(self, leaf: BlobId, copy: BlobId) -> None:
        if len(self._copies) < _KNOWN_LEAVES and copy != ZERO_ID:
            self._copies[leaf] = copy


class _Sending:
    """A session, with what it took and was new there, and no faster than the limit allows."""

    def __init__(self, session: PeerSession, limit: RateLimit) -> None:
        self._session = session
        self._limit = limit
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.missing = session.missing
        self.missing_leaf = session.missing_leaf
        self.settle = session.settle
        self.adopt = session.adopt
        self.tally = Tally()

    def send_soon(self, records: Sequence[Record], then: Callable[[StoredBytes], None]) -> None:
        def count(stored: StoredBytes) -> None:
            with self._lock:
                self.tally.stored_bytes += stored.stored_bytes
                if records[0].kind == BlobKind.NODE:
                    self.tally.nodes += stored.blobs
                else:
                    self.tally.chunks += stored.blobs
            then(stored)

        self._limit.pass_on(sum(record.total_bytes for record in records), self.stop)
        self._session.send_soon(records, count)


def _as_stored(peer: Peer, manifest: Manifest) -> bytes:
    """As the peer's repository keeps it."""
    return peer.as_stored(manifest) if isinstance(peer, SealedPeer) else encode_manifest(manifest)[0]


def _same_disks(a: Snapshot, b: Snapshot) -> Iterator[tuple[DiskRecord, DiskRecord]]:
    sizes = {(disk.name, disk.size_bytes): disk for disk in b.manifest.disks}
    for disk in a.manifest.disks:
        if (disk.name, disk.size_bytes) in sizes:
            yield disk, sizes[disk.name, disk.size_bytes]


def _filled(device: SnapshotDisk, number: int, view: memoryview) -> Filled:
    """Read a segment of a disk into a buffer, with zeros up to the end of its last block."""
    start = number * SEGMENT_BYTES
    length = min(SEGMENT_BYTES, device.size_bytes - start)
    device.read_into(start, view[:length])
    end = -(-length // BLOCK_BYTES) * BLOCK_BYTES
    view[length:end] = bytes(end - length)
    read = sum(extent.length for extent in device.extents(start, length) if not extent.zero)
    return Filled(number, length, read)
