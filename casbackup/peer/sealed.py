"""An encrypted repository as whoever has its key sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from casbackup.codec.codec import Codec, keyed_codec
from casbackup.codec.master_key import MasterKey
from casbackup.codec.sealing import ManifestSeal
from casbackup.errors import CasbackupError, CommitOutdated, KeyMismatch, ManifestDamaged, SnapshotRolledBack
from casbackup.ids import BlobId, DiskName, Namespace, SessionId, VmName
from casbackup.peer.api import Peer, PeerSession
from casbackup.peer.differing import walked_ranges
from casbackup.peer.seen import FORGETFUL, Seen, SeenSnapshots
from casbackup.peer.usage import UsageReport
from casbackup.repository.adoption import Copy
from casbackup.repository.catalog import Snapshot
from casbackup.spec.config import RepositoryConfig
from casbackup.spec.manifest import Manifest, Sidecar, decode_manifest, encode_manifest
from casbackup.spec.record import Record
from casbackup.store.blobstore import Fetched
from casbackup.store.writer import StoredBytes
from casbackup.tree.diff import Range

_COMMIT_TRIES = 8
"""Other clients may back up the same VM, each of their snapshots in a moment."""


class SealedPeer:
    """Implements ``Peer`` above one that has no key: its jobs read and write as if nothing were sealed.

    Manifests are opened, and refused if they were not made by somebody with the key. What this client has seen of each
    VM is remembered in ``seen``: when a VM's newest snapshot is gone and no newer one is there, the latest is not given
    out, and ``warn`` hears of it when the next one is made.
    """

    def __init__(
        self,
        peer: Peer,
        key: MasterKey,
        seen: SeenSnapshots = FORGETFUL,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Does not own ``peer``.

        :raise KeyMismatch: when the repository has another key, or none.
        """
        expected = peer.config.key_fingerprint
        if expected != key.fingerprint:
            raise KeyMismatch(f"the repository needs key {expected or '(none)'}, this is key {key.fingerprint}")
        self._peer = peer
        self._seal = ManifestSeal(key)
        self._seen = seen
        self._warn = warn
        self.codec: Codec = keyed_codec(key)

    @property
    def config(self) -> RepositoryConfig:
        return self._peer.config

    @property
    def workers(self) -> int:
        return self._peer.workers

    def open_session(self, namespace: Namespace, vm: VmName) -> SealedSession:
        return SealedSession(self, self._peer.open_session(namespace, vm))

    def resume_session(self, session: SessionId) -> SealedSession:
        return SealedSession(self, self._peer.resume_session(session))

    def snapshots(self, namespace: Namespace | None = None, vm: VmName | None = None) -> list[Snapshot]:
        found, damaged = self.survey(namespace, vm)
        if damaged:
            raise damaged[0]
        return found

    def survey(
        self, namespace: Namespace | None = None, vm: VmName | None = None
    ) -> tuple[list[Snapshot], list[ManifestDamaged]]:
        stored, damaged = self._peer.survey(namespace, vm)
        found: list[Snapshot] = []
        for snapshot in stored:
            try:
                found.append(self.opened(snapshot))
            except ManifestDamaged as error:
                damaged = [*damaged, error]
        self._note_newest(found)
        return found, damaged

    def find(self, reference: str, namespace: Namespace) -> Snapshot:
        """Like ``Peer.find``.

        :raise SnapshotRolledBack: when the latest is asked for, and one that was newer is gone.
        """
        found = self.opened(self._peer.find(reference, namespace))
        if reference.startswith("vm/") or ":vm/" in reference:
            _, _, selector = reference.partition("@")
            lost = self._lost(found) if selector in ("", "latest") else None
            if lost is not None:
                raise SnapshotRolledBack(_lost_text(found, lost))
        return found

    def manifest(self, snapshot: Snapshot) -> bytes:
        return self._peer.manifest(snapshot)

    def fetch(self, ids: Sequence[BlobId]) -> Iterator[Fetched]:
        return self._peer.fetch(ids)

    def differing(self, old: Snapshot, new: Snapshot, disk: DiskName) -> list[Range]:
        """Found here: a server without the key is not relied on for that."""
        return list(walked_ranges(self, old, new, disk))

    def reading(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        return self._peer.reading(snapshot)

    def annotate(
        self,
        snapshot: Snapshot,
        *,
        pinned: bool | None = None,
        labels: Sequence[str] | None = None,
        notes: str | None = None,
    ) -> Snapshot:
        sealed = None if notes is None else self._seal.seal_notes(snapshot.id, notes)
        changed = self._peer.annotate(snapshot, pinned=pinned, labels=labels, notes=sealed)
        return replace(snapshot, sidecar=self._opened_sidecar(changed))

    def remove(self, snapshots: Sequence[Snapshot]) -> None:
        self._peer.remove(snapshots)
        for vm in {(s.manifest.namespace, s.manifest.vm) for s in snapshots}:
            seen = self._seen.newest(self.config.repository_id, *vm)
            if seen is not None and any(snapshot.id == seen.id for snapshot in snapshots):
                left = [self.opened(s) for s in self._peer.survey(*vm)[0]]
                self._remember(*vm, left[-1] if left else None)

    def usage(self, groups: Sequence[Sequence[Snapshot]]) -> UsageReport:
        return self._peer.usage(groups)

    def opened(self, stored: Snapshot) -> Snapshot:
        """:raise ManifestForged: when nobody with the key made it."""
        manifest = self._seal.open(stored.manifest, f"the manifest of {stored.reference}")
        return Snapshot(stored.id, manifest, self._opened_sidecar(stored))

    def as_stored(self, manifest: Manifest) -> bytes:
        """A manifest that another repository has otherwise, sealed for ``adopt``."""
        return encode_manifest(self._seal.seal(manifest))[0]

    def commit(self, session: PeerSession, draft: Manifest) -> Snapshot:
        """Number, seal and commit a draft; anew when another client was quicker.

        :raise CommitOutdated: when that goes on.
        """
        for attempt in range(_COMMIT_TRIES):
            stored, _ = self._peer.survey(draft.namespace, draft.vm)
            last = max(stored, key=lambda snapshot: snapshot.manifest.sequence, default=None)
            if attempt == 0:
                self._warn_if_rolled_back(draft, last)
            manifest = replace(
                draft,
                time_ms=draft.time_ms + attempt,
                sequence=last.manifest.sequence + 1 if last else 1,
                parent=last.id if last else None,
            )
            try:
                made = session.commit(self._seal.seal(manifest))
            except CommitOutdated:
                continue
            snapshot = Snapshot(made.id, manifest)
            self._remember(draft.namespace, draft.vm, snapshot)
            return snapshot
        raise CommitOutdated(f"other snapshots of {draft.vm} were made again and again meanwhile")

    def adopt(self, session: PeerSession, manifest: bytes, sidecar: Sidecar) -> Snapshot:
        """Like ``PeerSession.adopt``: the manifest comes as it is stored, the sidecar as it is read."""
        stored, snapshot_id = decode_manifest(manifest, "to be copied")
        self._seal.open(stored, "the manifest to be copied")
        if sidecar.notes is not None:
            sidecar = replace(sidecar, notes=self._seal.seal_notes(snapshot_id, sidecar.notes))
        return self.opened(session.adopt(manifest, sidecar))

    def _opened_sidecar(self, snapshot: Snapshot) -> Sidecar:
        notes = snapshot.sidecar.notes
        if notes is None:
            return snapshot.sidecar
        return replace(snapshot.sidecar, notes=self._seal.open_notes(snapshot.id, notes))

    # --- what was seen before

    def _note_newest(self, snapshots: Sequence[Snapshot]) -> None:
        """``snapshots``: as ``survey`` orders them, so the newest of a VM is the last."""
        for snapshot in {(s.manifest.namespace, s.manifest.vm): s for s in snapshots}.values():
            seen = self._seen.newest(self.config.repository_id, snapshot.manifest.namespace, snapshot.manifest.vm)
            if seen is None or snapshot.manifest.sequence > seen.sequence:
                self._remember(snapshot.manifest.namespace, snapshot.manifest.vm, snapshot)

    def _remember(self, namespace: Namespace, vm: VmName, snapshot: Snapshot | None) -> None:
        newest = None if snapshot is None else Seen(snapshot.manifest.sequence, snapshot.id)
        self._seen.note(self.config.repository_id, namespace, vm, newest)

    def _lost(self, latest: Snapshot) -> Seen | None:
        """What was seen before and should be the latest, or before it, but is not there."""
        seen = self._seen.newest(self.config.repository_id, latest.manifest.namespace, latest.manifest.vm)
        if seen is None or seen.id == latest.id or latest.manifest.sequence > seen.sequence:
            return None
        return seen

    def _warn_if_rolled_back(self, draft: Manifest, last: Snapshot | None) -> None:
        seen = self._seen.newest(self.config.repository_id, draft.namespace, draft.vm)
        if last is None and seen is not None:
            self._warn(
                f"all snapshots of {draft.vm} are gone; this client has seen number {seen.sequence}, {seen.id[:16]}"
            )
        elif last is not None and (lost := self._lost(last)) is not None:
            self._warn(_lost_text(last, lost))


class SealedSession:
    """Implements ``PeerSession`` above one that has no key: what is sent has been sealed by the codec."""

    def __init__(self, peer: SealedPeer, session: PeerSession) -> None:
        self._peer = peer
        self._session = session

    @property
    def id(self) -> SessionId:
        return self._session.id

    def missing(self, ids: Sequence[BlobId]) -> set[BlobId]:
        return self._session.missing(ids)

    def missing_leaf(self, leaf: BlobId, chunks: Sequence[BlobId]) -> set[BlobId]:
        return self._session.missing_leaf(leaf, chunks)

    def send(self, records: Sequence[Record]) -> StoredBytes:
        return self._session.send(records)

    def send_soon(self, records: Sequence[Record], then: Callable[[StoredBytes], None]) -> None:
        self._session.send_soon(records, then)

    def settle(self) -> None:
        self._session.settle()

    def flush(self) -> None:
        self._session.flush()

    def commit(self, draft: Manifest) -> Snapshot:
        return self._peer.commit(self._session, draft)

    def adopt(self, manifest: bytes, sidecar: Sidecar = Sidecar()) -> Snapshot:  # noqa: B008  it is immutable
        return self._peer.adopt(self._session, manifest, sidecar)

    def adopt_all(self, copies: Sequence[Copy]) -> list[Snapshot | CasbackupError]:
        results = self._session.adopt_all(copies)
        return [self._peer.opened(item) if isinstance(item, Snapshot) else item for item in results]

    def finish(self) -> None:
        self._session.finish()

    def abort(self) -> None:
        self._session.abort()

    def park(self) -> None:
        self._session.park()


def _lost_text(latest: Snapshot, lost: Seen) -> str:
    return (
        f"{latest.reference}, number {latest.manifest.sequence}, is the latest now, but this client has seen number"
        f" {lost.sequence}, {lost.id[:16]}, which is gone"
    )
