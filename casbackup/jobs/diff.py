"""Where two snapshots differ, disk by disk, as byte ranges. Reads tree nodes only, and only those that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from casbackup.ids import BlobId, DiskName
from casbackup.peer.api import Peer
from casbackup.repository.catalog import Snapshot
from casbackup.tree.diff import Range


@dataclass(frozen=True, slots=True)
class DiskDifference:
    """``ranges`` where the disks may differ (as fine as chunks). A size of None: that snapshot lacks the disk."""

    disk: DiskName
    old_size_bytes: int | None
    new_size_bytes: int | None
    ranges: tuple[Range, ...]

    @property
    def differing_bytes(self) -> int:
        return sum(item.length for item in self.ranges)


@dataclass(frozen=True, slots=True)
class SnapshotDifference:
    disks: tuple[DiskDifference, ...]
    configs: tuple[str, ...]
    """Names of configs that were added, removed or changed."""


def diff_snapshots(peer: Peer, old: Snapshot, new: Snapshot, only: Sequence[str] = ()) -> SnapshotDifference:
    """Compare two snapshots; ``only`` names the disks of interest, none meaning all."""
    old_disks = {d.name: d for d in old.manifest.disks if not only or d.name in only}
    new_disks = {d.name: d for d in new.manifest.disks if not only or d.name in only}
    found: list[DiskDifference] = []
    for name in sorted({*old_disks, *new_disks}):
        a, b = old_disks.get(name), new_disks.get(name)
        ranges = peer.differing(old, new, name)
        sizes = (a.size_bytes if a else None), (b.size_bytes if b else None)
        found.append(DiskDifference(name, *sizes, tuple(ranges)))
    return SnapshotDifference(tuple(found), _differing_configs(old, new))


def _differing_configs(old: Snapshot, new: Snapshot) -> tuple[str, ...]:
    before: dict[str, BlobId] = {c.name: c.id for c in old.manifest.configs}
    after: dict[str, BlobId] = {c.name: c.id for c in new.manifest.configs}
    return tuple(sorted(n for n in {*before, *after} if before.get(n) != after.get(n)))
