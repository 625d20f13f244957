"""The snapshots of a repository: listing, finding, pinning and labelling, removing.

Files are the truth; the ``snapshots`` database holds a copy of each manifest so that a listing opens no files, and
so that a damaged manifest can be put back. Every listing compares names with the folder, so the copy is never
believed beyond the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from casbackup.clock import format_time, parse_time
from casbackup.errors import (
    CasbackupError,
    InvalidName,
    InvalidSize,
    ManifestDamaged,
    SnapshotAmbiguous,
    SnapshotNotFound,
    SnapshotPinned,
)
from casbackup.fs import FileSystem, translated, write_durably
from casbackup.ids import DEFAULT_NAMESPACE, Namespace, SnapshotId, VmName, parse_namespace, parse_vm
from casbackup.repository.layout import Layout, SnapshotKey, snapshot_files, vm_snapshots
from casbackup.spec.manifest import (
    Manifest,
    Sidecar,
    decode_manifest,
    decode_sidecar,
    encode_manifest,
    encode_sidecar,
)
from casbackup.store.index import Index, Transaction

_HEX = set("0123456789abcdef")
_SHORTEST_ID = 4
_UNCHANGED = Sidecar()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A committed snapshot: its manifest, its id, and what was changed about it later."""

    id: SnapshotId
    manifest: Manifest
    sidecar: Sidecar = _UNCHANGED

    @property
    def key(self) -> SnapshotKey:
        return SnapshotKey(self.manifest.namespace, self.manifest.vm, self.manifest.time_ms)

    @property
    def pinned(self) -> bool:
        return self.sidecar.pinned

    @property
    def labels(self) -> tuple[str, ...]:
        return self.manifest.labels if self.sidecar.labels is None else self.sidecar.labels

    @property
    def notes(self) -> str:
        return self.manifest.notes if self.sidecar.notes is None else self.sidecar.notes

    @property
    def reference(self) -> str:
        """``vm/100@2026-11-22T20:00:00.123Z``; with ``namespace:`` in front outside the default one."""
        short = f"{self.manifest.vm}@{format_time(self.manifest.time_ms)}"
        return short if self.manifest.namespace == DEFAULT_NAMESPACE else f"{self.manifest.namespace}:{short}"


class Catalog:
    """Reads from any thread; changes are serialised by the index's write transaction or are single renames."""

    def __init__(self, fs: FileSystem, layout: Layout, index: Index) -> None:
        self._fs = fs
        self._layout = layout
        self._index = index

    def all(self, namespace: Namespace | None = None, vm: VmName | None = None) -> list[Snapshot]:
        """Snapshots in order of namespace, VM and sequence.

        :raise ManifestDamaged: when a manifest that matches is damaged and the index has no copy of it.
        """
        snapshots, damaged = self.survey(namespace, vm)
        if damaged:
            raise damaged[0]
        return snapshots

    def survey(
        self, namespace: Namespace | None = None, vm: VmName | None = None
    ) -> tuple[list[Snapshot], list[ManifestDamaged]]:
        """Like ``all``, but gives what is wrong beside what is right."""
        keys = [
            (key, has_sidecar)
            for key, has_sidecar in snapshot_files(self._fs, self._layout)
            if (namespace is None or key.namespace == namespace) and (vm is None or key.vm == vm)
        ]
        with self._index.read() as txn:
            copies = {key: read_copy(txn, self._index, key) for key, _ in keys}
        found: list[Snapshot] = []
        damaged: list[ManifestDamaged] = []
        fresh: list[tuple[SnapshotKey, bytes]] = []
        for key, has_sidecar in keys:
            data = copies[key]
            try:
                if data is None:
                    data = self._read_manifest(key)
                    if data is None:
                        continue
                found.append(self._snapshot(key, data, has_sidecar))
                if copies[key] is None:
                    fresh.append((key, data))
            except ManifestDamaged as error:
                damaged.append(error)
        self._remember(fresh)
        found.sort(key=lambda s: (s.manifest.namespace, s.manifest.vm, s.manifest.sequence, s.manifest.time_ms))
        return found, damaged

    def last_in(self, txn: Transaction, namespace: Namespace, vm: VmName) -> Snapshot | None:
        """The VM's snapshot with the highest sequence, looked up within a transaction; damaged ones are passed over."""
        last: Snapshot | None = None
        for key in vm_snapshots(self._fs, self._layout, namespace, vm):
            data = read_copy(txn, self._index, key) or self._read_manifest(key)
            with contextlib.suppress(ManifestDamaged):
                found = None if data is None else self._snapshot(key, data, has_sidecar=False)
                if found and (last is None or found.manifest.sequence > last.manifest.sequence):
                    last = found
        return last

    def find(self, reference: str, namespace: Namespace = DEFAULT_NAMESPACE) -> Snapshot:
        """The snapshot that a user means.

        ``vm/100`` or ``vm/100@latest`` (highest sequence), ``vm/100@TIME`` (a time or its beginning),
        ``vm/100@ID``, or an id's first four or more digits alone; ``acme/prod:vm/100`` names another namespace.

        :raise SnapshotNotFound: when none matches. :raise SnapshotAmbiguous: when several match. :raise
        ManifestDamaged: when the latest is asked for and a manifest of the VM is damaged.
        """
        prefix, colon, rest = reference.partition(":vm/")
        if colon:
            namespace, reference = parse_namespace(prefix), "vm/" + rest
        if not reference.startswith("vm/"):
            return self._find_by_id(reference)
        name, _, selector = reference.partition("@")
        candidates, damaged = self.survey(namespace, parse_vm(name))
        if selector in ("", "latest"):
            if damaged:
                raise damaged[0]  # it may be the latest: an older one must not pass for it
            if candidates:
                return candidates[-1]
        if not candidates:
            raise SnapshotNotFound(f"there is no snapshot of {name} in namespace {namespace}")
        matching = [s for s in candidates if _matches(s, selector)]
        return _only(matching, f"{name}@{selector}")

    def get(self, key: SnapshotKey) -> Snapshot | None:
        """The snapshot with this key as its file says now."""
        data = self._read_manifest(key)
        return None if data is None else self._snapshot(key, data, self._fs.exists(self._layout.sidecar(key)))

    def manifest(self, snapshot: Snapshot) -> bytes:
        """The bytes of its manifest, whose BLAKE3 is its id.

        :raise SnapshotNotFound: when it was forgotten and its bytes cannot be told.
        """
        data, snapshot_id = encode_manifest(snapshot.manifest)
        if snapshot_id == snapshot.id:
            return data
        file = self._read_manifest(snapshot.key)  # written by another version, with keys that this one ignores
        if file is None or decode_manifest(file, str(snapshot.key))[1] != snapshot.id:
            raise SnapshotNotFound(f"{snapshot.reference} was forgotten a moment ago")
        return file

    def annotate(
        self,
        snapshot: Snapshot,
        *,
        pinned: bool | None = None,
        labels: Sequence[str] | None = None,
        notes: str | None = None,
    ) -> Snapshot:
        """Change what may change about a snapshot; None leaves a part as it is. Durable on return.

        The index's write transaction serves as a lock: of two changes at once neither is lost.
        """
        path = self._layout.sidecar(snapshot.key)

        def change(_txn: Transaction) -> Sidecar:
            sidecar = self._read_sidecar(snapshot.key)
            if pinned is not None:
                sidecar = replace(sidecar, pinned=pinned)
            if labels is not None:
                sidecar = replace(sidecar, labels=tuple(labels))
            if notes is not None:
                sidecar = replace(sidecar, notes=notes)
            with translated(f"cannot change {snapshot.reference}"):
                write_durably(self._fs, path, encode_sidecar(sidecar), replace=True)
            return sidecar

        return replace(snapshot, sidecar=self._index.write(change))

    def remove(self, snapshots: Iterable[Snapshot]) -> None:
        """Forget snapshots: manifest first (from then on it is gone), then sidecar, then the index's copy.

        :raise SnapshotPinned: when one is pinned now, whatever its object says; none is removed then.
        """
        removed = list(snapshots)
        for snapshot in removed:
            if self._read_sidecar(snapshot.key).pinned:
                raise SnapshotPinned(f"{snapshot.reference} is pinned")
        folders = set()
        for snapshot in removed:
            with translated(f"cannot remove {snapshot.reference}"):
                self._fs.remove(self._layout.manifest(snapshot.key))
                self._fs.remove(self._layout.sidecar(snapshot.key))
                folders.add(self._layout.vm_folder(snapshot.manifest.namespace, snapshot.manifest.vm))
        for folder in folders:
            self._fs.sync_folder(folder)

        def drop(txn: Transaction) -> None:
            for snapshot in removed:
                txn.delete(_database_key(snapshot.key), db=self._index.snapshots)

        self._index.write(drop)

    def finish_removals(self) -> None:
        """Make removals durable that were cut short (or whose ``remove`` is still under way in another process).

        gc must do this before it deletes what those snapshots needed: a manifest that comes back after a power
        failure would miss it. Such removals are told by their copy in the index, which goes last.
        """
        with self._index.read() as txn, txn.cursor(db=self._index.snapshots) as cursor:
            copied = [_snapshot_key(bytes(name)) for name, _ in cursor]
        removed = set(copied) - {key for key, _ in snapshot_files(self._fs, self._layout)}
        for folder in sorted({self._layout.vm_folder(key.namespace, key.vm) for key in removed}):
            if self._fs.exists(folder):
                self._fs.sync_folder(folder)

        def drop(txn: Transaction) -> None:
            for key in removed:
                txn.delete(_database_key(key), db=self._index.snapshots)

        if removed:
            self._index.write(drop)

    def put_back(self, key: SnapshotKey) -> bool:
        """Rewrite a damaged manifest file from the index's copy; False when there is none.

        A damaged sidecar becomes one that only pins the snapshot: labels and notes in it are lost.
        """
        try:
            self._decoded_sidecar(key)
        except ManifestDamaged:
            write_durably(self._fs, self._layout.sidecar(key), encode_sidecar(Sidecar(pinned=True)), replace=True)
        with self._index.read() as txn:
            data = read_copy(txn, self._index, key)
        if data is None:
            return False
        decode_manifest(data, str(key))
        write_durably(self._fs, self._layout.manifest(key), data, replace=True)
        return True

    def verify_files(self) -> list[tuple[SnapshotKey, ManifestDamaged]]:
        """Snapshots whose files (manifest or sidecar, not the index's copy) are damaged or lie in the wrong place."""
        damaged: list[tuple[SnapshotKey, ManifestDamaged]] = []
        for key, has_sidecar in snapshot_files(self._fs, self._layout):
            data = self._read_manifest(key)
            if data is None:
                continue
            try:
                self._snapshot(key, data, has_sidecar)
                self._decoded_sidecar(key)
            except ManifestDamaged as error:
                damaged.append((key, error))
        return damaged

    def _find_by_id(self, prefix: str) -> Snapshot:
        if len(prefix) < _SHORTEST_ID or not set(prefix) <= _HEX:
            raise InvalidName(f"{prefix!r} is neither a VM (vm/100) nor the beginning of a snapshot id")
        return _only([s for s in self.survey()[0] if s.id.startswith(prefix)], prefix)

    def _read_manifest(self, key: SnapshotKey) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return self._fs.read(self._layout.manifest(key))
        return None

    def _snapshot(self, key: SnapshotKey, data: bytes, has_sidecar: bool) -> Snapshot:
        path = self._layout.manifest(key)
        manifest, snapshot_id = decode_manifest(data, path)
        if (manifest.namespace, manifest.vm, manifest.time_ms) != key:
            raise ManifestDamaged(f"manifest {path} is that of {manifest.vm}@{format_time(manifest.time_ms)}")
        return Snapshot(snapshot_id, manifest, self._read_sidecar(key) if has_sidecar else Sidecar())

    def _read_sidecar(self, key: SnapshotKey) -> Sidecar:
        """The sidecar; none if there is none. A damaged one counts as a pin: what it said may have been one. A check
        reports it.
        """
        try:
            return self._decoded_sidecar(key)
        except ManifestDamaged:
            return Sidecar(pinned=True)

    def _decoded_sidecar(self, key: SnapshotKey) -> Sidecar:
        path = self._layout.sidecar(key)
        with contextlib.suppress(FileNotFoundError):
            return decode_sidecar(self._fs.read(path), path)
        return Sidecar()

    def _remember(self, manifests: Sequence[tuple[SnapshotKey, bytes]]) -> None:
        """Copy manifests into the index; a listing does not fail for lack of room or rights to do that."""
        if not manifests or self._index.read_only:
            return

        def put(txn: Transaction) -> None:
            for key, data in manifests:
                store_copy(txn, self._index, key, data)

        with contextlib.suppress(CasbackupError):
            self._index.write(put)


def read_copy(txn: Transaction, index: Index, key: SnapshotKey) -> bytes | None:
    """The index's copy of a manifest."""
    value = txn.get(_database_key(key), db=index.snapshots)
    return None if value is None else bytes(value)


def store_copy(txn: Transaction, index: Index, key: SnapshotKey, manifest: bytes) -> None:
    """Put the index's copy of a manifest."""
    txn.put(_database_key(key), manifest, db=index.snapshots)


def _database_key(key: SnapshotKey) -> bytes:
    return f"{key.namespace}\0{key.vm}\0{format_time(key.time_ms)}".encode()


def _snapshot_key(name: bytes) -> SnapshotKey:
    namespace, vm, stamp = name.decode().split("\0")
    return SnapshotKey(Namespace(namespace), VmName(vm), parse_time(stamp))


def _matches(snapshot: Snapshot, selector: str) -> bool:
    stamp = format_time(snapshot.manifest.time_ms)
    if len(selector) >= _SHORTEST_ID and snapshot.id.startswith(selector):
        return True
    if stamp.startswith(selector.removesuffix("Z")):
        return True
    with contextlib.suppress(InvalidSize):
        moment = parse_time(selector)
        return moment == snapshot.manifest.time_ms or (
            moment % 1000 == 0 and moment // 1000 == snapshot.manifest.time_ms // 1000
        )
    return False


def _only(matching: Sequence[Snapshot], what: str) -> Snapshot:
    if not matching:
        raise SnapshotNotFound(f"no snapshot matches {what}")
    if len(matching) > 1:
        some = ", ".join(f"{s.reference} ({s.id[:8]})" for s in matching[:4])
        raise SnapshotAmbiguous(f"{what} matches {len(matching)} snapshots: {some}")
    return matching[0]
