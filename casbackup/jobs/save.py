"""Saving what was written over the disks of a snapshot as a new snapshot.

Only what was written is read and stored; the rest of each disk is that of the base, whose chunks are sliced where a
change begins or ends within one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from casbackup.block.filters.overlay import Overlay
from casbackup.clock import Clock, SystemClock
from casbackup.errors import DataDamage
from casbackup.ids import ZERO_ID, DiskName, Namespace, VmName
from casbackup.jobs.assembler import Assembler
from casbackup.jobs.backup import check_annotations, parked_on_error
from casbackup.jobs.increment_sink import IncrementSink
from casbackup.jobs.segment_store import SegmentStore
from casbackup.limits import SEGMENT_BYTES
from casbackup.peer.api import Peer, PeerSession
from casbackup.peer.disk import BlobCache
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import DiskRecord, Manifest
from casbackup.tree.edit import TreeEditor
from casbackup.tree.reader import DiskTree
from casbackup.units import MiB

_READ_BYTES = 1 * MiB


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What the new snapshot is called. It has the configs of ``base``, which stays stored while this goes on."""

    base: Snapshot
    namespace: Namespace
    vm: VmName
    labels: Sequence[str] = ()
    notes: str = ""
    host: str = ""
    program: str = ""


def save_changes(
    peer: Peer,
    request: SaveRequest,
    overlays: Mapping[DiskName, Overlay],
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Snapshot:
    """Make a snapshot of ``overlays``, which stand on disks of the base. Nobody writes to them meanwhile.

    Disks of the base without one are taken over as they are; the state of a VM that went with them is not. The
    overlays stay as they are. An error leaves the session parked, as that of a backup.

    :raise RepositoryError: when the repository cannot take it. :raise DataDamage: when a needed part of the base is
        lost. :raise SourceError: when an overlay cannot be read.
    """
    check_annotations(request.labels, request.notes)
    with parked_on_error(peer, request.namespace, request.vm, None) as session:
        return _Save(peer, session, request, progress or NoProgress(), clock or SystemClock()).run(overlays)


class _Change(NamedTuple):
    base: DiskRecord
    overlay: Overlay
    editor: TreeEditor


class _Save:
    def __init__(
        self, peer: Peer, session: PeerSession, request: SaveRequest, progress: Progress, clock: Clock
    ) -> None:
        self._session = session
        self._request = request
        self._progress = progress
        self._clock = clock
        self._store = SegmentStore(session, peer.config, peer.codec, progress)
        self._cache = BlobCache(peer)

    def run(self, overlays: Mapping[DiskName, Overlay]) -> Snapshot:
        started_s, time_ms = self._clock.monotonic_s(), self._clock.now_ms()
        self._require_base()
        bases = [disk for disk in self._request.base.manifest.disks if not disk.role]
        changes = {
            disk.name: _Change(disk, overlays[disk.name], TreeEditor(disk.root, self._cache.get))
            for disk in bases
            if disk.name in overlays
        }
        self._progress.start(self._request.vm, sum(change.overlay.changed_bytes() for change in changes.values()))
        self._read(list(changes.values()))
        disks = tuple(self._disk(disk, changes.get(disk.name)) for disk in bases)
        self._progress.finish()
        return self._commit(disks, time_ms, started_s)

    def _require_base(self) -> None:
        """Tells the session what it is going to build on.

        :raise DataDamage: when that is not there.
        """
        manifest = self._request.base.manifest
        needed = {disk.root for disk in manifest.disks if disk.root != ZERO_ID} | {c.id for c in manifest.configs}
        if self._session.missing(list(needed)):
            raise DataDamage(f"a part of {self._request.base.reference} is damaged, so nothing can be built on it")

    def _read(self, changes: Sequence[_Change]) -> None:
        trees = [DiskTree(change.base.root, change.base.size_bytes, self._cache.get) for change in changes]
        sink = IncrementSink(self._store, [change.editor for change in changes], trees)
        with Assembler([change.base.size_bytes for change in changes], sink) as assembler:
            for number, change in enumerate(changes):
                self._read_disk(number, change.overlay, assembler, sink)
            assembler.finish(partial=True)

    def _read_disk(self, number: int, overlay: Overlay, assembler: Assembler, sink: IncrementSink) -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        for extent in overlay.changed():
            if extent.zero:
                sink.note_zeros(number, extent.offset, extent.length)
                assembler.zeros(number, extent.offset, extent.length)
                continue
            for offset in range(extent.offset, extent.end, _READ_BYTES):
                piece = buffer[: min(_READ_BYTES, extent.end - offset)]
                overlay.read_into(offset, piece)
                assembler.put(number, offset, piece)
            self._store.count_read(extent.length)

    def _disk(self, base: DiskRecord, change: _Change | None) -> DiskRecord:
        size = base.size_bytes
        numbers = change.editor.changed if change else ()
        self._store.known_reused(size - sum(min(SEGMENT_BYTES, size - n * SEGMENT_BYTES) for n in numbers))
        root = change.editor.finish(size, self._store.nodes) if change else base.root
        return DiskRecord(base.name, size, root, self._request.base.reference)

    def _commit(self, disks: tuple[DiskRecord, ...], time_ms: int, started_s: float) -> Snapshot:
        request = self._request
        return self._session.commit(
            Manifest(
                namespace=request.namespace,
                vm=request.vm,
                time_ms=time_ms,
                sequence=0,
                disks=disks,
                configs=request.base.manifest.configs,
                labels=tuple(request.labels),
                notes=request.notes,
                host=request.host,
                program=request.program,
                stats=self._store.stats(round((self._clock.monotonic_s() - started_s) * 1000)),
            )
        )
