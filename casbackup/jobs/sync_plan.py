"""What a sync shall do, as values: which snapshots are meant, and what is to be copied, changed and removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from casbackup.errors import UsageError
from casbackup.ids import Namespace, SnapshotId, VmName
from casbackup.repository.catalog import Snapshot

_PATTERN = "*?["


@dataclass(frozen=True, slots=True)
class SnapshotFilter:
    """Which snapshots are meant; the default is all. Patterns are a shell's; ``*`` matches ``/``, too.

    ``labels``: with one of these. ``last``: so many of each VM, the latest by sequence, of those that all else admits.
    """

    namespaces: tuple[str, ...] = ()
    vms: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    last: int | None = None
    since_ms: int | None = None

    def covers(self, snapshot: Snapshot) -> bool:
        """Is it meant, ``last`` aside?"""
        manifest = snapshot.manifest
        return (
            _matches(manifest.namespace, self.namespaces)
            and _matches(manifest.vm, self.vms)
            and (not self.labels or not set(self.labels).isdisjoint(snapshot.labels))
            and (self.since_ms is None or manifest.time_ms >= self.since_ms)
        )

    def select(self, snapshots: Iterable[Snapshot]) -> list[Snapshot]:
        """Those that are meant, in their order, which is that of a listing."""
        covered = [snapshot for snapshot in snapshots if self.covers(snapshot)]
        if self.last is None:
            return covered
        by_vm: dict[tuple[Namespace, VmName], list[Snapshot]] = {}
        for snapshot in covered:
            by_vm.setdefault((snapshot.manifest.namespace, snapshot.manifest.vm), []).append(snapshot)
        kept = {s.id for group in by_vm.values() for s in group[max(0, len(group) - self.last) :]}
        return [snapshot for snapshot in covered if snapshot.id in kept]

    @property
    def only_vm(self) -> tuple[Namespace | None, VmName | None]:
        """The one namespace and VM that are meant, None where it may be several: a listing need not say more."""
        namespace, vm = _only(self.namespaces), _only(self.vms)
        return (None if namespace is None else Namespace(namespace)), (None if vm is None else VmName(vm))


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be changed about a snapshot at the destination; None leaves a part as it is."""

    snapshot: Snapshot
    pinned: bool | None = None
    labels: tuple[str, ...] | None = None
    notes: str | None = None


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """``selected`` are all that are meant, of the source; ``copy`` of them are not at the destination.

    ``blocked``: snapshots of ``copy`` whose time another snapshot of the destination has, with that one.
    ``remove``: what a mirroring removes at the destination; ``spared``: what it would, were it not pinned.
    """

    selected: tuple[Snapshot, ...]
    copy: tuple[Snapshot, ...]
    blocked: tuple[tuple[Snapshot, Snapshot], ...]
    changes: tuple[Change, ...]
    remove: tuple[Snapshot, ...]
    spared: tuple[Snapshot, ...]

    @property
    def size_bytes(self) -> int:
        """Of the disks that are to be copied, as they would be restored."""
        return sum(disk.size_bytes for snapshot in self.copy for disk in snapshot.manifest.disks)


Origin = Callable[[Snapshot], SnapshotId]
"""The id that a snapshot of the destination has at the source, if it is a copy."""


def _same_id(snapshot: Snapshot) -> SnapshotId:
    return snapshot.id


def plan_sync(
    source: Sequence[Snapshot],
    destination: Sequence[Snapshot],
    chosen: SnapshotFilter,
    *,
    mirror: bool,
    origin: Origin = _same_id,
) -> SyncPlan:
    """Compare two listings.

    :raise UsageError: when a mirror of nothing is asked for, which would remove everything.
    """
    there = {origin(snapshot): snapshot for snapshot in destination}
    taken = {snapshot.key: snapshot for snapshot in destination}
    selected = chosen.select(source)
    absent = [snapshot for snapshot in selected if snapshot.id not in there]
    surplus = _surplus(source, there, chosen) if mirror else []
    return SyncPlan(
        selected=tuple(selected),
        copy=tuple(s for s in absent if s.key not in taken),
        blocked=tuple((s, taken[s.key]) for s in absent if s.key in taken),
        changes=tuple(_changes(selected, there, unpin=mirror)),
        remove=tuple(s for s in surplus if not s.pinned),
        spared=tuple(s for s in surplus if s.pinned),
    )


def _surplus(
    source: Sequence[Snapshot], there: Mapping[SnapshotId, Snapshot], chosen: SnapshotFilter
) -> list[Snapshot]:
    """What is meant, is at the destination, and is not at the source any more. ``last`` plays no part in that."""
    if not any(chosen.covers(snapshot) for snapshot in source):
        raise UsageError("the source has no such snapshot: mirroring that would remove all of them at the destination")
    known = {snapshot.id for snapshot in source}
    return [snapshot for origin, snapshot in there.items() if origin not in known and chosen.covers(snapshot)]


def _changes(selected: Sequence[Snapshot], there: Mapping[SnapshotId, Snapshot], *, unpin: bool) -> Iterable[Change]:
    """Labels and notes follow the source. A pin is set, but only a mirroring takes one away: who pinned a copy at its
    place meant it.
    """
    for snapshot in selected:
        copy = there.get(snapshot.id)
        if copy is None:
            continue
        pinned = None if copy.pinned == snapshot.pinned or not (snapshot.pinned or unpin) else snapshot.pinned
        labels = None if copy.labels == snapshot.labels else snapshot.labels
        notes = None if copy.notes == snapshot.notes else snapshot.notes
        if (pinned, labels, notes) != (None, None, None):
            yield Change(copy, pinned, labels, notes)


def _matches(text: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(text, pattern) for pattern in patterns)


def _only(patterns: Sequence[str]) -> str | None:
    if len(patterns) == 1 and not set(_PATTERN) & set(patterns[0]):
        return patterns[0]
    return None
