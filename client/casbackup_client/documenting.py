"""The documents of ``documents`` made from what the library gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from casbackup.clock import format_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from casbackup.formats.findings import Finding
    from casbackup.jobs.diff import SnapshotDifference
    from casbackup.repository.accounting import Usage
    from casbackup.repository.catalog import Snapshot
    from casbackup.repository.damage import AffectedDisk
    from casbackup.repository.gc import GcPlan, GcReport
    from casbackup.repository.repository import Repository
    from casbackup.repository.sessions import SessionRow
    from casbackup.spec.keyfile import KeyFile
    from casbackup.spec.manifest import ArchiveOrigin, DiskRecord, LiveOrigin, MissingRange
    from casbackup.tree.diff import Range
    from casbackup_client.documents import (
        AffectedDocument,
        ArchiveFindingDocument,
        ArchiveOriginDocument,
        DifferenceDocument,
        DiskDocument,
        GcDocument,
        KeyDocument,
        LiveOriginDocument,
        MissingDocument,
        RangeDocument,
        RepositoryDocument,
        SessionDocument,
        SnapshotDocument,
        UsageDocument,
    )


def repository_document(repository: Repository) -> RepositoryDocument:
    config = repository.config
    return {
        "path": repository.layout.root,
        "id": config.repository_id,
        "format": config.format,
        "created": config.created,
        "compression_level": config.compression_level,
        "key": config.key_fingerprint or None,
    }


def key_document(key_file: KeyFile, path: str) -> KeyDocument:
    from casbackup.spec.keyfile import PassphraseWrapping

    by_passphrase = [wrapping for wrapping in key_file.wrappings if isinstance(wrapping, PassphraseWrapping)]
    return {
        "fingerprint": key_file.fingerprint,
        "created": key_file.created,
        "comment": key_file.comment,
        "path": path,
        "passphrases": [
            {"iterations": w.iterations, "memory_kib": w.memory_kib, "lanes": w.lanes} for w in by_passphrase
        ],
        "recipients": list(key_file.recipients),
        "plain": key_file.is_plain,
    }


def snapshot_document(snapshot: Snapshot) -> SnapshotDocument:
    manifest, stats = snapshot.manifest, snapshot.manifest.stats
    document: SnapshotDocument = {
        "reference": snapshot.reference,
        "id": snapshot.id,
        "namespace": manifest.namespace,
        "vm": manifest.vm,
        "time": format_time(manifest.time_ms),
        "sequence": manifest.sequence,
        "parent": manifest.parent,
        "size_bytes": manifest.size_bytes,
        "disks": [_disk_document(disk) for disk in manifest.disks],
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
    if manifest.live is not None:
        document["live"] = _live_document(manifest.live)
    if manifest.archive is not None:
        document["archive"] = _origin_document(manifest.archive, [disk.name for disk in manifest.disks])
    return document


def _disk_document(disk: DiskRecord) -> DiskDocument:
    document: DiskDocument = {
        "name": disk.name,
        "size_bytes": disk.size_bytes,
        "source": disk.source,
        "root": disk.root.hex(),
    }
    if disk.role:
        document["role"] = disk.role
    return document


def _live_document(live: LiveOrigin) -> LiveOriginDocument:
    return {
        "mode": live.mode,
        "mode_note": live.mode_note,
        "qemu": live.qemu,
        "frozen": live.frozen,
        "note": live.note,
        "bitmap": live.bitmap,
        "increments": list(live.increments),
        "vmstate": live.vmstate,
        "pause_ms": live.pause_ms,
    }


def _origin_document(origin: ArchiveOrigin, names: Sequence[str]) -> ArchiveOriginDocument:
    return {
        "format": origin.format,
        "uuid": None if origin.uuid is None else origin.uuid.hex(),
        "time_s": origin.time_s,
        "disks": [{"name": disk.name, "device_id": disk.device_id} for disk in origin.disks],
        "configs": [{"name": name} for name in origin.configs],
        "missing": missing_documents(origin.missing, names),
    }


def missing_documents(missing: Iterable[MissingRange], names: Sequence[str]) -> list[MissingDocument]:
    """``names``: of the disks, in the order in which the ranges number them."""
    return [{"disk": names[m.disk], "offset_bytes": m.offset, "length_bytes": m.length} for m in missing]


def finding_documents(findings: Iterable[Finding]) -> list[ArchiveFindingDocument]:
    return [
        {
            "severity": item.severity.value,
            "code": item.code,
            "text": item.text,
            "archive_offset": item.archive_offset,
            "disk": item.disk,
            "device_id": item.device_id,
            "cluster": item.cluster,
            "disk_offset_bytes": item.disk_offset,
            "length_bytes": item.length,
        }
        for item in findings
    ]


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


def usage_document(usage: Usage) -> UsageDocument:
    return {
        "logical_bytes": usage.logical_bytes,
        "plain_bytes": usage.plain_bytes,
        "stored_bytes": usage.stored_bytes,
        "unique_bytes": usage.unique_bytes,
        "shared_bytes": usage.shared_bytes,
    }


def planned_gc_document(plan: GcPlan) -> GcDocument:
    return {
        "dry_run": True,
        "freed_bytes": plan.freed_bytes,
        "pending_bytes": plan.pending_bytes,
        "removed_blobs": plan.removed_blobs,
        "dropped_packs": len(plan.drop),
        "rewritten_packs": len(plan.rewrite),
        "removed_orphans": len(plan.orphans),
        "expired_sessions": len(plan.expired),
        "notes": [],
    }


def gc_document(report: GcReport) -> GcDocument:
    return {
        "dry_run": False,
        "freed_bytes": report.freed_bytes,
        "pending_bytes": report.pending_bytes,
        "removed_blobs": report.removed_blobs,
        "dropped_packs": report.dropped_packs,
        "rewritten_packs": report.rewritten_packs,
        "removed_orphans": report.removed_orphans,
        "expired_sessions": report.expired_sessions,
        "notes": list(report.notes),
    }


def affected_documents(affected: Iterable[AffectedDisk]) -> list[AffectedDocument]:
    return [
        {
            "snapshot": item.snapshot.reference,
            "id": item.snapshot.id,
            "disk": item.disk,
            "config": None if item.disk else item.config,
            "lost_bytes": item.lost_bytes,
            "ranges": range_documents(item.ranges),
        }
        for item in affected
    ]


def session_document(row: SessionRow, active: bool) -> SessionDocument:
    from casbackup.repository.sessions import SessionKind

    return {
        "id": row.id,
        "namespace": row.namespace,
        "vm": row.vm,
        "kind": SessionKind(row.kind).name.lower(),
        "active": active,
        "seen": format_time(row.seen_ms),
    }
