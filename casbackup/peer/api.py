"""What a job may ask of the other side. A job moves data through a ``Peer`` only, so it runs unchanged against any of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from casbackup.codec.codec import Codec
from casbackup.errors import CasbackupError, ManifestDamaged
from casbackup.ids import BlobId, DiskName, Namespace, SessionId, VmName
from casbackup.peer.usage import UsageReport
from casbackup.repository.adoption import Copy
from casbackup.repository.catalog import Snapshot
from casbackup.spec.config import RepositoryConfig
from casbackup.spec.manifest import Manifest, Sidecar
from casbackup.spec.record import Record
from casbackup.store.blobstore import Fetched
from casbackup.store.writer import StoredBytes
from casbackup.tree.diff import Range


class PeerSession(Protocol):
    """One backup in progress; safe from several threads but for its end.

    Order of use: ``missing`` and ``send`` in any number, then one of ``commit``, ``finish``, ``abort`` or ``park``.
    Children are sent before the nodes that name them. What ``missing`` did not return, and what was sent, stays
    stored until the session ends.
    """

    @property
    def id(self) -> SessionId: ...

    def missing(self, ids: Sequence[BlobId]) -> set[BlobId]:
        """Those of ``ids`` that must be sent."""

    def missing_leaf(self, leaf: BlobId, chunks: Sequence[BlobId]) -> set[BlobId]:
        """Those of a leaf and its chunks that must be sent; none if the leaf is there, for then its chunks are."""

    def send(self, records: Sequence[Record]) -> StoredBytes:
        """Store blobs. Sending what is stored already is not an error and counts nothing.

        :raise ClosureViolation: when a tree node names something that is neither stored nor sent before it. What
            stands before that node is stored all the same.
        """

    def send_soon(self, records: Sequence[Record], then: Callable[[StoredBytes], None]) -> None:
        """Like ``send``, but need not wait for it. ``then`` gets what was stored, from any thread, before the next
        ``settle``, ``flush`` or ``commit`` returns. The records' memory must not change any more.

        An error is raised here, or by any later call; at the latest by ``flush`` or ``commit``. After one, only
        ``abort`` and ``park`` make sense.
        """

    def settle(self) -> None:
        """Wait until every ``then`` has been called; that says nothing about durability."""

    def flush(self) -> None:
        """What was sent is durable: a resumed session is not asked for it again."""

    def commit(self, draft: Manifest) -> Snapshot:
        """Make the snapshot visible. ``sequence`` and ``parent`` of the draft are filled in by the peer.

        :raise ClosureViolation: when something that it needs is not stored.
        """

    def adopt(self, manifest: bytes, sidecar: Sidecar = ...) -> Snapshot:
        """Make a copy of another repository's snapshot visible: its manifest as it is, so the same id, number, parent
        and time. What was sent is durable then. The session goes on, and may adopt others.

        ``sidecar``: what was changed about it later. One that is here already is not an error, and keeps its own.
        It may be called from several threads, and beside ``send``.

        :raise ManifestDamaged: when the bytes are no manifest. :raise ClosureViolation: when something that it needs
        is not stored. :raise NodeInvalid: when a root is not that of a disk of its size.
        :raise SnapshotConflict: when the VM has another snapshot of that time.
        """

    def adopt_all(self, copies: Sequence[Copy]) -> list[Snapshot | CasbackupError]:
        """``adopt`` of several, in order, for the price of one. Ends with the first that is refused, whose error, one
        of those of ``adopt``, comes last: nothing is known of those after it.
        """

    def finish(self) -> None:
        """End a session that adopted: what no snapshot needs of what it sent becomes garbage."""

    def abort(self) -> None: ...

    def park(self) -> None:
        """Leave it to be resumed by its id."""


class Peer(Protocol):
    """A repository as seen by a job. Safe from several threads."""

    @property
    def config(self) -> RepositoryConfig: ...

    @property
    def codec(self) -> Codec:
        """How its blobs are made and read."""

    @property
    def workers(self) -> int:
        """Threads that a job should use with it: more than there are processors where some of them wait for answers."""

    def open_session(self, namespace: Namespace, vm: VmName) -> PeerSession: ...

    def resume_session(self, session: SessionId) -> PeerSession:
        """Go on with a session that was parked, or whose client died. Where it cannot be told that nobody works on it,
        whoever did gets ``SessionBusy`` from now on.

        :raise SessionNotFound: / :raise SessionBusy: when it cannot be resumed.
        """

    def snapshots(self, namespace: Namespace | None = None, vm: VmName | None = None) -> list[Snapshot]:
        """In order of namespace, VM and sequence."""

    def survey(
        self, namespace: Namespace | None = None, vm: VmName | None = None
    ) -> tuple[list[Snapshot], list[ManifestDamaged]]:
        """Like ``snapshots``, but gives what is wrong beside what is right."""

    def find(self, reference: str, namespace: Namespace) -> Snapshot:
        """:raise SnapshotNotFound: / :raise SnapshotAmbiguous: when not exactly one matches."""

    def manifest(self, snapshot: Snapshot) -> bytes:
        """The bytes of its manifest, whose BLAKE3 is its id.

        :raise SnapshotNotFound: when it was forgotten and its bytes cannot be told.
        """

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        """The records of distinct ``ids`` in whatever order is quickest; what cannot be had comes as an error in its
        place.

        Records are not verified here: whoever decodes one verifies it against its id.
        """

    def differing(self, old: Snapshot, new: Snapshot, disk: DiskName) -> Sequence[Range]:
        """Where that disk of two snapshots may differ, in order, merged, as fine as chunks; outside of these ranges it
        is equal, byte for byte. A snapshot that lacks the disk counts as having one of no bytes.

        :raise DataDamage: when that cannot be told.
        """

    def reading(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        """While this is entered, the snapshot's data stays, even if it is forgotten."""

    def annotate(
        self,
        snapshot: Snapshot,
        *,
        pinned: bool | None = None,
        labels: Sequence[str] | None = None,
        notes: str | None = None,
    ) -> Snapshot:
        """Change what may change about a snapshot; None leaves a part as it is. Durable on return."""

    def remove(self, snapshots: Sequence[Snapshot]) -> None:
        """Forget snapshots. One that is gone already is not an error.

        :raise SnapshotPinned: when one is pinned now.
        """

    def usage(self, groups: Sequence[Sequence[Snapshot]]) -> UsageReport:
        """What each group of snapshots costs, and all of the repository.

        :raise DataDamage: when that cannot be known.
        """


class KeyShelf(Protocol):
    """Where a repository keeps a wrapped copy of its key, if anybody put one there. Neither side needs the key."""

    def stored_key(self) -> bytes | None:
        """The bytes of the key file, which whoever has the repository may have changed; None if there is none."""

    def store_key(self, data: bytes, *, replace: bool) -> None:
        """Keep a copy, durably.

        :raise KeyMismatch: when it is not of the repository's key. :raise UsageError: when the key is not wrapped.
        :raise KeyExists: when there is one already and ``replace`` is false.
        """


class StoredPeer(Peer, KeyShelf, Protocol):
    """A repository as it is stored: sealed, if it is encrypted."""
