"""What ``--json`` prints: one document a command. Keys are stable; new ones may be added.

Sizes and offsets are bytes (``_bytes``), times RFC 3339 in UTC, durations milliseconds (``_ms``).
``docs/reference/json.md`` is generated from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from casbackup.clock import format_time

if TYPE_CHECKING:
    from collections.abc import Iterable

    from casbackup.jobs.diff import SnapshotDifference
    from casbackup.repository.catalog import Snapshot
    from casbackup.repository.repository import Repository
    from casbackup.repository.sessions import SessionRow
    from casbackup.tree.diff import Range


class DiskDocument(TypedDict):
    """A disk of a snapshot."""

    name: str
    size_bytes: int
    source: str
    """Where it was read from, for people."""
    root: str
    """The id of its tree: disks with the same root and size have the same content."""


class ConfigDocument(TypedDict):
    """A configuration file that was backed up with the disks."""

    name: str
    size_bytes: int
    id: str


class BackupStatsDocument(TypedDict):
    """What making a snapshot took. All but ``stored`` and ``read`` count bytes of the disks' content."""

    read_bytes: int
    """Read from the sources; holes are not."""
    zero_bytes: int
    """Holes and zeros."""
    reused_bytes: int
    """In the repository before."""
    new_bytes: int
    new_stored_bytes: int
    """What the new ones take in the repository, compressed, with the tree."""
    new_chunks: int
    duration_ms: int


class SnapshotDocument(TypedDict):
    """A snapshot."""

    reference: str
    """``vm/100@TIME``, with ``NAMESPACE:`` before it outside of the default namespace; commands take it as REF."""
    id: str
    namespace: str
    vm: str
    time: str
    sequence: int
    """Counts a VM's snapshots, whatever the clock did."""
    parent: str | None
    """The id of the VM's snapshot before it."""
    size_bytes: int
    """Of all disks and configs as they are restored."""
    disks: list[DiskDocument]
    configs: list[ConfigDocument]
    labels: list[str]
    notes: str
    pinned: bool
    host: str
    """Where it was made."""
    program: str
    """What made it."""
    stats: BackupStatsDocument


class RangeDocument(TypedDict):
    """A range of a disk."""

    offset_bytes: int
    length_bytes: int


class RepositoryDocument(TypedDict):
    """A repository; printed by ``init``."""

    path: str
    id: str
    format: int
    created: str
    compression_level: int


class DiskDifferenceDocument(TypedDict):
    """A disk that two snapshots may have in common."""

    disk: str
    old_size_bytes: int | None
    """null: the older snapshot lacks the disk."""
    new_size_bytes: int | None
    differing_bytes: int
    ranges: list[RangeDocument]
    """Outside of them the disks are equal; within them they may differ."""


class DifferenceDocument(TypedDict):
    """Printed by ``diff``."""

    old: str
    new: str
    disks: list[DiskDifferenceDocument]
    configs: list[str]
    """Configs that were added, removed or changed."""


class SessionDocument(TypedDict):
    """A backup under way or interrupted, or a restore under way."""

    id: str
    namespace: str
    vm: str
    kind: str
    """``backup`` or ``read``."""
    active: bool
    """A process works on it now; otherwise it can be resumed or aborted."""
    seen: str
    """When it was opened or resumed last."""


def repository_document(repository: Repository) -> RepositoryDocument:
    config = repository.config
    return {
        "path": repository.layout.root,
        "id": config.repository_id,
        "format": config.format,
        "created": config.created,
        "compression_level": config.compression_level,
    }


def snapshot_document(snapshot: Snapshot) -> SnapshotDocument:
    manifest, stats = snapshot.manifest, snapshot.manifest.stats
    return {
        "reference": snapshot.reference,
        "id": snapshot.id,
        "namespace": manifest.namespace,
        "vm": manifest.vm,
        "time": format_time(manifest.time_ms),
        "sequence": manifest.sequence,
        "parent": manifest.parent,
        "size_bytes": manifest.size_bytes,
        "disks": [
            {"name": d.name, "size_bytes": d.size_bytes, "source": d.source, "root": d.root.hex()} for d in manifest.disks
        ],
        "configs": [{"name": c.name, "size_bytes": c.size_bytes, "id": c.id.hex()} for c in manifest.configs],
        "labels": list(snapshot.labels),
        "notes": snapshot.notes,
        "pinned": snapshot.pinned,
        "host": manifest.host,
        "program": manifest.program,
        "stats": {
            "read_bytes": stats.read_bytes,
            "zero_bytes": stats.zero_bytes,
            "reused_bytes": stats.reused_bytes,
            "new_bytes": stats.new_bytes,
            "new_stored_bytes": stats.new_stored_bytes,
            "new_chunks": stats.new_chunks,
            "duration_ms": stats.duration_ms,
        },
    }


def range_documents(ranges: Iterable[Range]) -> list[RangeDocument]:
    return [{"offset_bytes": item.offset, "length_bytes": item.length} for item in ranges]


def difference_document(old: Snapshot, new: Snapshot, difference: SnapshotDifference) -> DifferenceDocument:
    return {
        "old": old.reference,
        "new": new.reference,
        "disks": [
            {
                "disk": item.disk,
                "old_size_bytes": item.old_size_bytes,
                "new_size_bytes": item.new_size_bytes,
                "differing_bytes": item.differing_bytes,
                "ranges": range_documents(item.ranges),
            }
            for item in difference.disks
        ],
        "configs": list(difference.configs),
    }


def session_document(row: SessionRow, active: bool) -> SessionDocument:
    return {
        "id": row.id,
        "namespace": row.namespace,
        "vm": row.vm,
        "kind": row.kind.name.lower(),
        "active": active,
        "seen": format_time(row.seen_ms),
    }
