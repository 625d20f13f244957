"""Making the index anew from packs and manifests, with nothing but the folder.

    1. nobody else may use the repository;
    2. a new index is filled in ``index.rebuild``, a pack a transaction;
    3. the old index is renamed away, the new one into place, the old one deleted.

A crash before 3 leaves the old index, one within it none: run it again. What cannot be rebuilt is lost: parked
sessions (the next backup finds their chunks all the same), and when blobs were verified.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field

from casbackup.codec.codec import codec_without_key
from casbackup.errors import ConfigDamaged, DataDamage, PackDamaged
from casbackup.fs import FileSystem, RealFileSystem, translated, write_durably
from casbackup.ids import ZERO_ID, BlobId
from casbackup.progress import NoProgress, Progress
from casbackup.repository.indextable import read_index
from casbackup.repository.layout import Layout
from casbackup.repository.repository import lock_repository, read_config, read_config_bytes
from casbackup.spec.config import RepositoryConfig, decode_config
from casbackup.spec.indexdb import STATE_SUSPECT, BlobEntry, PackRow, pack_key
from casbackup.spec.node import Inner, decode_node
from casbackup.spec.record import BlobKind, RecordHeader
from casbackup.store.blobstore import BlobStore
from casbackup.store.index import Index, Transaction
from casbackup.store.packfile import has_footer, headers
from casbackup.store.packstorage import FolderPackStorage, PackInfo

_NODES = 2048
"""Tree nodes that are read at once."""


@dataclass(slots=True)
class RebuildReport:
    packs: int = 0
    blobs: int = 0
    notes: list[str] = field(default_factory=list)


def rebuild_index(path: str, progress: Progress | None = None, *, fs: FileSystem | None = None) -> RebuildReport:
    """Rebuild the index of the repository at ``path``; a damaged config.json is first put back from its copy.

    :raise RepositoryBusy: when somebody uses the repository.
    """
    fs, layout, progress = fs or RealFileSystem(), Layout(path), progress or NoProgress()
    report = RebuildReport()
    read_config_bytes(fs, layout)  # is there a repository at all?
    lock = lock_repository(fs, layout, shared=False)
    try:
        config = _config(fs, layout, report)
        with translated(f"cannot rebuild the index of {layout.root}"):
            _fill(fs, layout, config, report, progress)
            _swap(layout)
            _forget_sessions(fs, layout)
    finally:
        if lock is not None:
            lock.release()
    return report


def _config(fs: FileSystem, layout: Layout, report: RebuildReport) -> RepositoryConfig:
    try:
        return read_config(fs, layout)
    except ConfigDamaged:
        copy = fs.read(layout.config_backup) if fs.exists(layout.config_backup) else b""
        config = decode_config(copy, layout.config_backup)
        write_durably(fs, layout.config, copy, replace=True)
        report.notes.append("config.json was damaged and has been put back from config.json.backup")
        return config


def _fill(fs: FileSystem, layout: Layout, config: RepositoryConfig, report: RebuildReport, progress: Progress) -> None:
    folder = layout.index + ".rebuild"
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder, 0o750)
    storage = FolderPackStorage(fs, layout.packs)
    index = Index.create(folder, config.repository_id)
    try:
        packs = sorted(storage.list())
        progress.start("packs", sum(info.size_bytes for info in packs))
        for info in packs:
            _add_pack(index, storage, info, report)
            progress.advance(done=info.size_bytes)
        progress.finish()
        _distrust_incomplete(BlobStore(index, storage, codec_without_key(config.key_fingerprint)))
    finally:
        index.close()


def _distrust_incomplete(store: BlobStore) -> None:
    """Mark as suspect each tree node that lacks something below it.

    Packs keep records that gc has removed from the index until it rewrites them, so a node may have come back whose
    chunks have not. ``missing`` must not vouch for such a node: a backup would leave out what is below it.
    """
    index = store.index
    table = read_index(index)
    nodes = table.ids_where(table.values["kind"] == BlobKind.NODE)
    sound: set[BlobId] = set()
    inner: list[tuple[int, BlobId, list[BlobId]]] = []
    for start in range(0, len(nodes), _NODES):
        leaves: dict[BlobId, list[BlobId]] = {}
        for node, record in store.fetch(nodes[start : start + _NODES]):
            try:
                if isinstance(record, DataDamage):
                    raise record
                decoded = decode_node(store.codec.decode(record))
            except DataDamage:
                continue
            if isinstance(decoded, Inner):
                inner.append((decoded.level, node, decoded.children))
            else:
                leaves[node] = [extent.id for extent in decoded.extents if not extent.is_zero]
        present = store.entries({chunk for chunks in leaves.values() for chunk in chunks}).keys()
        sound.update(node for node, chunks in leaves.items() if present >= set(chunks))
    for _, node, children in sorted(inner, key=lambda item: item[0]):
        if all(child == ZERO_ID or child in sound for child in children):
            sound.add(node)
    suspects = [node for node in nodes if node not in sound]

    entries = store.entries(suspects)

    def change(txn: Transaction) -> None:
        for node in suspects:
            entry = entries[node]
            txn.put(node, entry._replace(state=entry.state | STATE_SUSPECT).encode(), db=index.blobs)

    index.write(change)


def _add_pack(index: Index, storage: FolderPackStorage, info: PackInfo, report: RebuildReport) -> None:
    try:
        sealed = has_footer(storage, info.pack)
        found = list(headers(storage, info.pack))
    except (PackDamaged, OSError) as error:
        report.notes.append(f"pack {info.pack} cannot be read: {error}")
        return
    if not sealed:
        report.notes.append(f"pack {info.pack} has no footer; its {len(found)} sound records were found by a scan")
    row = PackRow(info.pack, 0, sealed, info.size_bytes)

    def change(txn: Transaction) -> int:
        number = index.next_number(txn, "pack")
        txn.put(pack_key(number), row.encode(), db=index.packs)
        return sum(_add_blob(index, txn, number, offset, header) for offset, header in sorted(found, key=_by_id))

    report.blobs += index.write(change)
    report.packs += 1


def _add_blob(index: Index, txn: Transaction, number: int, offset: int, header: RecordHeader) -> bool:
    """The first pack that has a blob keeps it; a copy elsewhere is garbage."""
    entry = BlobEntry(number, offset, header.stored_length, header.plain_length, 0, 0, 0, header.kind, header.flags, 0)
    return txn.put(header.id, entry.encode(), db=index.blobs, overwrite=False)


def _by_id(item: tuple[int, RecordHeader]) -> bytes:
    return item[1].id


def _swap(layout: Layout) -> None:
    old, new = layout.index + ".old", layout.index + ".rebuild"
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(layout.index, old)
    os.rename(new, layout.index)
    descriptor = os.open(layout.root, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


def _forget_sessions(fs: FileSystem, layout: Layout) -> None:
    for entry in fs.list(layout.locks):
        if entry.name.startswith("session-"):
            fs.remove(os.path.join(layout.locks, entry.name))
