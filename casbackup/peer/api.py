"""What a job may ask of the other side. A job moves data through a ``Peer`` only, so it runs unchanged against any of
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from casbackup.ids import BlobId, Namespace, SessionId, VmName
from casbackup.repository.catalog import Snapshot
from casbackup.spec.config import RepositoryConfig
from casbackup.spec.manifest import Manifest
from casbackup.spec.record import Record
from casbackup.store.blobstore import Fetched
from casbackup.store.writer import StoredBytes


class PeerSession(Protocol):
    """One backup in progress; safe from several threads but for its end.

    Order of use: ``missing`` and ``send`` in any number, then one of ``commit``, ``abort`` or ``park``. Children
    are sent before the nodes that name them. What ``missing`` did not return, and what was sent, stays stored
    until the session ends.
    """

    @property
    def id(self) -> SessionId: ...

    def missing(self, ids: Sequence[BlobId]) -> set[BlobId]:
        """Those of ``ids`` that must be sent."""

    def send(self, records: Sequence[Record]) -> StoredBytes:
        """Store blobs. Sending what is stored already is not an error and counts nothing.

        :raise ClosureViolation: when a tree node names something that is neither stored nor sent before it. What
            stands before that node is stored all the same.
        """

    def flush(self) -> None:
        """What was sent is durable: a resumed session is not asked for it again."""

    def commit(self, draft: Manifest) -> Snapshot:
        """Make the snapshot visible. ``sequence`` and ``parent`` of the draft are filled in by the peer.

        :raise ClosureViolation: when something that it needs is not stored.
        """

    def abort(self) -> None: ...

    def park(self) -> None:
        """Leave it to be resumed by its id."""


class Peer(Protocol):
    """A repository as seen by a job. Safe from several threads."""

    @property
    def config(self) -> RepositoryConfig: ...

    def open_session(self, namespace: Namespace, vm: VmName) -> PeerSession: ...

    def resume_session(self, session: SessionId) -> PeerSession:
        """:raise SessionNotFound: / :raise SessionBusy: when it cannot be resumed."""

    def snapshots(self, namespace: Namespace | None = None, vm: VmName | None = None) -> list[Snapshot]:
        """In order of namespace, VM and sequence."""

    def find(self, reference: str, namespace: Namespace) -> Snapshot:
        """:raise SnapshotNotFound: / :raise SnapshotAmbiguous: when not exactly one matches."""

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        """The records of distinct ``ids`` in whatever order is quickest; what cannot be had comes as an error in its
        place.

        Records are not verified here: whoever decodes one verifies it against its id.
        """

    def reading(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        """While this is entered, the snapshot's data stays, even if it is forgotten."""
