"""Where things are in a repository's folder.

REPO/  config.json            what the repository is
       config.json.backup     the same again
       tokens.json            who may use it over HTTP, if anybody
       keys/<fingerprint>.json   a wrapped copy of the key, if wanted
       migration.json         there only while a migration is not finished
       packs/xx/<id>.pack     the data
       snapshots/<namespace>/vm/<name>/<time>.snap   one manifest a snapshot, and <time>.meta beside it
       index/                 LMDB; can be rebuilt
       locks/                 empty files that are locked
       quarantine/            damaged packs put aside by a repair
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from casbackup.clock import format_time, parse_time
from casbackup.errors import InvalidName, InvalidSize
from casbackup.fs import FileSystem
from casbackup.ids import Namespace, SessionId, VmName, parse_namespace, parse_vm

MANIFEST_SUFFIX = ".snap"
SIDECAR_SUFFIX = ".meta"


class SnapshotKey(NamedTuple):
    """What names a snapshot's files: sorts by namespace, VM, time."""

    namespace: Namespace
    vm: VmName
    time_ms: int


class Layout:
    """Paths of one repository."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.config = os.path.join(self.root, "config.json")
        self.config_backup = self.config + ".backup"
        self.migration = os.path.join(self.root, "migration.json")
        self.keys = os.path.join(self.root, "keys")
        self.packs = os.path.join(self.root, "packs")
        self.snapshots = os.path.join(self.root, "snapshots")
        self.index = os.path.join(self.root, "index")
        self.locks = os.path.join(self.root, "locks")
        self.repository_lock = os.path.join(self.locks, "repository")
        self.maintenance_lock = os.path.join(self.locks, "maintenance")

    def stored_key(self, fingerprint: str) -> str:
        return os.path.join(self.keys, f"{fingerprint}.json")

    def session_lock(self, session: SessionId) -> str:
        return os.path.join(self.locks, f"session-{session}")

    def vm_folder(self, namespace: Namespace, vm: VmName) -> str:
        return os.path.join(self.snapshots, namespace, vm)

    def manifest(self, key: SnapshotKey) -> str:
        return os.path.join(self.vm_folder(key.namespace, key.vm), format_time(key.time_ms) + MANIFEST_SUFFIX)

    def sidecar(self, key: SnapshotKey) -> str:
        return self.manifest(key).removesuffix(MANIFEST_SUFFIX) + SIDECAR_SUFFIX


def snapshot_files(fs: FileSystem, layout: Layout) -> Iterator[tuple[SnapshotKey, bool]]:
    """Every manifest in the folder and whether it has a sidecar. Anything else found there is not listed."""
    yield from _walk(fs, layout.snapshots, "")


def _walk(fs: FileSystem, folder: str, namespace: str) -> Iterator[tuple[SnapshotKey, bool]]:
    for entry in fs.list(folder):
        path = os.path.join(folder, entry.name)
        if not entry.is_folder:
            continue
        if entry.name == "vm" and namespace:
            yield from _vms(fs, path, namespace)
        else:
            yield from _walk(fs, path, f"{namespace}/{entry.name}" if namespace else entry.name)


def _vms(fs: FileSystem, folder: str, namespace: str) -> Iterator[tuple[SnapshotKey, bool]]:
    for entry in fs.list(folder):
        try:
            owner = parse_namespace(namespace), parse_vm(f"vm/{entry.name}")
        except InvalidName:
            continue
        names = {file.name for file in fs.list(os.path.join(folder, entry.name))}
        for name in sorted(names):
            time_ms = _time_of(name)
            if time_ms is not None:
                yield SnapshotKey(*owner, time_ms), name.removesuffix(MANIFEST_SUFFIX) + SIDECAR_SUFFIX in names


def vm_snapshots(fs: FileSystem, layout: Layout, namespace: Namespace, vm: VmName) -> list[SnapshotKey]:
    """The manifests of one VM in the folder, by time."""
    times = [_time_of(file.name) for file in fs.list(layout.vm_folder(namespace, vm))]
    return [SnapshotKey(namespace, vm, time_ms) for time_ms in sorted(t for t in times if t is not None)]


def _time_of(name: str) -> int | None:
    """The time in a manifest's file name; None for other files."""
    stem = name.removesuffix(MANIFEST_SUFFIX)
    if stem == name:
        return None
    try:
        time_ms = parse_time(stem)
    except InvalidSize:
        return None
    return time_ms if format_time(time_ms) == stem else None
