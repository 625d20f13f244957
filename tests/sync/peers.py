"""Peers that stand between a job and a repository: they count, interfere and break."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from casbackup.codec.codec import Codec
from casbackup.errors import CasbackupError, ServerUnreachable
from casbackup.ids import BlobId, DiskName, Namespace, SessionId, VmName
from casbackup.peer.api import Peer, PeerSession
from casbackup.peer.usage import UsageReport
from casbackup.repository.adoption import Copy
from casbackup.repository.catalog import Snapshot
from casbackup.spec.config import RepositoryConfig
from casbackup.spec.record import Record
from casbackup.store.blobstore import Fetched
from casbackup.store.writer import StoredBytes
from casbackup.tree.diff import Range

_IDS_A_QUESTION = 65_536
_IDS_A_FETCH = 256
_BYTES_AN_UPLOAD = 4 * 2**20

Before = Callable[[str], None]


class Cost:
    """What a server would have been asked: requests by kind, and bytes in both directions."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.sent_bytes = 0
        self.received_bytes = 0
        self.sent: Counter[BlobId] = Counter()
        self.fetched: Counter[BlobId] = Counter()

    @property
    def round_trips(self) -> int:
        return self.requests.total()


class WatchedPeer:
    """Implements ``Peer``: ``before`` is called with the name of each operation before it is done."""

    def __init__(self, peer: Peer, before: Before = lambda _: None) -> None:
        self._peer = peer
        self.before = before
        self.cost = Cost()

    @property
    def config(self) -> RepositoryConfig:
        return self._peer.config

    @property
    def codec(self) -> Codec:
        return self._peer.codec

    @property
    def workers(self) -> int:
        return self._peer.workers

    def open_session(self, namespace: Namespace, vm: VmName) -> WatchedSession:
        self._asked("open_session")
        return WatchedSession(self, self._peer.open_session(namespace, vm))

    def resume_session(self, session: SessionId) -> WatchedSession:
        self._asked("resume_session")
        return WatchedSession(self, self._peer.resume_session(session))

    def survey(self, namespace: Namespace | None = None, vm: VmName | None = None) -> Any:
        self._asked("survey")
        return self._peer.survey(namespace, vm)

    def snapshots(self, namespace: Namespace | None = None, vm: VmName | None = None) -> list[Snapshot]:
        self._asked("snapshots")
        return self._peer.snapshots(namespace, vm)

    def manifest(self, snapshot: Snapshot) -> bytes:
        return self._peer.manifest(snapshot)

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        self._asked("fetch", -(-len(ids) // _IDS_A_FETCH))
        self.cost.sent_bytes += 32 * len(ids)
        self.cost.fetched.update(ids)
        for blob_id, record in self._peer.fetch(ids):
            if isinstance(record, Record):
                self.cost.received_bytes += record.total_bytes
            yield blob_id, record

    def differing(self, old: Snapshot, new: Snapshot, disk: DiskName) -> Sequence[Range]:
        self._asked("differing")
        return self._peer.differing(old, new, disk)

    @contextlib.contextmanager
    def reading(self, snapshot: Snapshot) -> Iterator[None]:
        self._asked("reading")
        with self._peer.reading(snapshot):
            yield
        self._asked("reading")

    def usage(self, groups: Sequence[Sequence[Snapshot]]) -> UsageReport:
        return self._peer.usage(groups)

    def annotate(self, snapshot: Snapshot, **changes: Any) -> Snapshot:
        self._asked("annotate")
        return self._peer.annotate(snapshot, **changes)

    def remove(self, snapshots: Sequence[Snapshot]) -> None:
        self._asked("remove")
        self._peer.remove(snapshots)

    def _asked(self, what: str, requests: int = 1) -> None:
        self.cost.requests[what] += requests
        self.before(what)


class WatchedSession:
    """Implements what a sync uses of ``PeerSession``."""

    def __init__(self, watched: WatchedPeer, session: PeerSession) -> None:
        self._watched = watched
        self._session = session
        self.id = session.id

    def missing(self, ids: Sequence[BlobId]) -> set[BlobId]:
        if ids:
            self._watched._asked("missing", -(-len(ids) // _IDS_A_QUESTION))
        self._watched.cost.sent_bytes += 32 * len(ids)
        return self._session.missing(ids)

    def send_soon(self, records: Sequence[Record], then: Callable[[StoredBytes], None]) -> None:
        self._watched._asked("send", -(-sum(r.total_bytes for r in records) // _BYTES_AN_UPLOAD))
        self._watched.cost.sent_bytes += sum(record.total_bytes for record in records)
        self._watched.cost.sent.update(record.id for record in records)
        self._session.send_soon(records, then)

    def adopt_all(self, copies: Sequence[Copy]) -> list[Snapshot | CasbackupError]:
        self._watched._asked("adopt")
        self._watched.cost.sent_bytes += sum(len(copy.manifest) for copy in copies)
        return self._session.adopt_all(copies)

    def flush(self) -> None:
        self._session.flush()

    def finish(self) -> None:
        self._watched._asked("finish")
        self._session.finish()

    def abort(self) -> None:
        self._watched._asked("abort")
        self._session.abort()

    def park(self) -> None:
        self._session.park()


def breaking_after(operations: int) -> Before:
    """The link breaks for good after so many operations."""
    left = operations

    def before(_what: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ServerUnreachable("the link is down")

    return before
