"""The restore job: walk a disk's tree, fetch chunks in pack order, verify each against its id, write it where it
belongs.

Threads take windows of a few whole segments, whose chunks are fetched together: a server is asked less often, and
sends on while the first of them are decoded. Zeros are not written to a target that is known to be zero. With
``in_place`` the target is read first and only what differs is fetched and written; with ``best_effort`` lost ranges
become zeros and are reported.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from casbackup.block.device import BlockDevice
from casbackup.buffers import aligned_buffer
from casbackup.codec.hashing import IdKeys
from casbackup.errors import DataDamage, SnapshotNotFound, VmStateMissing
from casbackup.fs import Buffer
from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import SEGMENT_BYTES
from casbackup.peer.api import Peer
from casbackup.peer.disk import fetch_nodes, verified_each
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import VMSTATE, ConfigRecord, DiskRecord
from casbackup.spec.node import Extent
from casbackup.spec.record import BlobKind
from casbackup.tree.diff import Range, merged
from casbackup.tree.reader import DiskTree, Segment
from casbackup.workers import run_workers

_ZEROS = bytes(SEGMENT_BYTES)
_MANY_EXTENTS = 512
"""Of so many, as the memory of a VM has them, each is too small to be written by itself."""
_WINDOW = 4
"""Segments that a thread takes at once."""

_Piece = tuple[int, Extent]
"""An extent, and where it belongs on the disk."""


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """``target_is_zero``: the target reads as zeros now. ``in_place``: write only what differs from what it holds."""

    target_is_zero: bool = False
    in_place: bool = False
    best_effort: bool = False


@dataclass(slots=True)
class RestoreReport:
    """What a restore of one disk did. ``lost`` is only ever filled by a best-effort restore."""

    size_bytes: int = 0
    written_bytes: int = 0
    unchanged_bytes: int = 0
    zero_bytes: int = 0
    lost: list[Range] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def restore_disk(
    peer: Peer,
    disk: DiskRecord,
    target: BlockDevice,
    options: RestoreOptions | None = None,
    progress: Progress | None = None,
) -> RestoreReport:
    """Write a disk of a snapshot to ``target``, which has at least its size. Does not flush the target.

    :raise DataDamage: when something cannot be read, unless ``best_effort``. :raise TargetError: when writing fails.
    """
    return _Restore(peer, disk, target, options or RestoreOptions(), progress or NoProgress()).run()


def find_disk(snapshot: Snapshot, name: str) -> DiskRecord:
    """:raise SnapshotNotFound: when the snapshot has no such disk."""
    for disk in snapshot.manifest.disks:
        if disk.name == name:
            return disk
    names = ", ".join(d.name for d in snapshot.manifest.disks) or "none"
    raise SnapshotNotFound(f"snapshot {snapshot.reference} has no disk {name}; it has: {names}")


def find_vmstate(snapshot: Snapshot) -> DiskRecord:
    """The VM's memory. :raise VmStateMissing: when the snapshot is without."""
    for disk in snapshot.manifest.disks:
        if disk.role == VMSTATE:
            return disk
    raise VmStateMissing(f"snapshot {snapshot.reference} was made without the VM's memory")


def read_config(peer: Peer, config: ConfigRecord) -> bytes:
    """The verified content of a config blob."""
    data = fetch_nodes(peer, [config.id])[config.id]
    if isinstance(data, DataDamage):
        raise data
    return bytes(data)


class _Restore:
    def __init__(
        self, peer: Peer, disk: DiskRecord, target: BlockDevice, options: RestoreOptions, progress: Progress
    ) -> None:
        self._peer = peer
        self._disk = disk
        self._target = target
        self._options = options
        self._progress = progress
        self._report = RestoreReport(disk.size_bytes)
        self._lock = threading.Lock()

    def run(self) -> RestoreReport:
        def fetch(ids: Sequence[BlobId]) -> Mapping[BlobId, Buffer | DataDamage]:
            return fetch_nodes(self._peer, ids)

        tree = DiskTree(self._disk.root, self._disk.size_bytes, fetch, tolerant=self._options.best_effort)
        segments = tree.segments()
        self._progress.start(self._disk.name, self._disk.size_bytes)

        def work(stop: threading.Event) -> None:
            scratch = memoryview(aligned_buffer(SEGMENT_BYTES)) if self._options.in_place else memoryview(b"")
            while not stop.is_set():
                with self._lock:
                    window = list(itertools.islice(segments, _WINDOW))
                if not window:
                    return
                self._write([piece for segment in window for piece in self._wanted(segment, scratch)])
                self._progress.advance(done=sum(segment.length for segment in window))

        run_workers(work, self._peer.workers)
        self._progress.finish()
        self._report.lost = list(merged(sorted(self._report.lost)))
        return self._report

    def _wanted(self, segment: Segment, scratch: memoryview) -> list[_Piece]:
        """What must be written of a segment that has extents; others are dealt with here."""
        if segment.damage is not None:
            self._lose(segment.offset, segment.length, segment.damage)
            return []
        if segment.extents is None:
            self._zero(segment.offset, segment.length, scratch)
            return []
        if self._options.in_place:
            return self._differing(segment, scratch[: segment.length])
        if len(segment.extents) >= _MANY_EXTENTS and self._write_as_one(segment):
            return []
        return list(_placed(segment))

    def _write_as_one(self, segment: Segment) -> bool:
        """Gather a segment, then write it. False when not all of its chunks can be had: nothing was written then."""
        buffer = memoryview(bytearray(segment.length))
        places: dict[BlobId, list[_Piece]] = {}
        for offset, extent in _placed(segment):
            places.setdefault(extent.id, []).append((offset - segment.offset, extent))
        zero_bytes = sum(extent.length for _, extent in places.pop(ZERO_ID, ()))
        for chunk, plain in self._fetched(places):
            if isinstance(plain, DataDamage):
                return False
            view = memoryview(plain)
            for start, (length, skip, _id) in places[chunk]:
                buffer[start : start + length] = view[skip : skip + length]
        self._target.write(segment.offset, buffer)
        self._count(written_bytes=segment.length - zero_bytes, zero_bytes=zero_bytes)
        return True

    def _write(self, pieces: list[_Piece]) -> None:
        """Fetch the chunks of these extents and write them; zero extents as well, where that is needed."""
        places: dict[BlobId, list[_Piece]] = {}
        for offset, extent in pieces:
            if extent.is_zero:
                self._zero(offset, extent.length, memoryview(b""))
            else:
                places.setdefault(extent.id, []).append((offset, extent))
        for chunk, plain in self._fetched(places):
            for offset, extent in places[chunk]:
                if isinstance(plain, DataDamage):
                    self._lose(offset, extent.length, plain)
                else:
                    self._put(offset, plain, extent)

    def _fetched(self, chunks: Iterable[BlobId]) -> Iterator[tuple[BlobId, Buffer | DataDamage]]:
        ids = list(chunks)
        return verified_each(self._peer.codec, self._peer.fetch(ids)) if ids else iter(())

    def _put(self, offset: int, plain: Buffer, extent: Extent) -> None:
        whole = extent.skip == 0 and extent.length == len(plain)
        self._target.write(offset, plain if whole else memoryview(plain)[extent.skip : extent.skip + extent.length])
        self._count(written_bytes=extent.length)

    def _differing(self, segment: Segment, present: memoryview) -> list[_Piece]:
        """Compare the target with the extents by hash; zeros that it lacks are written here."""
        self._target.read_into(segment.offset, present)
        different: list[_Piece] = []
        for offset, extent in _placed(segment):
            start = offset - segment.offset
            if _holds(present[start : start + extent.length], extent, self._peer.codec.ids):
                self._count(unchanged_bytes=extent.length)
            elif extent.is_zero:
                self._write_zeros(offset, extent.length)
            else:
                different.append((offset, extent))
        return different

    def _zero(self, offset: int, length: int, scratch: memoryview) -> None:
        if self._options.target_is_zero:
            self._count(zero_bytes=length)
        elif self._options.in_place and scratch:
            self._zero_in_place(offset, length, scratch)
        else:
            self._write_zeros(offset, length)

    def _zero_in_place(self, offset: int, length: int, scratch: memoryview) -> None:
        """Only where the target is not zero already; what it knows to be holes is not even read."""
        for extent in self._target.extents(offset, length):
            for start in range(extent.offset, extent.end, SEGMENT_BYTES):
                size = min(SEGMENT_BYTES, extent.end - start)
                if not extent.zero:
                    self._target.read_into(start, scratch[:size])
                if extent.zero or scratch[:size] == _ZEROS[:size]:
                    self._count(unchanged_bytes=size)
                else:
                    self._write_zeros(start, size)

    def _write_zeros(self, offset: int, length: int) -> None:
        self._target.write_zeros(offset, length)
        self._count(zero_bytes=length)

    def _lose(self, offset: int, length: int, damage: DataDamage) -> None:
        if not self._options.best_effort:
            raise damage
        if not self._options.target_is_zero:
            self._target.write_zeros(offset, length)
        with self._lock:
            self._report.lost.append(Range(offset, length))
            self._report.reasons.append(str(damage))

    def _count(self, *, written_bytes: int = 0, unchanged_bytes: int = 0, zero_bytes: int = 0) -> None:
        with self._lock:
            self._report.written_bytes += written_bytes
            self._report.unchanged_bytes += unchanged_bytes
            self._report.zero_bytes += zero_bytes


def _placed(segment: Segment) -> Iterator[_Piece]:
    """The extents of a leaf with their offsets on the disk."""
    offset = segment.offset
    for extent in segment.extents or ():
        yield offset, extent
        offset += extent.length


def _holds(present: memoryview, extent: Extent, ids: IdKeys) -> bool:
    """Does the target hold these bytes already? A slice of a chunk cannot be told by hash and counts as different."""
    if extent.is_zero:
        return present == _ZEROS[: extent.length]
    return extent.skip == 0 and ids.id(BlobKind.CHUNK, present) == extent.id
