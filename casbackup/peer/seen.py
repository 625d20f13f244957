"""What a client has seen of encrypted repositories, so that it notices when one is put back to an older state."""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import NamedTuple, Protocol

from casbackup.fs import FileSystem, RealFileSystem, write_durably
from casbackup.ids import Namespace, SnapshotId, VmName


class Seen(NamedTuple):
    """The number and id of a VM's newest snapshot."""

    sequence: int
    id: SnapshotId


class SeenSnapshots(Protocol):
    """Remembers the newest snapshot of each VM of each repository. Losing it loses nothing but the noticing."""

    def newest(self, repository_id: str, namespace: Namespace, vm: VmName) -> Seen | None: ...

    def note(self, repository_id: str, namespace: Namespace, vm: VmName, newest: Seen | None) -> None:
        """None: there is none any more."""


class _Forgetful:
    def newest(self, repository_id: str, namespace: Namespace, vm: VmName) -> Seen | None:
        return None

    def note(self, repository_id: str, namespace: Namespace, vm: VmName, newest: Seen | None) -> None: ...


FORGETFUL = _Forgetful()


class SeenFolder:
    """In a folder: one file a repository, and one of places; JSON, replaced atomically.

    What cannot be read counts as not seen, and what cannot be written is not remembered.
    """

    def __init__(self, folder: str, fs: FileSystem | None = None) -> None:
        self._folder = folder
        self._fs = fs or RealFileSystem()

    def newest(self, repository_id: str, namespace: Namespace, vm: VmName) -> Seen | None:
        found = self._read(self._path(repository_id)).get(f"{namespace}:{vm}")
        match found:
            case [int(sequence), str(snapshot)] if re.fullmatch("[0-9a-f]{64}", snapshot):
                return Seen(sequence, SnapshotId(snapshot))
        return None

    def note(self, repository_id: str, namespace: Namespace, vm: VmName, newest: Seen | None) -> None:
        self._put(self._path(repository_id), f"{namespace}:{vm}", None if newest is None else list(newest))

    def key_at(self, place: str) -> str | None:
        """The fingerprint of the key that the repository at a place (a path, an address) had; None: none is known."""
        found = self._read(self.places).get(place)
        return found if isinstance(found, str) else None

    def note_key_at(self, place: str, fingerprint: str | None) -> None:
        """None: the repository there is not encrypted."""
        self._put(self.places, place, fingerprint)

    @property
    def places(self) -> str:
        """The file that says which key belongs where."""
        return os.path.join(self._folder, "places.json")

    def _put(self, path: str, name: str, value: object) -> None:
        content = self._read(path)
        if content.get(name) == value:
            return
        content[name] = value
        with contextlib.suppress(OSError):
            self._fs.make_folders(self._folder)
            kept = {name: value for name, value in content.items() if value is not None}
            data = json.dumps(kept, indent=1, sort_keys=True).encode() + b"\n"
            write_durably(self._fs, path, data, replace=True)

    def _read(self, path: str) -> dict[str, object]:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self._fs.read(path))
            if isinstance(content, dict):
                return content
        return {}

    def _path(self, repository_id: str) -> str:
        return os.path.join(self._folder, f"{repository_id}.json")
