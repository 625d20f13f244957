"""Snapshots as they come from a server."""

from __future__ import annotations

from casbackup.errors import CasbackupError, ManifestDamaged, ServerProtocolError
from casbackup.peer.http.problems import failure_of
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import Sidecar, decode_manifest, decode_sidecar
from casbackup.spec.wire import RefusedFrame, SnapshotFrame, decode_snapshots

_UNPROCESSABLE = 422


def parse_snapshots(body: bytes, origin: str) -> tuple[list[Snapshot], list[ManifestDamaged]]:
    """What is right and what is wrong.

    :raise ServerProtocolError: when the answer is not understood.
    """
    found: list[Snapshot] = []
    damaged: list[ManifestDamaged] = []
    for frame in decode_snapshots(body):
        if isinstance(frame, ManifestDamaged):
            damaged.append(frame)
        elif isinstance(frame, RefusedFrame):
            raise failure_of(_UNPROCESSABLE, frame.problem)
        else:
            found.append(_snapshot(frame, origin))
    return found, damaged


def parse_adopted(body: bytes, count: int, origin: str) -> list[Snapshot | CasbackupError]:
    """What became of ``count`` copies: the snapshots, in order, and last the error of the first that was refused.

    :raise ServerProtocolError: when the answer is not understood.
    """
    results: list[Snapshot | CasbackupError] = []
    for frame in decode_snapshots(body):
        if isinstance(frame, SnapshotFrame):
            results.append(_snapshot(frame, origin))
        else:
            results.append(failure_of(_UNPROCESSABLE, frame.problem) if isinstance(frame, RefusedFrame) else frame)
            break
    if len(results) > count or not (len(results) == count or (results and isinstance(results[-1], CasbackupError))):
        raise ServerProtocolError(f"{origin} answered {count} copies with {len(results)} results")
    return results


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
