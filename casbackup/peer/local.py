"""A repository in a folder as a peer, in-process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from casbackup.ids import BlobId, Namespace, SessionId, VmName
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import Session, reading
from casbackup.spec.config import RepositoryConfig
from casbackup.store.blobstore import Fetched


class LocalPeer:
    """Calls straight into the repository. Does not own it: closing it is the caller's."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository

    @property
    def config(self) -> RepositoryConfig:
        return self.repository.config

    def open_session(self, namespace: Namespace, vm: VmName) -> Session:
        self.repository.require_writable()
        return self.repository.sessions.open(namespace, vm)

    def resume_session(self, session: SessionId) -> Session:
        self.repository.require_writable()
        return self.repository.sessions.resume(session)

    def snapshots(self, namespace: Namespace | None = None, vm: VmName | None = None) -> list[Snapshot]:
        return self.repository.catalog.all(namespace, vm)

    def find(self, reference: str, namespace: Namespace) -> Snapshot:
        return self.repository.catalog.find(reference, namespace)

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        return self.repository.store.fetch(ids)

    def reading(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        return reading(self.repository, snapshot)
