"""The backup job: read, cut, hash, ask what is missing, compress and send that, commit.

Each worker takes whole segments: the bytes stay in its one reused buffer, and reading, hashing, compressing and
writing happen in C with the GIL released.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from casbackup.buffers import aligned_buffer
from casbackup.clock import Clock, SystemClock
from casbackup.errors import CasbackupError, DuplicateDisk, UsageError
from casbackup.ids import DiskName, Namespace, SessionId, VmName, parse_config_name, parse_label
from casbackup.jobs.segment_store import SegmentStore
from casbackup.jobs.segments import SegmentSource
from casbackup.limits import MAX_CONFIG_BYTES, MAX_CONFIGS, MAX_DISKS, MAX_LABELS, MAX_NOTES_BYTES, SEGMENT_BYTES
from casbackup.peer.api import Peer, PeerSession
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import DiskRecord, Manifest
from casbackup.tree.builder import TreeBuilder
from casbackup.workers import run_workers


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
        if len(names) > MAX_DISKS:
            raise UsageError(f"more than {MAX_DISKS} disks")
        if not names and not self.configs:
            raise UsageError("there is neither a disk nor a config to back up")
        check_configs(self.configs)
        check_annotations(self.labels, self.notes)


def check_configs(configs: Mapping[str, bytes]) -> None:
    """:raise UsageError: when a name is none, or there is too much of them."""
    if len(configs) > MAX_CONFIGS:
        raise UsageError(f"more than {MAX_CONFIGS} configs")
    for name, content in configs.items():
        parse_config_name(name)
        if len(content) > MAX_CONFIG_BYTES:
            raise UsageError(f"config {name} has {len(content)} bytes, more than {MAX_CONFIG_BYTES}")


def check_annotations(labels: Sequence[str], notes: str) -> None:
    """:raise UsageError: when a label is none, or there is too much of them."""
    if len(labels) > MAX_LABELS:
        raise UsageError(f"more than {MAX_LABELS} labels")
    for label in labels:
        parse_label(label)
    if len(notes.encode()) > MAX_NOTES_BYTES:
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
    with parked_on_error(peer, request.namespace, request.vm, request.resume) as session:
        return _Backup(peer, session, request, progress or NoProgress(), clock).run(time_ms)


@contextlib.contextmanager
def parked_on_error(peer: Peer, namespace: Namespace, vm: VmName, resume: SessionId | None) -> Iterator[PeerSession]:
    """A session, opened or resumed; what is stored in it before an error can be resumed, see ``backup``."""
    session = peer.open_session(namespace, vm) if resume is None else peer.resume_session(resume)
    try:
        yield session
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
        self._workers = peer.workers
        self._request = request
        self._progress = progress
        self._clock = clock
        self._store = SegmentStore(session, peer.config, peer.codec, progress)

    def run(self, time_ms: int) -> Snapshot:
        request = self._request
        started_s = self._clock.monotonic_s()
        disks = tuple(self._disk(disk) for disk in request.disks)
        configs = tuple(self._store.config(name, content) for name, content in request.configs.items())
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
                stats=self._store.stats(round((self._clock.monotonic_s() - started_s) * 1000)),
            )
        )

    def _disk(self, disk: DiskInput) -> DiskRecord:
        builder = TreeBuilder()
        self._progress.start(disk.name, disk.segments.expected_bytes)
        done_before = self._store.done_bytes

        def work(stop: threading.Event) -> None:
            buffer = aligned_buffer(SEGMENT_BYTES)
            view = memoryview(buffer)
            while not stop.is_set():
                filled = disk.segments.fill(view)
                if filled is None:
                    return
                builder.set_leaf(filled.number, self._store.segment(buffer, view, filled))

        run_workers(work, self._workers)
        size = disk.segments.size_bytes()
        self._store.known_zeros(size - (self._store.done_bytes - done_before))
        root = builder.finish(size, self._store.nodes)
        self._progress.finish()
        return DiskRecord(disk.name, size, root, disk.source)
