"""What a sync did, snapshot by snapshot, and the proof that both ends have the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from blake3 import blake3

from casbackup.errors import CasbackupError, ManifestDamaged
from casbackup.jobs.copying import Tally
from casbackup.repository.catalog import Snapshot


class Outcome(Enum):
    """What became of a snapshot."""

    COPIED = "copied"
    PRESENT = "present"
    PLANNED = "planned"
    """By a dry run: it would be copied."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SnapshotResult:
    """``tally``: what was sent for this snapshot; what several need counts for the first of them. After a dry run, its
    ``stored_bytes`` are those of tree nodes and the content of chunks, which compression makes less.
    """

    snapshot: Snapshot
    outcome: Outcome
    tally: Tally = field(default_factory=Tally)
    error: CasbackupError | None = None


@dataclass(frozen=True, slots=True)
class Proof:
    """Digests over the ids and root hashes of all snapshots meant, as the ends list them when all is done."""

    source: str
    destination: str

    @property
    def equal(self) -> bool:
        return self.source == self.destination


@dataclass(frozen=True, slots=True)
class SyncReport:
    """``changed``: whose pin, labels or notes were brought up to date. ``unreadable``: manifests of the source.

    ``removed`` and ``spared`` (for their pins) are about a mirroring; after a failure nothing is removed. A dry run
    says what would be, and has no ``proof``.
    """

    results: tuple[SnapshotResult, ...]
    changed: tuple[Snapshot, ...]
    removed: tuple[Snapshot, ...]
    spared: tuple[Snapshot, ...]
    unreadable: tuple[ManifestDamaged, ...]
    proof: Proof | None

    @property
    def failed(self) -> list[SnapshotResult]:
        return [result for result in self.results if result.outcome is Outcome.FAILED]

    @property
    def is_complete(self) -> bool:
        return not self.failed and not self.unreadable

    @property
    def total(self) -> Tally:
        tallies = [result.tally for result in self.results]
        return Tally(
            sum(t.chunks for t in tallies), sum(t.nodes for t in tallies), sum(t.stored_bytes for t in tallies)
        )


def proof_of(selected: Sequence[Snapshot], destination: Iterable[Snapshot]) -> Proof:
    """Compare what was meant with what the destination lists. The rest of what it has is left out of account."""
    meant = {snapshot.id for snapshot in selected}
    return Proof(_digest(selected), _digest(s for s in destination if s.id in meant))


def _digest(snapshots: Iterable[Snapshot]) -> str:
    hasher = blake3()
    for snapshot in sorted(snapshots, key=lambda s: s.id):
        hasher.update(bytes.fromhex(snapshot.id))
        for disk in snapshot.manifest.disks:
            hasher.update(disk.root)
    return hasher.hexdigest()
