"""The import job: an archive becomes a snapshot, in one pass, in whatever order its data comes.

What the archive says of itself (names, numbers and order of disks and configs, uuid, time) is kept in the manifest,
so that an export can say the same. The snapshot is committed when every byte of every disk has come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from casbackup.clock import Clock, SystemClock
from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats.coverage import ArchiveCoverage
from casbackup.formats.names import config_names, disk_names
from casbackup.formats.port import Archive, ArchiveHead, Data, Event
from casbackup.ids import Namespace, SessionId, VmName
from casbackup.jobs.assembler import Assembler
from casbackup.jobs.backup import check_annotations, parked_on_error
from casbackup.jobs.segment_store import SegmentStore
from casbackup.jobs.tree_sink import TreeSink
from casbackup.limits import (
    MAX_ARCHIVE_NAMES_BYTES,
    MAX_CONFIG_BYTES,
    MAX_CONFIGS,
    MAX_DISK_BYTES,
    MAX_DISKS,
    MAX_RECORDED_GAPS,
)
from casbackup.peer.api import Peer, PeerSession
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import (
    VMSTATE,
    ArchivedDisk,
    ArchiveOrigin,
    ConfigRecord,
    DiskRecord,
    Manifest,
    MissingRange,
)
from casbackup.tree.builder import TreeBuilder

_LAST_S = 253_402_300_799
"""The end of the year 9999: later times have no name."""


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to make of an archive. ``source`` says where it comes from, for people.

    ``allow_incomplete``: what is missing becomes zeros, and an archive that ends too early or contradicts itself
    somewhere is taken up to there. ``resume``: go on with a parked session.
    """

    namespace: Namespace
    vm: VmName
    format_name: str
    source: str = ""
    labels: Sequence[str] = ()
    notes: str = ""
    host: str = ""
    program: str = ""
    allow_incomplete: bool = False
    resume: SessionId | None = None


@dataclass(slots=True)
class ImportReport:
    """``missing``: all of it, not only what the manifest has room for. ``damage``: why reading ended early."""

    snapshot: Snapshot
    missing: list[MissingRange] = field(default_factory=list)
    damage: ArchiveDamaged | None = None


def import_archive(
    peer: Peer,
    archive: Archive,
    request: ImportRequest,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> ImportReport:
    """Store all disks and configs of an archive as one snapshot, at the time that the archive names.

    On an error the session is parked as by ``backup``.

    :raise ArchiveUnsupported: when it has more or larger parts than a snapshot can; nothing was stored then.
    :raise ArchiveDamaged: when it contradicts itself or ends too early, unless ``allow_incomplete``.
    :raise ArchiveIncomplete: when a range of a disk never came, unless ``allow_incomplete``.
    :raise RepositoryError: when the repository cannot take it.
    """
    check_annotations(request.labels, request.notes)
    _check_head(archive.head)
    with parked_on_error(peer, request.namespace, request.vm, request.resume) as session:
        return _Import(peer, session, archive, request, progress or NoProgress(), clock or SystemClock()).run()


def _check_head(head: ArchiveHead) -> None:
    if not head.disks and not head.configs:
        raise ArchiveUnsupported("the archive holds neither a disk nor a config")
    if len(head.disks) > MAX_DISKS or len(head.configs) > MAX_CONFIGS:
        raise ArchiveUnsupported(
            f"the archive has {len(head.disks)} disks and {len(head.configs)} configs; "
            f"a snapshot can have {MAX_DISKS} and {MAX_CONFIGS}"
        )
    for disk in head.disks:
        if disk.size_bytes > MAX_DISK_BYTES:
            raise ArchiveUnsupported(f"disk {disk.name!r} has {disk.size_bytes} bytes, more than {MAX_DISK_BYTES}")
    for config in head.configs:
        if len(config.content) > MAX_CONFIG_BYTES:
            raise ArchiveUnsupported(f"config {config.name!r} has more than {MAX_CONFIG_BYTES} bytes")
    names = [disk.name for disk in head.disks] + [config.name for config in head.configs]
    try:
        names_bytes = sum(len(name.encode(errors="surrogateescape")) for name in names)
    except UnicodeEncodeError as error:
        raise ArchiveUnsupported(f"a name in the archive is not text: {error}") from error
    if names_bytes > MAX_ARCHIVE_NAMES_BYTES:
        raise ArchiveUnsupported(f"the archive's names have more than {MAX_ARCHIVE_NAMES_BYTES} bytes")


class _Import:
    def __init__(
        self,
        peer: Peer,
        session: PeerSession,
        archive: Archive,
        request: ImportRequest,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self._session = session
        self._archive = archive
        self._head = archive.head
        self._request = request
        self._progress = progress
        self._clock = clock
        self._store = SegmentStore(session, peer.config, peer.codec, progress)
        self._sizes = [disk.size_bytes for disk in self._head.disks]
        self._builders = [TreeBuilder() for _ in self._head.disks]
        self._damage: ArchiveDamaged | None = None

    def run(self) -> ImportReport:
        started_s = self._clock.monotonic_s()
        missing = self._contents()
        disks, configs = self._disks(), self._configs()
        self._progress.finish()
        request = self._request
        snapshot = self._session.commit(
            Manifest(
                namespace=request.namespace,
                vm=request.vm,
                time_ms=self._time_ms(),
                sequence=0,
                disks=disks,
                configs=configs,
                labels=tuple(request.labels),
                notes=request.notes,
                host=request.host,
                program=request.program,
                stats=self._store.stats(round((self._clock.monotonic_s() - started_s) * 1000)),
                archive=self._origin(missing),
            )
        )
        return ImportReport(snapshot, missing, self._damage)

    def _disks(self) -> tuple[DiskRecord, ...]:
        """Build the trees above the leaves that are stored."""
        disks = self._head.disks
        return tuple(
            DiskRecord(
                name,
                disk.size_bytes,
                builder.finish(disk.size_bytes, self._store.nodes),
                self._request.source,
                VMSTATE if disk.is_vmstate else "",
            )
            for name, disk, builder in zip(disk_names(d.name for d in disks), disks, self._builders, strict=True)
        )

    def _configs(self) -> tuple[ConfigRecord, ...]:
        configs = self._head.configs
        names = config_names(config.name for config in configs)
        return tuple(self._store.config(name, config.content) for name, config in zip(names, configs, strict=True))

    def _contents(self) -> list[MissingRange]:
        """Store the content of all disks; returns what was missing."""
        self._progress.start(self._request.vm, sum(self._sizes))
        coverage = ArchiveCoverage(self._head)
        sink = TreeSink(self._store, self._builders)
        read_bytes = 0
        with Assembler(self._sizes, sink) as assembler:
            for event in self._readable(coverage.passing(self._archive.events())):
                if isinstance(event, Data):
                    read_bytes += len(event.data)
                    assembler.put(event.disk, event.offset, event.data)
                else:
                    assembler.zeros(event.disk, event.offset, event.length)
            if not self._request.allow_incomplete:
                coverage.require_complete()
            missing = [MissingRange(disk, gap.offset, gap.length) for disk, gap in coverage.missing()]
            for gap in missing:
                assembler.zeros(gap.disk, gap.offset, gap.length)
            assembler.finish()
        self._store.count_read(read_bytes)
        return missing

    def _readable(self, events: Iterable[Event]) -> Iterator[Event]:
        try:
            yield from events
        except ArchiveDamaged as error:
            if not self._request.allow_incomplete:
                raise
            self._damage = error

    def _time_ms(self) -> int:
        time_s = self._head.time_s
        return time_s * 1000 if time_s is not None and 0 <= time_s <= _LAST_S else self._clock.now_ms()

    def _origin(self, missing: list[MissingRange]) -> ArchiveOrigin:
        head = self._head
        return ArchiveOrigin(
            format=self._request.format_name,
            uuid=head.uuid,
            time_s=head.time_s,
            disks=tuple(ArchivedDisk(disk.name, disk.device_id) for disk in head.disks),
            configs=tuple(config.name for config in head.configs),
            missing=tuple(coarsened(missing, MAX_RECORDED_GAPS)),
        )


def coarsened(gaps: Sequence[MissingRange], most: int) -> list[MissingRange]:
    """The same ranges if there are at most ``most``, else as few as that: neighbours that are close become one."""
    surplus = len(gaps) - most
    if surplus <= 0:
        return list(gaps)
    distances = sorted(
        (later.offset - earlier.offset - earlier.length, place)
        for place, (earlier, later) in enumerate(pairwise(gaps))
        if earlier.disk == later.disk
    )
    joined = {place for _, place in distances[:surplus]}
    found: list[MissingRange] = []
    for place, gap in enumerate(gaps):
        if place - 1 in joined:
            first = found.pop()
            gap = MissingRange(gap.disk, first.offset, gap.offset + gap.length - first.offset)
        found.append(gap)
    return found
