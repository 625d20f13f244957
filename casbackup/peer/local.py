"""A repository in a folder as a peer, in-process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from casbackup.codec.codec import Codec
from casbackup.errors import ManifestDamaged
from casbackup.ids import BlobId, DiskName, Namespace, SessionId, VmName
from casbackup.peer.differing import walked_ranges
from casbackup.peer.usage import UsageReport, usage_of
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import Session, reading
from casbackup.repository.stored_key import read_stored_key, write_stored_key
from casbackup.spec.config import RepositoryConfig
from casbackup.store.blobstore import Fetched
from casbackup.tree.diff import Range
from casbackup.workers import worker_count


class LocalPeer:
    """Calls straight into the repository. Does not own it: closing it is the caller's."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository

    @property
    def config(self) -> RepositoryConfig:
        return self.repository.config

    @property
    def codec(self) -> Codec:
        return self.repository.codec

    @property
    def workers(self) -> int:
        return worker_count()

    def open_session(self, namespace: Namespace, vm: VmName) -> Session:
        self.repository.require_writable()
        return self.repository.sessions.open(namespace, vm)

    def resume_session(self, session: SessionId) -> Session:
        self.repository.require_writable()
        return self.repository.sessions.resume(session)

    def snapshots(self, namespace: Namespace | None = None, vm: VmName | None = None) -> list[Snapshot]:
        return self.repository.catalog.all(namespace, vm)

    def survey(
        self, namespace: Namespace | None = None, vm: VmName | None = None
    ) -> tuple[list[Snapshot], list[ManifestDamaged]]:
        return self.repository.catalog.survey(namespace, vm)

    def find(self, reference: str, namespace: Namespace) -> Snapshot:
        return self.repository.catalog.find(reference, namespace)

    def manifest(self, snapshot: Snapshot) -> bytes:
        return self.repository.catalog.manifest(snapshot)

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        return self.repository.store.fetch(ids)

    def differing(self, old: Snapshot, new: Snapshot, disk: DiskName) -> list[Range]:
        return list(walked_ranges(self, old, new, disk))

    def reading(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        return reading(self.repository, snapshot)

    def annotate(
        self,
        snapshot: Snapshot,
        *,
        pinned: bool | None = None,
        labels: Sequence[str] | None = None,
        notes: str | None = None,
    ) -> Snapshot:
        self.repository.require_writable()
        return self.repository.catalog.annotate(snapshot, pinned=pinned, labels=labels, notes=notes)

    def remove(self, snapshots: Sequence[Snapshot]) -> None:
        self.repository.require_writable()
        if snapshots:
            self.repository.catalog.remove(snapshots)

    def usage(self, groups: Sequence[Sequence[Snapshot]]) -> UsageReport:
        return usage_of(self.repository, groups)

    def stored_key(self) -> bytes | None:
        return read_stored_key(self.repository)

    def store_key(self, data: bytes, *, replace: bool) -> None:
        write_stored_key(self.repository, data, replace=replace)
