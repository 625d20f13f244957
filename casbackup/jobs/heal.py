"""Healing a repository from a partner that has the same data: what is known to be damaged or missing, and only that.

It is a copying to itself: from the roots of the own snapshots down to what does not count as present, which is what
checks have marked. What is sound here is taken from here, so that only the rest goes over the line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from casbackup.errors import DataDamage
from casbackup.ids import ZERO_ID, BlobId
from casbackup.jobs.copying import Copier, Tally, Wanted, wanted_of
from casbackup.jobs.same_key import require_same_key
from casbackup.peer.api import Peer
from casbackup.peer.local import LocalPeer
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.repository.damage import damaged_ids
from casbackup.repository.repository import Repository
from casbackup.spec.record import Record
from casbackup.store.blobstore import Fetched


@dataclass(slots=True)
class HealReport:
    """``healed_blobs`` are sound again. ``fetched``: what the partner gave. ``losses``: what it could not give."""

    healed_blobs: int = 0
    fetched_blobs: int = 0
    fetched_bytes: int = 0
    losses: list[DataDamage] = field(default_factory=list)


def heal(repository: Repository, partner: Peer, progress: Progress | None = None) -> HealReport:
    """Fetch what earlier checks found damaged and snapshots need. All that comes is verified before it is stored.

    :raise KeyMismatch: when the partner has not the same key. :raise RepositoryError: when the repository cannot be
    written to. :raise CasbackupError: when the partner fails.
    """
    require_same_key(repository.config, partner.config)
    report, progress = HealReport(), progress or NoProgress()
    damaged = damaged_ids(repository)
    snapshots = repository.catalog.survey()[0]
    if damaged and snapshots:
        progress.start("healing", None)
        _fetch_what_is_missing(repository, snapshots, partner, report, progress)
        progress.finish()
        report.healed_blobs = len(set(damaged) - set(damaged_ids(repository)))
    return report


def _fetch_what_is_missing(
    repository: Repository, snapshots: Sequence[Snapshot], partner: Peer, report: HealReport, progress: Progress
) -> None:
    own = LocalPeer(repository)
    session = own.open_session(snapshots[0].manifest.namespace, snapshots[0].manifest.vm)
    try:
        wanted = {item.id: item for snapshot in snapshots for item in wanted_of(snapshot.manifest)}
        missing = session.missing([blob_id for blob_id in wanted if blob_id != ZERO_ID])
        goals = [_Root(item, report) for item in wanted.values() if item.id in missing]
        Copier(_Either(own, partner, report), session, progress=progress).run(goals)
        session.finish()
    finally:
        session.park()  # without effect once it is finished


class _Root:
    """A root with something damaged below it."""

    def __init__(self, wanted: Wanted, report: HealReport) -> None:
        self.wanted: Sequence[Wanted] = [wanted]
        self._report = report

    def begin(self) -> None: ...

    def end(self, tally: Tally, losses: Sequence[DataDamage]) -> None:
        self._report.losses += [loss for loss in losses if loss not in self._report.losses]


class _Either:
    """Gives what is sound here, and the rest as the partner has it."""

    def __init__(self, own: Peer, partner: Peer, report: HealReport) -> None:
        self._own = own
        self._partner = partner
        self._report = report
        self.codec = own.codec

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        lost: list[BlobId] = []
        for blob_id, record in self._own.fetch(ids):
            if self._is_sound(record):
                yield blob_id, record
            else:
                lost.append(blob_id)
        for blob_id, record in self._partner.fetch(lost) if lost else ():
            if isinstance(record, Record):
                self._report.fetched_blobs += 1
                self._report.fetched_bytes += record.total_bytes
            yield blob_id, record

    def _is_sound(self, record: Record | DataDamage) -> bool:
        if isinstance(record, DataDamage):
            return False
        try:
            self.codec.verify(record)
        except DataDamage:
            return False
        return True
