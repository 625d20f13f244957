"""The export job: a snapshot through a writer of archives.

Threads decode and verify; the caller's thread writes, in one order: disk after disk, each from its beginning to its
end. So the same snapshot gives the same bytes, wherever its chunks lie by now. Chunks are fetched for a window of
some segments at once, in the order of the packs (``docs/decisions/0010-order-of-exports.md``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

from casbackup.errors import DataDamage, NodeInvalid
from casbackup.formats import proxmox
from casbackup.formats.port import (
    ArchiveConfig,
    ArchiveDisk,
    ArchiveFormat,
    ArchiveHead,
    ArchiveOutput,
    ArchiveWriter,
    ByteRange,
    ByteTarget,
    WriterCapabilities,
)
from casbackup.formats.target import COMPRESSIONS
from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.jobs.restore import find_disk, read_config
from casbackup.limits import SEGMENT_BYTES
from casbackup.peer.api import Peer
from casbackup.peer.disk import fetch_nodes, verified
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import VMSTATE, ArchiveOrigin, DiskRecord, Manifest
from casbackup.spec.node import Extent
from casbackup.tree.reader import DiskTree, Segment
from casbackup.units import KiB
from casbackup.workers import worker_count

WINDOW_SEGMENTS = 4
"""Segments whose chunks are fetched together, if nothing else is asked for."""
_MOST_WINDOWS = 6
"""Under way at once."""
_GRANULE_BYTES = 64 * KiB
"""Zeros within data are told to the writer, or left out of its map, in units of this."""

_ZEROS = bytes(SEGMENT_BYTES)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What to write: the head, and the snapshot's disk for each of the head's."""

    snapshot: Snapshot
    head: ArchiveHead
    disks: tuple[DiskRecord, ...]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """``zero_bytes`` of ``size_bytes`` came as zeros; ``left_out``: configs that the format cannot hold."""

    size_bytes: int
    zero_bytes: int
    left_out: tuple[str, ...]


def plan_export(peer: Peer, snapshot: Snapshot, format_name: str, disks: Sequence[str] = ()) -> ExportPlan:
    """Decide what an archive of a snapshot says. ``disks``: only those; none means all.

    What was imported keeps the names, numbers, uuid and time that its archive had. Anything else goes by its own
    names, and as Proxmox VE wants it if the format is VMA (``formats.proxmox``). The uuid is told from the
    snapshot's id.

    :raise SnapshotNotFound: when the snapshot has no such disk. :raise DataDamage: when a config cannot be read.
    """
    manifest, origin = snapshot.manifest, snapshot.manifest.archive
    chosen = _chosen_disks(snapshot, disks)
    configs = [ArchiveConfig(config.name, read_config(peer, config)) for config in manifest.configs]
    if origin is not None and (format_name != proxmox.FORMAT_NAME or origin.format == proxmox.FORMAT_NAME):
        return ExportPlan(snapshot, _restored_head(manifest, origin, configs, chosen), chosen)
    numbers = {disk.name: number for number, disk in enumerate(manifest.disks, 1)}
    head = ArchiveHead(
        tuple(ArchiveDisk(d.name, d.size_bytes, numbers[d.name], d.role == VMSTATE) for d in chosen),
        tuple(configs),
        _uuid(snapshot),
        manifest.time_ms // 1000,
    )
    if format_name == proxmox.FORMAT_NAME:
        head = proxmox.archive_head(head, manifest.vm)
    return ExportPlan(snapshot, head, chosen)


def archive_name(plan: ExportPlan, archive_format: ArchiveFormat, compression: str) -> str:
    """The name of a file that tells what is in it, for VMA the one that Proxmox VE wants."""
    manifest = plan.snapshot.manifest
    time_s = plan.head.time_s if plan.head.time_s is not None else manifest.time_ms // 1000
    suffix = archive_format.suffixes[0] + COMPRESSIONS.get(compression, "")
    name = proxmox.file_name(manifest.vm, time_s, suffix)
    return name if archive_format.name == proxmox.FORMAT_NAME else name.removeprefix("vzdump-qemu-")


def _chosen_disks(snapshot: Snapshot, names: Sequence[str]) -> tuple[DiskRecord, ...]:
    wanted = {find_disk(snapshot, name).name for name in names}
    return tuple(disk for disk in snapshot.manifest.disks if not names or disk.name in wanted)


def _restored_head(
    manifest: Manifest, origin: ArchiveOrigin, configs: Sequence[ArchiveConfig], chosen: Sequence[DiskRecord]
) -> ArchiveHead:
    """The head of the archive that was imported; names that could not be used safely are replaced by ours."""
    disk_names = _usable([disk.name for disk in origin.disks], [disk.name for disk in manifest.disks])
    config_names = _usable(origin.configs, [config.name for config in manifest.configs])
    disks = zip(manifest.disks, disk_names, origin.disks, strict=True)
    return ArchiveHead(
        tuple(ArchiveDisk(n, d.size_bytes, o.device_id, d.role == VMSTATE) for d, n, o in disks if d in chosen),
        tuple(ArchiveConfig(name, config.content) for config, name in zip(configs, config_names, strict=True)),
        origin.uuid,
        origin.time_s,
    )


def _usable(theirs: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Their names, but ours where theirs are no names of files, or stand for two things."""
    return [
        name if name not in ("", ".", "..") and not set("/\0\n") & set(name) and theirs.count(name) == 1 else own
        for name, own in zip(theirs, ours, strict=True)
    ]


def _uuid(snapshot: Snapshot) -> bytes:
    """A uuid of version 8 (made from a hash)."""
    digest = bytearray.fromhex(snapshot.id[:32])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return bytes(digest)


def export(
    peer: Peer,
    plan: ExportPlan,
    writer: ArchiveWriter,
    target: ByteTarget,
    progress: Progress | None = None,
    *,
    window_segments: int = WINDOW_SEGMENTS,
) -> ExportReport:
    """Write the archive. ``writer.check`` has been called. What was written before an error is of no use.

    ``window_segments``: how many are fetched together, a few times of which are in memory. The archive is the same.

    :raise DataDamage: when something cannot be read. :raise TargetError: when writing fails.
    """
    progress = progress or NoProgress()
    capabilities = writer.capabilities
    head, left_out = plan.head, tuple[str, ...]()
    if head.configs and not capabilities.configs:
        head, left_out = replace(head, configs=()), tuple(config.name for config in head.configs)
    maps = [data_map(peer, disk, capabilities) for disk in plan.disks] if capabilities.needs_map else None
    size_bytes = sum(disk.size_bytes for disk in plan.disks)
    progress.start(plan.snapshot.reference, size_bytes)
    output = writer.open(target, head, maps)
    zero_bytes = _Export(peer, plan.disks, output, capabilities, progress, window_segments * SEGMENT_BYTES).run()
    output.finish()
    progress.finish()
    return ExportReport(size_bytes, zero_bytes, left_out)


def data_map(peer: Peer, disk: DiskRecord, capabilities: WriterCapabilities) -> list[ByteRange]:
    """The ranges of a disk that hold data, told from its tree: no chunk is read."""
    granule = _granule(capabilities)
    found: list[ByteRange] = []
    for segment in _tree(peer, disk).segments():
        for piece in _data_in(segment, granule):
            if found and found[-1].end == piece.offset:
                piece = ByteRange(found[-1].offset, found[-1].length + piece.length)
                found.pop()
            found.append(piece)
    return found


class _Piece(NamedTuple):
    """A range of a disk to write: from ``start`` of the window's buffer, or zeros (None)."""

    disk: int
    offset: int
    length: int
    start: int | None


class _Window(NamedTuple):
    """Some segments, fetched together and written one after the other. ``places``: (start, extent) by chunk."""

    buffer: memoryview
    pieces: list[_Piece]
    places: dict[BlobId, list[tuple[int, Extent]]]


class _Export:
    def __init__(
        self,
        peer: Peer,
        disks: Sequence[DiskRecord],
        output: ArchiveOutput,
        capabilities: WriterCapabilities,
        progress: Progress,
        window_bytes: int,
    ) -> None:
        self._window_bytes = window_bytes
        self._peer = peer
        self._disks = disks
        self._output = output
        self._granule = _granule(capabilities)
        self._progress = progress
        self._most = min(worker_count() + 1, _MOST_WINDOWS)
        self._buffers: list[memoryview] = []
        self._zero_bytes = 0

    def run(self) -> int:
        """Write everything; returns how much of it was zeros."""
        pending: deque[Future[_Window]] = deque()
        with ThreadPoolExecutor(worker_count(), "export") as pool:
            try:
                for window in self._windows():
                    pending.append(pool.submit(self._fill, window))
                    if len(pending) >= self._most:
                        self._write(pending.popleft().result())
                while pending:
                    self._write(pending.popleft().result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._zero_bytes

    # --- planning

    def _windows(self) -> Iterator[_Window]:
        window, used = self._new_window(), 0
        for number, disk in enumerate(self._disks):
            for segment in _tree(self._peer, disk).segments():
                self._plan(number, segment, window, used)
                used += SEGMENT_BYTES if segment.extents is not None else 0
                if used == self._window_bytes:
                    yield window
                    window, used = self._new_window(), 0
        if window.pieces:
            yield window

    def _new_window(self) -> _Window:
        """Buffers come back when their window is written; only so many are ever made as windows are under way."""
        buffer = self._buffers.pop() if self._buffers else memoryview(bytearray(self._window_bytes))
        return _Window(buffer, [], {})

    def _plan(self, disk: int, segment: Segment, window: _Window, start: int) -> None:
        """Add a segment, whose data goes to ``start`` of the window's buffer."""
        position = segment.offset
        for piece in _data_in(segment, self._granule):
            self._plan_zeros(disk, position, piece.offset, window)
            window.pieces.append(_Piece(disk, piece.offset, piece.length, start + piece.offset - segment.offset))
            position = piece.end
        self._plan_zeros(disk, position, segment.offset + segment.length, window)
        for extent in segment.extents or ():
            window.places.setdefault(extent.id, []).append((start, extent))
            start += extent.length

    def _plan_zeros(self, disk: int, start: int, end: int, window: _Window) -> None:
        if start == end:
            return
        last = window.pieces[-1] if window.pieces else None
        if last is not None and last.start is None and last.disk == disk:
            window.pieces.pop()
            start = last.offset
        window.pieces.append(_Piece(disk, start, end - start, None))

    # --- filling, in several threads

    def _fill(self, window: _Window) -> _Window:
        buffer = window.buffer
        ids = list[BlobId]()
        for chunk, places in window.places.items():
            if places[0][1].is_zero:
                for start, extent in places:
                    buffer[start : start + extent.length] = _ZEROS[: extent.length]
            else:
                ids.append(chunk)
        for chunk, record in self._peer.fetch(ids) if ids else ():
            plain = verified(self._peer.codec, record)
            if isinstance(plain, DataDamage):
                raise plain
            for start, extent in window.places[chunk]:
                buffer[start : start + extent.length] = _part(plain, extent)
        return window

    # --- writing

    def _write(self, window: _Window) -> None:
        for disk, offset, length, start in window.pieces:
            if start is None:
                self._output.zeros(disk, offset, length)
                self._zero_bytes += length
                self._progress.advance(done=length, zero=length)
            else:
                self._output.write(disk, offset, window.buffer[start : start + length])
                self._progress.advance(done=length)
        self._buffers.append(window.buffer)


def _tree(peer: Peer, disk: DiskRecord) -> DiskTree:
    def fetch(ids: Sequence[BlobId]) -> Mapping[BlobId, Buffer | DataDamage]:
        return fetch_nodes(peer, ids)

    return DiskTree(disk.root, disk.size_bytes, fetch)


def _granule(capabilities: WriterCapabilities) -> int:
    return max(_GRANULE_BYTES, capabilities.unit_bytes)


def _data_in(segment: Segment, granule: int) -> Iterator[ByteRange]:
    """The ranges of a segment that hold data, widened to whole granules, merged."""
    start = end = 0
    position = 0
    for extent in segment.extents or ():
        position += extent.length
        if extent.is_zero:
            continue
        first = (position - extent.length) // granule * granule
        if first > end:
            if end > start:
                yield ByteRange(segment.offset + start, end - start)
            start = first
        end = min(-(-position // granule) * granule, segment.length)
    if end > start:
        yield ByteRange(segment.offset + start, end - start)


def _part(plain: Buffer, extent: Extent) -> Buffer:
    """The bytes of a chunk that an extent names."""
    if extent.skip == 0 and extent.length == len(plain):
        return plain
    part = memoryview(plain)[extent.skip : extent.skip + extent.length]
    if len(part) != extent.length:
        raise NodeInvalid(f"an extent reaches beyond the end of chunk {extent.id.hex()[:16]}")
    return part
