"""Taking over a snapshot of another repository as it is: its manifest byte for byte, so that its id is the same.

Its number and parent stay what they were where it was made (``docs/decisions/0011-copies-keep-their-numbers.md``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from casbackup.errors import KeyMismatch, NodeInvalid, SnapshotConflict
from casbackup.fs import translated, write_durably
from casbackup.ids import ZERO_ID
from casbackup.repository.catalog import Snapshot, read_copy, store_copy
from casbackup.repository.layout import SnapshotKey
from casbackup.spec.manifest import DiskRecord, Manifest, Sidecar, encode_sidecar
from casbackup.spec.node import Inner, decode_node
from casbackup.spec.record import BlobKind
from casbackup.store.index import Transaction
from casbackup.tree.builder import level_of

if TYPE_CHECKING:
    from casbackup.repository.repository import Repository


class Copy(NamedTuple):
    """A snapshot of another repository: its manifest's bytes, and what was changed about it later."""

    manifest: bytes
    sidecar: Sidecar = Sidecar()


def clear_the_way(repository: Repository, key: SnapshotKey, manifest: bytes) -> None:
    """Finish the removal of another snapshot of that time, if one was cut short.

    The index still has a copy of it, which a crash after our commit point would show in the place of ours.
    """
    with repository.index.read() as txn:
        copy = read_copy(txn, repository.index, key)
    if copy not in (None, manifest) and not repository.fs.exists(repository.layout.manifest(key)):
        repository.catalog.finish_removals()


def check_form(repository: Repository, manifest: Manifest) -> None:
    """Is it sealed if manifests are sealed here, and only then?

    :raise KeyMismatch: when not.
    """
    if bool(manifest.sealed) != repository.config.encrypted:
        here = f"is encrypted with key {repository.config.key_fingerprint}" if manifest.sealed == b"" else "is not"
        raise KeyMismatch(f"the snapshot {'is' if manifest.sealed else 'is not'} encrypted, this repository {here}")


def check_roots(repository: Repository, manifest: Manifest) -> None:
    """Could its disks be walked? A root of another level, or a chunk in its place, could be by nobody.

    Roots that are not stored are passed over.

    :raise NodeInvalid: when one could not. :raise DataDamage: when one cannot be read.
    """
    for disk in manifest.disks:
        if disk.root != ZERO_ID:
            _check_root(repository, disk)


def write_copy(repository: Repository, txn: Transaction, snapshot: Snapshot, manifest: bytes) -> Snapshot:
    """Write the snapshot's files, within a transaction so that commits are serial; gives it as it is here now.

    :raise SnapshotConflict: when the VM has another snapshot of that time.
    :raise ManifestDamaged: when there is one in its place that cannot be read.
    """
    present = repository.catalog.get(snapshot.key)
    if present is not None and present.id != snapshot.id:
        raise SnapshotConflict(f"there is another {snapshot.reference} already, with the id {present.id[:16]}")
    if present is None:
        with translated(f"cannot write {snapshot.reference}"):
            _write_files(repository, snapshot, manifest)
    store_copy(txn, repository.index, snapshot.key, manifest)
    return present or snapshot


def _write_files(repository: Repository, snapshot: Snapshot, manifest: bytes) -> None:
    """The sidecar comes first: a pinned snapshot is never to be seen without its pin."""
    fs, layout = repository.fs, repository.layout
    fs.make_folders(layout.vm_folder(snapshot.manifest.namespace, snapshot.manifest.vm))
    sidecar = layout.sidecar(snapshot.key)
    if snapshot.sidecar == Sidecar():
        fs.remove(sidecar)  # that of a removal, or of a copying, that was cut short
    else:
        write_durably(fs, sidecar, encode_sidecar(snapshot.sidecar), replace=True)
    write_durably(fs, layout.manifest(snapshot.key), manifest, replace=False)


def _check_root(repository: Repository, disk: DiskRecord) -> None:
    entry = repository.store.entries([disk.root]).get(disk.root)
    if entry is None:
        return
    if entry.kind != BlobKind.NODE:
        raise NodeInvalid(f"the root of disk {disk.name} is no tree node")
    node = decode_node(repository.store.read(disk.root))
    level = node.level if isinstance(node, Inner) else 0
    if level != level_of(disk.size_bytes):
        raise NodeInvalid(f"the root of disk {disk.name} has level {level}, not that of {disk.size_bytes} bytes")
