"""``HttpPeer``: a repository on a chunk server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from urllib.parse import urlencode

from casbackup.codec.codec import Codec, codec_without_key
from casbackup.errors import CasbackupError, ManifestDamaged, ServerProtocolError, ServerUnreachable
from casbackup.ids import BlobId, DiskName, Namespace, SessionId, SnapshotId, VmName
from casbackup.limits import MAX_FORGET
from casbackup.peer.http.address import Address
from casbackup.peer.http.diffs import read_diff
from casbackup.peer.http.heartbeat import Heartbeat
from casbackup.peer.http.patience import PATIENCE_S
from casbackup.peer.http.repository import RemoteRepository
from casbackup.peer.http.session import HttpSession, new_attachment
from casbackup.peer.http.transport import ANONYMOUS, Credentials, Transport
from casbackup.peer.usage import UsageReport, usage_from_map
from casbackup.repository.catalog import Snapshot
from casbackup.spec.config import RepositoryConfig
from casbackup.spec.manifest import encode_manifest
from casbackup.spec.wire import READING_HEADER, FrameParser, pack_ids
from casbackup.store.blobstore import Fetched
from casbackup.tree.diff import Range
from casbackup.workers import worker_count

_FETCH_IDS = 1024
"""Ids of one request: the chunks of about ten segments."""
_READ_BYTES = 512 * 1024
_WAITING = 1
"""Threads of a job that wait for the server while as many as there are processors compute.."""


class HttpPeer:
    """Implements ``Peer``. Use as a context manager, or call ``close``."""

    def __init__(
        self, address: Address, credentials: Credentials = ANONYMOUS, *, patience_s: float = PATIENCE_S
    ) -> None:
        self._transport = Transport(address, credentials, patience_s=patience_s)
        self._remote = RemoteRepository(self._transport, address.repository)
        self._heartbeat = Heartbeat()
        self._config: RepositoryConfig | None = None
        self._readings: list[str] = []

    def __enter__(self) -> HttpPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def give_up(self, within_s: float = 0.0) -> None:
        """Try nothing again from now on, and have what is under way end within this time: somebody wants to leave.

        From any thread, and without waiting.
        """
        self._transport.give_up(within_s)

    @property
    def config(self) -> RepositoryConfig:
        if self._config is None:
            self._config = self._remote.config()
        return self._config

    @property
    def codec(self) -> Codec:
        return codec_without_key(self.config.key_fingerprint)

    @property
    def workers(self) -> int:
        return worker_count() + _WAITING

    def open_session(self, namespace: Namespace, vm: VmName) -> HttpSession:
        attachment = new_attachment()
        asked = {"namespace": namespace, "vm": vm, "attachment": attachment}
        return self._session(self._remote.ask("/sessions", asked), attachment)

    def resume_session(self, session: SessionId) -> HttpSession:
        attachment = new_attachment()
        answer = self._remote.ask(f"/sessions/{session}/resume", {"attachment": attachment, "take_over": True})
        return self._session(answer, attachment)

    def snapshots(self, namespace: Namespace | None = None, vm: VmName | None = None) -> list[Snapshot]:
        found, damaged = self.survey(namespace, vm)
        if damaged:
            raise damaged[0]
        return found

    def survey(
        self, namespace: Namespace | None = None, vm: VmName | None = None
    ) -> tuple[list[Snapshot], list[ManifestDamaged]]:
        return self._remote.survey(namespace, vm)

    def find(self, reference: str, namespace: Namespace) -> Snapshot:
        return self._remote.find(reference, namespace)

    def manifest(self, snapshot: Snapshot) -> bytes:
        data, snapshot_id = encode_manifest(snapshot.manifest)
        return data if snapshot_id == snapshot.id else self._remote.manifest(snapshot.id)

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        for start in range(0, len(ids), _FETCH_IDS):
            yield from self._fetch(ids[start : start + _FETCH_IDS])

    def differing(self, old: Snapshot, new: Snapshot, disk: DiskName) -> list[Range]:
        """Found by the server: a round trip, and some bytes for each range."""
        query = [("to", new.id), ("disk", disk)]
        path = f"{self._remote.path}/snapshots/{old.id}/diff?{urlencode(query)}"
        return [
            item
            for found in self._transport.patiently(lambda: read_diff(self._transport, path))
            for item in found.ranges
        ]

    @contextlib.contextmanager
    def reading(self, snapshot: Snapshot) -> Iterator[None]:
        reading = new_attachment()
        self._read(reading, snapshot)
        self._readings.append(reading)
        self._heartbeat.add(reading, lambda: self._read(reading, snapshot))
        try:
            yield
        finally:
            self._heartbeat.remove(reading)
            self._readings.remove(reading)
            with contextlib.suppress(CasbackupError):
                self._remote.request("POST", f"/readings/{reading}/end", b"", is_last_word=True)

    def annotate(
        self,
        snapshot: Snapshot,
        *,
        pinned: bool | None = None,
        labels: Sequence[str] | None = None,
        notes: str | None = None,
    ) -> Snapshot:
        changes = {"pinned": pinned, "labels": None if labels is None else list(labels), "notes": notes}
        asked = {"id": snapshot.id, **{key: value for key, value in changes.items() if value is not None}}
        return self._remote.snapshot(self._remote.ask_binary("/manifests/annotate", asked))

    def remove(self, snapshots: Sequence[Snapshot]) -> None:
        ids = [snapshot.id for snapshot in snapshots]
        for start in range(0, len(ids), MAX_FORGET):
            self._remote.ask("/manifests/forget", {"ids": ids[start : start + MAX_FORGET]})

    def usage(self, groups: Sequence[Sequence[Snapshot]]) -> UsageReport:
        ids: list[list[SnapshotId]] = [[snapshot.id for snapshot in group] for group in groups]
        return usage_from_map(self._remote.ask("/usage", {"groups": ids}))

    def stored_key(self) -> bytes | None:
        return self._remote.stored_key()

    def store_key(self, data: bytes, *, replace: bool) -> None:
        self._remote.store_key(data, replace=replace)

    def _session(self, answer: dict[str, object], attachment: str) -> HttpSession:
        session = answer.get("id")
        if not isinstance(session, str):
            raise ServerProtocolError("the server opened a session without an id")
        return HttpSession(self._remote, self._heartbeat, SessionId(session), attachment)

    def _read(self, reading: str, snapshot: Snapshot) -> None:
        """Begin a reading, or say that it goes on; a server that was restarted begins it anew."""
        self._remote.ask("/readings", {"id": reading, "snapshot": snapshot.id})

    def _fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        """A connection that breaks, or a server that is restarted, costs the records that were on their way."""
        wanted = dict.fromkeys(ids)
        while wanted:
            broken: ServerUnreachable | None = None
            answer = self._transport.patiently(lambda: self._begin_fetch(list(wanted)))
            try:
                for blob_id, record in answer:
                    if blob_id not in wanted:
                        raise ServerProtocolError("the server sent a record that was not asked for")
                    del wanted[blob_id]
                    yield blob_id, record
            except ServerUnreachable as error:
                broken = error
            if wanted and broken is None:
                raise ServerProtocolError("the server sent fewer records than it was asked for")

    def _begin_fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        """Wait for the beginning of the answer, so that trying again is about that."""
        answer = self._streamed(ids)
        first = next(answer, None)
        return answer if first is None else _chained(first, answer)

    def _streamed(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        headers = {READING_HEADER: ",".join(self._readings)} if self._readings else {}
        parser = FrameParser()
        with self._remote.stream("POST", "/fetch", pack_ids(ids), headers) as response:
            while data := response.read(_READ_BYTES):
                yield from parser.feed(data)
        parser.end()


def _chained(first: Fetched, rest: Iterator[Fetched]) -> Iterator[Fetched]:
    yield first
    yield from rest
