"""A backup session on a server."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

from casbackup.errors import (
    BlobDamaged,
    CasbackupError,
    ServerProtocolError,
    SessionBusy,
    SessionDetached,
    SessionNotFound,
)
from casbackup.ids import ID_BYTES, BlobId, SessionId
from casbackup.limits import MAX_ADOPTED, MAX_QUESTION_IDS, MAX_REQUEST_BYTES
from casbackup.peer.http.heartbeat import Heartbeat
from casbackup.peer.http.repository import RemoteRepository
from casbackup.peer.http.uploads import Then, Uploads
from casbackup.repository.adoption import Copy
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import Manifest, Sidecar, encode_manifest, encode_sidecar
from casbackup.spec.record import ID_AT, Record
from casbackup.spec.wire import ATTACHMENT_HEADER, encode_snapshot, pack_ids, unpack_flags
from casbackup.store.writer import StoredBytes

_UNCHANGED = Sidecar()
_REATTACHMENTS = 100
"""How often one request is tried again because the server lost sight of the session."""


def new_attachment() -> str:
    """What names this client to the server as the one who is attached to a session."""
    return os.urandom(16).hex()


class HttpSession:
    """Implements ``PeerSession``. Whoever asks about leaves gets all that the VM's last snapshot has told at once,
    megabytes for a large disk; others, such as a sync, do not.
    """

    def __init__(self, remote: RemoteRepository, heartbeat: Heartbeat, session: SessionId, attachment: str) -> None:
        self.id = session
        self._remote = remote
        self._heartbeat = heartbeat
        self._path = f"/sessions/{session}"
        self._attachment = attachment
        self._known: set[BlobId] | None = None
        self._getting_known = threading.Lock()
        self._uploads = Uploads(self._post)
        self._ended = False
        heartbeat.add(self, self._beat)

    def missing(self, ids: Sequence[BlobId]) -> set[BlobId]:
        self._uploads.raise_failure()
        known, held = self._known or (), self._uploads.holds
        asked = [i for i in ids if i not in known and not held(i)]
        found: set[BlobId] = set()
        for start in range(0, len(asked), MAX_QUESTION_IDS):
            found |= self._ask(asked[start : start + MAX_QUESTION_IDS])
        return found

    def missing_leaf(self, leaf: BlobId, chunks: Sequence[BlobId]) -> set[BlobId]:
        if leaf in self._all_known() or self._uploads.holds(leaf):
            return set()
        missing = self.missing([leaf, *chunks])
        return missing if leaf in missing else set()

    def send(self, records: Sequence[Record]) -> StoredBytes:
        return self._uploads.now(records)

    def send_soon(self, records: Sequence[Record], then: Then) -> None:
        self._uploads.add(records, then)

    def settle(self) -> None:
        self._uploads.drain()

    def flush(self) -> None:
        self._uploads.drain()

    def commit(self, draft: Manifest) -> Snapshot:
        self._require_attached()
        self._uploads.drain()
        snapshot = self._commit(draft)
        self._end()
        return snapshot

    def adopt(self, manifest: bytes, sidecar: Sidecar = _UNCHANGED) -> Snapshot:
        (result,) = self.adopt_all([Copy(manifest, sidecar)])
        if isinstance(result, CasbackupError):
            raise result
        return result

    def adopt_all(self, copies: Sequence[Copy]) -> list[Snapshot | CasbackupError]:
        self._require_attached()
        self._uploads.drain()
        results: list[Snapshot | CasbackupError] = []
        for batch in _requests_of(copies):
            results += self._remote.adopted(self._request("POST", "/adopt", b"".join(batch)), len(batch))
            if isinstance(results[-1], CasbackupError):
                break
        return results

    def finish(self) -> None:
        if not self._ended:
            self._uploads.drain()
        self._leave("abort")

    def abort(self) -> None:
        self._leave("abort")

    def park(self) -> None:
        """Where that cannot be said, the server finds it out by the silence."""
        with contextlib.suppress(CasbackupError):
            self._leave("park")

    def _leave(self, how: str) -> None:
        if self._ended:
            return
        self._end()
        try:
            self._once("POST", f"/{how}", b"", is_last_word=how == "park")
        except (SessionNotFound, SessionDetached):
            if how == "abort":
                self._abort_detached()

    def _abort_detached(self) -> None:
        """The server lost sight of it; it may still be there, parked."""
        try:
            self._attach()
            self._once("POST", "/abort", b"")
        except (SessionNotFound, SessionBusy):
            return

    def _end(self) -> None:
        self._ended = True
        self._heartbeat.remove(self)
        self._uploads.close()

    def _require_attached(self) -> None:
        if self._ended:
            raise SessionNotFound(f"session {self.id} has ended")

    def _all_known(self) -> set[BlobId]:
        """What the server says beforehand that it has."""
        if self._known is None:
            with self._getting_known:
                if self._known is None:
                    self._known = set(known_ids(self._request("GET", "/known")))
        return self._known

    def _ask(self, ids: Sequence[BlobId]) -> set[BlobId]:
        flags = unpack_flags(self._request("POST", "/missing", pack_ids(ids)), len(ids))
        return {blob_id for blob_id, missing in zip(ids, flags, strict=True) if missing}

    def _post(self, records: Sequence[Record]) -> list[bool]:
        for record in records:
            if record.header[ID_AT : ID_AT + ID_BYTES] != record.id:
                raise BlobDamaged(f"the record of blob {record.id.hex()[:16]} names another blob")
        body = b"".join([part for record in records for part in (record.header, record.payload)])
        return unpack_flags(self._request("POST", "/records", body), len(records))

    def _commit(self, draft: Manifest) -> Snapshot:
        """An answer may get lost, and the session is over then: look whether the snapshot is there."""
        body, _ = encode_manifest(draft)
        try:
            return self._remote.snapshot(self._request("POST", "/commit", body))
        except SessionNotFound:
            for snapshot in reversed(self._remote.survey(draft.namespace, draft.vm)[0]):
                if _is_commit_of(draft, snapshot.manifest):
                    return snapshot
            raise

    def _beat(self) -> None:
        self._once("POST", "/heartbeat", b"")

    def _request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Attaches anew when the server was restarted: what it stored is there, and is asked for anew."""
        for _ in range(_REATTACHMENTS):
            try:
                return self._once(method, path, body)
            except SessionDetached:
                self._attach()
        raise SessionDetached(f"the server loses sight of session {self.id} again and again")

    def _attach(self) -> None:
        self._known = set()
        self._uploads.forget()
        self._remote.ask(f"{self._path}/resume", {"attachment": self._attachment})

    def _once(self, method: str, path: str, body: bytes | None, *, is_last_word: bool = False) -> bytes:
        headers = {ATTACHMENT_HEADER: self._attachment}
        return self._remote.request(method, self._path + path, body, headers=headers, is_last_word=is_last_word)


def _requests_of(copies: Sequence[Copy]) -> Iterator[list[bytes]]:
    """The frames of each request."""
    batch: list[bytes] = []
    size = 0
    for copy in copies:
        sidecar = b"" if copy.sidecar == _UNCHANGED else encode_sidecar(copy.sidecar)
        frame = encode_snapshot(copy.manifest, sidecar)
        if batch and (len(batch) == MAX_ADOPTED or size + len(frame) > MAX_REQUEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(frame)
        size += len(frame)
    if batch:
        yield batch


def known_ids(body: bytes) -> list[BlobId]:
    if len(body) % ID_BYTES:
        raise ServerProtocolError(f"{len(body)} bytes are no list of ids")
    return [BlobId(body[i : i + ID_BYTES]) for i in range(0, len(body), ID_BYTES)]


def _is_commit_of(draft: Manifest, made: Manifest) -> bool:
    """Is it what became of the draft? The server fills in number and parent, and may set time and host."""
    given = {"sequence": 0, "parent": None, "time_ms": 0, "host": ""}
    return replace(draft, **given) == replace(made, **given)  # type: ignore[arg-type]
