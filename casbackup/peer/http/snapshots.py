"""Snapshots as they come from a server."""

from __future__ import annotations

from casbackup.errors import ManifestDamaged, ServerProtocolError
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import Sidecar, decode_manifest, decode_sidecar
from casbackup.spec.wire import SnapshotFrame, decode_snapshots


def parse_snapshots(body: bytes, origin: str) -> tuple[list[Snapshot], list[ManifestDamaged]]:
    """What is right and what is wrong.

    :raise ServerProtocolError: when the answer is not understood.
    """
    found: list[Snapshot] = []
    damaged: list[ManifestDamaged] = []
    for frame in decode_snapshots(body):
        if isinstance(frame, ManifestDamaged):
            damaged.append(frame)
        else:
            found.append(_snapshot(frame, origin))
    return found, damaged


def parse_snapshot(body: bytes, origin: str) -> Snapshot:
    """:raise ManifestDamaged: when it is. :raise ServerProtocolError: when it is not exactly one."""
    found, damaged = parse_snapshots(body, origin)
    if damaged:
        raise damaged[0]
    if len(found) != 1:
        raise ServerProtocolError(f"{origin} sent {len(found)} snapshots instead of one")
    return found[0]


def _snapshot(frame: SnapshotFrame, origin: str) -> Snapshot:
    manifest, snapshot_id = decode_manifest(frame.manifest, f"from {origin}")
    sidecar = decode_sidecar(frame.sidecar, f"from {origin}") if frame.sidecar else Sidecar()
    return Snapshot(snapshot_id, manifest, sidecar)
