"""Snapshots as clients get them: the bytes of their files, so that ids can be checked."""

from __future__ import annotations

from collections.abc import Iterable

from casbackup.errors import ManifestDamaged
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.spec.manifest import Sidecar, encode_sidecar
from casbackup.spec.wire import encode_damaged_snapshot, encode_snapshot

_UNCHANGED = Sidecar()


def frame_of(repository: Repository, snapshot: Snapshot) -> bytes:
    """One snapshot."""
    manifest = repository.catalog.manifest(snapshot)
    sidecar = b"" if snapshot.sidecar == _UNCHANGED else encode_sidecar(snapshot.sidecar)
    return encode_snapshot(manifest, sidecar)


def frames_of(repository: Repository, snapshots: Iterable[Snapshot], damaged: Iterable[ManifestDamaged]) -> bytes:
    """Many, and what stands in the place of damaged ones."""
    found = [frame_of(repository, snapshot) for snapshot in snapshots]
    return b"".join([*found, *(encode_damaged_snapshot(damage) for damage in damaged)])
