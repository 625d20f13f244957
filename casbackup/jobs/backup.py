"""The backup job: read, cut, hash, ask what is missing, compress and send that, commit.

Each worker takes whole segments: the bytes stay in its one reused buffer, and reading, hashing, compressing and
writing happen in C with the GIL released. A segment's leaf is asked for first; if the other side has it, it has
all its chunks (the closure invariant), and the segment is done with one look-up.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from casbackup.chunking.block_sample import BlockSampleChunker, Span
from casbackup.clock import Clock, SystemClock
from casbackup.codec.hashing import CHUNK_KEY, blob_id
from casbackup.codec.records import encode_blob, encode_record
from casbackup.errors import CasbackupError, DuplicateDisk, UsageError
from casbackup.ids import ZERO_ID, BlobId, DiskName, Namespace, SessionId, VmName, parse_config_name, parse_label
from casbackup.jobs.segments import Filled, SegmentSource
from casbackup.limits import MAX_CONFIG_BYTES, MAX_CONFIGS, MAX_DISKS, MAX_LABELS, MAX_NOTES_BYTES, SEGMENT_BYTES
from casbackup.peer.api import Peer, PeerSession
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import BackupStats, ConfigRecord, DiskRecord, Manifest
from casbackup.spec.node import Extent, zero_extent
from casbackup.spec.record import BlobKind, Record
from casbackup.tree.builder import TreeBuilder, leaf_bytes
from casbackup.workers import run_workers, worker_count


@dataclass(frozen=True, slots=True)
class DiskInput:
    """One disk to back up. ``source`` describes where it comes from, for people."""

    name: DiskName
    segments: SegmentSource
    source: str = ""


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What to back up. ``time_ms`` None: now. ``resume``: go on with a parked session."""

    namespace: Namespace
    vm: VmName
    disks: Sequence[DiskInput]
    configs: Mapping[str, bytes] = field(default_factory=dict)
    labels: Sequence[str] = ()
    notes: str = ""
    host: str = ""
    program: str = ""
    time_ms: int | None = None
    resume: SessionId | None = None

    def check(self) -> None:
        """:raise UsageError: when names repeat or limits are exceeded; nothing was touched then."""
        names = [disk.name for disk in self.disks]
        for repeated in {name for name in names if names.count(name) > 1}:
            raise DuplicateDisk(f"disk {repeated} is given twice")
        if len(names) > MAX_DISKS or len(self.configs) > MAX_CONFIGS or len(self.labels) > MAX_LABELS:
            raise UsageError(f"more than {MAX_DISKS} disks, {MAX_CONFIGS} configs or {MAX_LABELS} labels")
        if not names and not self.configs:
            raise UsageError("there is neither a disk nor a config to back up")
        for name, content in self.configs.items():
            parse_config_name(name)
            if len(content) > MAX_CONFIG_BYTES:
                raise UsageError(f"config {name} has {len(content)} bytes, more than {MAX_CONFIG_BYTES}")
        for label in self.labels:
            parse_label(label)
        if len(self.notes.encode()) > MAX_NOTES_BYTES:
            raise UsageError(f"the notes have more than {MAX_NOTES_BYTES} bytes")


def backup(
    peer: Peer, request: BackupRequest, progress: Progress | None = None, clock: Clock | None = None
) -> Snapshot:
    """Back up all disks of a VM as one snapshot.

    On an error the session is parked, so that what was stored can be resumed, and the error has the session's id
    in ``session``.

    :raise SourceError: when a disk cannot be read. :raise RepositoryError: when the repository cannot take it.
    """
    request.check()
    clock = clock or SystemClock()
    time_ms = request.time_ms if request.time_ms is not None else clock.now_ms()
    if request.resume is None:
        session = peer.open_session(request.namespace, request.vm)
    else:
        session = peer.resume_session(request.resume)
    try:
        return _Backup(peer, session, request, progress or NoProgress(), clock).run(time_ms)
    except BaseException as error:
        error.__dict__["session"] = session.id
        with contextlib.suppress(CasbackupError):
            session.flush()
        session.park()
        raise


class _Backup:
    def __init__(
        self, peer: Peer, session: PeerSession, request: BackupRequest, progress: Progress, clock: Clock
    ) -> None:
        self._session = session
        self._request = request
        self._progress = progress
        self._clock = clock
        self._level = peer.config.compression_level
        self._chunker = BlockSampleChunker(peer.config.chunker)
        self._lock = threading.Lock()
        self._read_bytes = self._zero_bytes = self._reused_bytes = 0
        self._new_bytes = self._new_stored_bytes = self._new_chunks = 0

    def run(self, time_ms: int) -> Snapshot:
        request = self._request
        started_s = self._clock.monotonic_s()
        disks = tuple(self._disk(disk) for disk in request.disks)
        configs = tuple(self._config(name, content) for name, content in request.configs.items())
        return self._session.commit(
            Manifest(
                namespace=request.namespace,
                vm=request.vm,
                time_ms=time_ms,
                sequence=0,
                disks=disks,
                configs=configs,
                labels=tuple(request.labels),
                notes=request.notes,
                host=request.host,
                program=request.program,
                stats=self._stats(round((self._clock.monotonic_s() - started_s) * 1000)),
            )
        )

    def _disk(self, disk: DiskInput) -> DiskRecord:
        builder = TreeBuilder()
        self._progress.start(disk.name, disk.segments.expected_bytes)
        self._done_bytes = 0

        def work(stop: threading.Event) -> None:
            buffer = bytearray(SEGMENT_BYTES)
            view = memoryview(buffer)
            while not stop.is_set():
                filled = disk.segments.fill(view)
                if filled is None:
                    return
                builder.set_leaf(filled.number, self._segment(buffer, view, filled))

        run_workers(work, worker_count())
        size = disk.segments.size_bytes()
        self._zero_bytes += size - self._done_bytes
        self._progress.advance(done=size - self._done_bytes, zero=size - self._done_bytes)
        root = builder.finish(size, self._store_nodes)
        self._progress.finish()
        return DiskRecord(disk.name, size, root, disk.source)

    def _segment(self, buffer: bytearray, view: memoryview, filled: Filled) -> BlobId:
        """Store one segment; returns its leaf's id."""
        spans = self._chunker.spans(buffer, filled.length)
        extents = [
            zero_extent(s.length)
            if s.is_zero
            else Extent(s.length, 0, BlobId(blake3(view[s.offset : s.offset + s.length], key=CHUNK_KEY).digest()))
            for s in spans
        ]
        node = leaf_bytes(extents)
        if node is None:
            self._count(filled, zero_bytes=filled.length)
            return ZERO_ID
        leaf = blob_id(BlobKind.NODE, node)
        zero_bytes = sum(s.length for s in spans if s.is_zero)
        if not self._session.missing([leaf]):
            self._count(filled, zero_bytes)
            return leaf
        chunks = self._missing_chunks(view, spans, extents)
        stored = self._session.send(chunks)
        node_stored = self._session.send([encode_record(BlobKind.NODE, leaf, node, self._level)])
        self._count(
            filled, zero_bytes, stored.plain_bytes, stored.stored_bytes + node_stored.stored_bytes, stored.blobs
        )
        return leaf

    def _missing_chunks(self, view: memoryview, spans: Sequence[Span], extents: Sequence[Extent]) -> list[Record]:
        places = {e.id: s for s, e in zip(spans, extents, strict=True) if not s.is_zero}
        missing = self._session.missing(list(places))
        return [
            encode_record(BlobKind.CHUNK, chunk, view[s.offset : s.offset + s.length], self._level)
            for chunk, s in places.items()
            if chunk in missing
        ]

    def _store_nodes(self, nodes: Sequence[bytes]) -> list[BlobId]:
        ids = [blob_id(BlobKind.NODE, node) for node in nodes]
        missing = self._session.missing(list(dict.fromkeys(ids)))
        for identity, node in zip(ids, nodes, strict=True):
            if identity in missing:
                stored = self._session.send([encode_record(BlobKind.NODE, identity, node, self._level)])
                self._new_stored_bytes += stored.stored_bytes
        return ids

    def _config(self, name: str, content: bytes) -> ConfigRecord:
        record = encode_blob(BlobKind.CONFIG, content, self._level)
        if self._session.missing([record.id]):
            self._new_stored_bytes += self._session.send([record]).stored_bytes
        return ConfigRecord(name, len(content), record.id)

    def _count(
        self, filled: Filled, zero_bytes: int, new_bytes: int = 0, stored_bytes: int = 0, new_chunks: int = 0
    ) -> None:
        reused = filled.length - zero_bytes - new_bytes
        with self._lock:
            self._done_bytes += filled.length
            self._read_bytes += filled.read_bytes
            self._zero_bytes += zero_bytes
            self._reused_bytes += reused
            self._new_bytes += new_bytes
            self._new_stored_bytes += stored_bytes
            self._new_chunks += new_chunks
        self._progress.advance(done=filled.length, zero=zero_bytes, reused=reused, new=new_bytes)

    def _stats(self, duration_ms: int) -> BackupStats:
        return BackupStats(
            read_bytes=self._read_bytes,
            zero_bytes=self._zero_bytes,
            reused_bytes=self._reused_bytes,
            new_bytes=self._new_bytes,
            new_stored_bytes=self._new_stored_bytes,
            new_chunks=self._new_chunks,
            duration_ms=duration_ms,
        )
