"""Snapshots as folders and files: ``scsi0.raw`` for each disk, ``vmstate.bin`` for the memory, and the configs, in a
folder of the snapshot's time, in one of its VM, in one of its namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from casbackup.clock import format_time
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import ConfigRecord, DiskRecord
from casbackup_client.targets import STATE_SUFFIX

_SUFFIX = ".raw"


class File(NamedTuple):
    """A disk or a config of a snapshot."""

    snapshot: Snapshot
    content: DiskRecord | ConfigRecord

    @property
    def size_bytes(self) -> int:
        return self.content.size_bytes

    @property
    def time_ms(self) -> int:
        return self.snapshot.manifest.time_ms


class Folder:
    """Names, and what they stand for. ``time_ms``: that of the latest snapshot in it; None if there is none."""

    def __init__(self) -> None:
        self.entries: dict[str, File | Folder] = {}
        self.time_ms: int | None = None

    def find(self, path: str) -> File | Folder | None:
        """``path`` begins with a slash, which alone is the folder itself."""
        found: File | Folder | None = self
        for part in path.split("/"):
            if part:
                found = found.entries.get(part) if isinstance(found, Folder) else None
        return found

    def folder(self, names: Iterable[str], time_ms: int) -> Folder:
        """A folder in this one, made if need be, for a snapshot of that time."""
        here = self
        here._touch(time_ms)
        for name in names:
            inner = here.entries.setdefault(name, Folder())
            assert isinstance(inner, Folder), "names of VMs, namespaces and times cannot be those of files"
            inner._touch(time_ms)
            here = inner
        return here

    def _touch(self, time_ms: int) -> None:
        self.time_ms = max(self.time_ms or 0, time_ms)


Place = Callable[[Snapshot], Sequence[str]]
"""The folder that a snapshot's files are in, by the names on the way there."""


def alone(_snapshot: Snapshot) -> Sequence[str]:
    """There is no other."""
    return ()


def by_time(snapshot: Snapshot) -> Sequence[str]:
    return (format_time(snapshot.manifest.time_ms),)


def by_vm(snapshot: Snapshot) -> Sequence[str]:
    """``default/vm/100/2026-11-22T20:00:00.123Z``; no namespace has a part that is called ``vm``."""
    manifest = snapshot.manifest
    return (*manifest.namespace.split("/"), *manifest.vm.split("/"), *by_time(snapshot))


def tree_of(snapshots: Iterable[Snapshot], place: Place) -> Folder:
    root = Folder()
    for snapshot in snapshots:
        folder = root.folder(place(snapshot), snapshot.manifest.time_ms)
        for disk in snapshot.manifest.disks:
            folder.entries[disk.name + (STATE_SUFFIX if disk.role else _SUFFIX)] = File(snapshot, disk)
        for config in snapshot.manifest.configs:
            folder.entries[_free(config.name, folder)] = File(snapshot, config)
    return root


def _free(name: str, folder: Folder) -> str:
    """A config may be called like the file of a disk."""
    while name in folder.entries:
        name = f"config-{name}"
    return name
