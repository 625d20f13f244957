"""What this process keeps for clients: sessions they are attached to, and readings. Both end when nothing is heard.

A client names itself by an *attachment*, a random number of its own, whenever it speaks of a session. So a request
that is made twice is told from another client's, and a client may go on after this process was restarted: it resumes
the session with the same attachment.

Whoever shows the token by which a client was attached may take its place, for that client may have died without a word.
From then on the session is no business of the old attachment, which cannot come back.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from casbackup.errors import CasbackupError, ServerBusy, SessionBusy, SessionDetached, SessionNotFound
from casbackup.ids import BlobId, Namespace, SessionId, VmName
from casbackup.limits import MAX_LIVE_SESSIONS, MAX_READINGS
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import Session, reading
from casbackup.spec.manifest import Manifest
from casbackup.spec.record import Record
from casbackup_server.isolation import OwnBlobs, own_blobs

SILENCE_S = 45.0
"""A session is parked, and a reading ended, whose client was silent for so long."""

_REMEMBERED_COMMITS = 1000


@dataclass(slots=True)
class LiveSession:
    """A session that a client is attached to."""

    session: Session
    attachment: str
    owner: str
    """The token by which the client was attached."""
    namespace: Namespace
    vm: VmName
    heard_s: float
    attached_ms: int
    """The server's time when the client was attached: its backup begins then."""
    busy: int = 0
    """Requests under way: they are signs of life."""
    _append: threading.Lock = field(default_factory=threading.Lock)
    _durable: threading.Lock = field(default_factory=threading.Lock)
    _stored: int = 0
    _flushed: int = 0
    own: OwnBlobs | None = None
    """What an isolated client may be told about; made when the first one asks."""
    _fenced: set[str] = field(default_factory=set)

    def require(self, attachment: str) -> None:
        """:raise SessionBusy: when it is another client's."""
        if attachment in self._fenced:
            raise SessionBusy(f"session {self.session.id} was taken over by another client with the same token")
        if attachment != self.attachment:
            raise SessionBusy(
                f"another client works on session {self.session.id}; if it died, the session can be resumed at once"
                f" with the same token, and after {SILENCE_S:.0f} seconds with another one"
            )

    def hand_over(self, attachment: str, now_ms: int) -> None:
        """Fence the client that is attached, and attach another one; without effect for one that was fenced itself.

        What is under way for the old one is finished. The new one asks anew, and there is one commit at the most.
        """
        if attachment != self.attachment and attachment not in self._fenced:
            self._fenced.add(self.attachment)
            self.attachment, self.attached_ms = attachment, now_ms

    def missing(self, ids: Sequence[BlobId], own: OwnBlobs | None) -> set[BlobId]:
        """Those that must be sent; with ``own``, all that is not of it, stored or not."""
        missing = self.session.missing(ids)
        return missing if own is None else missing | own.strangers(ids)

    def store(self, records: Sequence[Record], own: OwnBlobs | None) -> list[bool]:
        """Store what is not stored yet, durably; tells of each record whether it was new: to all, or to ``own``.

        :raise ClosureViolation, DataDamage: for a bad node; what stands before it is stored.
        """
        if own is None:
            return self._store(records)
        own.check_nodes(records)
        ids = [record.id for record in records]
        new = _first_of(own.strangers(ids), ids)
        self._store(records)
        own.add(ids)
        return new

    def _store(self, records: Sequence[Record]) -> list[bool]:
        with self._append:
            ids = [record.id for record in records]
            new = _first_of(self.session.missing(ids), ids)
            try:
                self.session.send([record for record, is_new in zip(records, new, strict=True) if is_new])
            finally:
                self._stored += 1
                mine = self._stored
        self._flush(mine)
        return new

    def _flush(self, mine: int) -> None:
        """Many wait for one flush: whoever comes while another one is under way is covered by the next."""
        with self._durable:
            if self._flushed < mine:
                reached = self._stored
                self.session.flush()
                self._flushed = reached


@dataclass(slots=True)
class _Reading:
    stack: contextlib.ExitStack
    snapshot: Snapshot
    heard_s: float
    own: OwnBlobs | None = None


class LiveSessions:
    """The sessions and readings of one repository. Safe from several threads."""

    def __init__(self, repository: Repository, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._repository = repository
        self._now_s = now_s
        self._lock = threading.Lock()
        self._attaching = threading.Lock()
        """Held while a session is opened or resumed, so that the same request made twice at once does it once."""
        self._owning = threading.Lock()
        """Held while the blobs of a VM are collected, which takes a while: once is enough."""
        self._sessions: dict[SessionId, LiveSession] = {}
        self._committed: OrderedDict[tuple[SessionId, str], Snapshot] = OrderedDict()
        self._readings: dict[str, _Reading] = {}

    # --- sessions

    def open(self, namespace: Namespace, vm: VmName, attachment: str, owner: str) -> SessionId:
        """A new session; the same one if this client opened it already, for an answer may get lost."""
        with self._attaching:
            with self._lock:
                for live in self._sessions.values():
                    if live.attachment == attachment:
                        return live.session.id
            self._require_room(len(self._sessions), MAX_LIVE_SESSIONS, "sessions")
            self._repository.require_writable()
            return self._add(self._repository.sessions.open(namespace, vm), namespace, vm, attachment, owner)

    def resume(
        self,
        session_id: SessionId,
        attachment: str,
        owner: str,
        allowed: Callable[[Namespace, VmName], None],
        *,
        take_over: bool = False,
    ) -> SessionId:
        """Attach a client to a session that is parked, or that it is attached to already; with ``take_over``, also in
        the place of another client with the same token.

        ``allowed`` raises when the client may not have a session of this VM.

        :raise SessionBusy: when another client is attached. :raise SessionNotFound: when there is none.
        """
        namespace, vm = self.owner(session_id)
        allowed(namespace, vm)
        with self._attaching:
            with self._lock:
                live = self._sessions.get(session_id)
                if live is not None:
                    if take_over and owner == live.owner:
                        live.hand_over(attachment, self._repository.clock.now_ms())
                    live.require(attachment)
                    live.heard_s = self._now_s()
                    return session_id
            self._require_room(len(self._sessions), MAX_LIVE_SESSIONS, "sessions")
            return self._add(self._repository.sessions.resume(session_id), namespace, vm, attachment, owner)

    @contextlib.contextmanager
    def using(self, session_id: SessionId, attachment: str) -> Iterator[LiveSession]:
        """The session, for one request of the client that is attached to it.

        :raise SessionDetached: when nobody is attached to it, but somebody could be.
        :raise SessionNotFound: when there is none. :raise SessionBusy: when another client is attached.
        """
        with self._lock:
            live = self._sessions.get(session_id)
            if live is not None:
                live.require(attachment)
                live.busy += 1
        if live is None:
            self.owner(session_id)
            raise SessionDetached(f"nobody is attached to session {session_id}")
        try:
            yield live
        finally:
            with self._lock:
                live.busy -= 1
                live.heard_s = self._now_s()

    def commit(self, session_id: SessionId, attachment: str, prepare: Callable[[LiveSession], Manifest]) -> Snapshot:
        """Commit the manifest that ``prepare`` gives, or tell again what was committed."""
        with self._lock:
            done = self._committed.get((session_id, attachment))
        if done is not None:
            return done
        with self.using(session_id, attachment) as live:
            snapshot = live.session.commit(prepare(live))
            with self._lock:
                self._sessions.pop(session_id, None)
                self._committed[session_id, attachment] = snapshot
                while len(self._committed) > _REMEMBERED_COMMITS:
                    self._committed.popitem(last=False)
        return snapshot

    def end(self, session_id: SessionId, attachment: str, *, abort: bool) -> None:
        """Abort or park."""
        with self.using(session_id, attachment) as live:
            with self._lock:
                self._sessions.pop(session_id, None)
            if abort:
                live.session.abort()
            else:
                live.session.park()

    def own(self, live: LiveSession) -> OwnBlobs:
        """The blobs of the session's VM."""
        with self._owning:
            if live.own is None:
                snapshots, _ = self._repository.catalog.survey(live.namespace, live.vm)
                live.own = own_blobs(self._repository, snapshots)
            return live.own

    def own_of_readings(self, reading_ids: Iterable[str]) -> list[OwnBlobs]:
        """The blobs of the snapshots that are read; readings that are none count for nothing."""
        found: list[OwnBlobs] = []
        for reading_id in reading_ids:
            with self._lock:
                item = self._readings.get(reading_id)
            with self._owning:
                if item is not None:
                    item.own = item.own or own_blobs(self._repository, [item.snapshot])
                    found.append(item.own)
        return found

    def owner(self, session_id: SessionId) -> tuple[Namespace, VmName]:
        """:raise SessionNotFound: when there is no such session."""
        with self._repository.index.read() as txn:
            row = self._repository.sessions.get(txn, session_id)
        if row is None:
            raise SessionNotFound(f"there is no session {session_id}")
        return row.namespace, row.vm

    def _require_room(self, present: int, most: int, what: str) -> None:
        """Each costs an open file."""
        if present >= most:
            raise ServerBusy(f"there are {present} {what} already")

    def _add(self, session: Session, namespace: Namespace, vm: VmName, attachment: str, owner: str) -> SessionId:
        live = LiveSession(session, attachment, owner, namespace, vm, self._now_s(), self._repository.clock.now_ms())
        with self._lock:
            self._sessions[session.id] = live
        return session.id

    # --- readings

    def goes_on(self, reading_id: str) -> bool:
        """A sign of life of a reading; False when there is none of that id."""
        with self._lock:
            known = self._readings.get(reading_id)
            if known is not None:
                known.heard_s = self._now_s()
            return known is not None

    def read(self, reading_id: str, snapshot: Snapshot) -> None:
        """Keep a snapshot's data for a client.

        :raise SnapshotNotFound: when it was forgotten a moment ago.
        """
        self._require_room(len(self._readings), MAX_READINGS, "readings")
        with contextlib.ExitStack() as stack:
            stack.enter_context(reading(self._repository, snapshot))
            with self._lock:
                if reading_id not in self._readings:
                    self._readings[reading_id] = _Reading(stack.pop_all(), snapshot, self._now_s())

    def end_reading(self, reading_id: str) -> None:
        """Ending what has ended is not an error."""
        with self._lock:
            ended = self._readings.pop(reading_id, None)
        if ended is not None:
            ended.stack.close()

    # --- ends

    def park_silent(self, silence_s: float = SILENCE_S) -> list[SessionId]:
        """Park sessions and end readings whose clients were not heard of for long; returns the sessions."""
        limit_s = self._now_s() - silence_s
        with self._lock:
            silent = [live for live in self._sessions.values() if not live.busy and live.heard_s < limit_s]
            for live in silent:
                del self._sessions[live.session.id]
            ended = [reading_id for reading_id, item in self._readings.items() if item.heard_s < limit_s]
        for live in silent:
            _park(live.session)
        for reading_id in ended:
            self.end_reading(reading_id)
        return [live.session.id for live in silent]

    def close(self) -> None:
        """Park everything: what was acknowledged is there when the clients come back."""
        with self._lock:
            sessions, self._sessions = list(self._sessions.values()), {}
            readings = list(self._readings)
        for live in sessions:
            _park(live.session)
        for reading_id in readings:
            self.end_reading(reading_id)

    def count(self) -> int:
        return len(self._sessions)


def _first_of(wanted: set[BlobId], ids: Sequence[BlobId]) -> list[bool]:
    """Of each id whether it is wanted, and here for the first time."""
    left = set(wanted)
    flags: list[bool] = []
    for blob_id in ids:
        flags.append(blob_id in left)
        left.discard(blob_id)
    return flags


def _park(session: Session) -> None:
    with contextlib.suppress(CasbackupError):
        session.flush()
    session.park()
