"""Where packs live: a small port, and its implementation as a folder. An object store fits the same port."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from casbackup.errors import PackDamaged
from casbackup.fs import Buffer, FileSystem, ReadableFile, WritableFile, translated
from casbackup.ids import PackId, is_pack_id

_SUFFIX = ".pack"
_OPEN_FILES = 128


class PackInfo(NamedTuple):
    pack: PackId
    size_bytes: int


class PackAppender(Protocol):
    """A pack being written, by one thread at a time.

    What was appended can be read once ``sync`` returned, and survives a crash from then on. ``can_continue`` is known
    beforehand and never changes: without it (an object store) ``sync`` ends the pack, and the caller starts another.
    """

    pack: PackId
    can_continue: bool

    def append(self, buffers: Sequence[Buffer]) -> None:
        """Add bytes at the end. After an error the pack's end is unknown: close it and start another."""

    def sync(self) -> None: ...

    def close(self) -> None:
        """Give up the handle; what was synced stays. Closing twice is harmless."""


class PackStorage(Protocol):
    """Packs by id. Ids are chosen by the caller and never reused. Nothing here looks into a pack."""

    def list(self) -> Iterator[PackInfo]:
        """All packs in no particular order. Files that are not packs are not an error and are not listed."""

    def create(self, pack: PackId) -> PackAppender: ...

    def read(self, pack: PackId, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes.

        :raise KeyError: when there is no such pack (it may just have been repacked: look the blob up again).
        :raise PackDamaged: when it ends before.
        """

    def size_bytes(self, pack: PackId) -> int:
        """:raise KeyError: when there is no such pack."""

    def delete(self, pack: PackId) -> None:
        """Deleting what is absent is not an error. Durable on return."""

    def quarantine(self, pack: PackId) -> str:
        """Move the pack out of the way, keeping its bytes for an expert; returns where it went."""

    def foreign(self) -> Iterator[str]:
        """Names of things among the packs that are not packs."""

    def close(self) -> None:
        """Let go of what is kept open for reading; the next call opens it again."""


class FolderPackStorage:
    """``packs/xx/<id>.pack`` below a folder; xx are the id's first two digits."""

    def __init__(self, fs: FileSystem, folder: str) -> None:
        self._fs = fs
        self._folder = folder
        self._open: OrderedDict[PackId, ReadableFile] = OrderedDict()
        self._lock = threading.Lock()

    def list(self) -> Iterator[PackInfo]:
        for shard, name, size in self._files():
            if _is_pack_file(shard, name):
                yield PackInfo(PackId(name.removesuffix(_SUFFIX)), size)

    def foreign(self) -> Iterator[str]:
        for shard, name, _ in self._files():
            if not _is_pack_file(shard, name):
                yield os.path.join(shard, name)

    def create(self, pack: PackId) -> FolderPackAppender:
        path = self._path(pack)
        with translated(f"cannot create a pack in {self._folder}"):
            self._fs.make_folders(os.path.dirname(path))
            return FolderPackAppender(self._fs, path, pack)

    def read(self, pack: PackId, offset: int, length: int) -> bytes:
        data = self._file(pack).read_at(offset, length)
        if len(data) != length:
            raise PackDamaged(f"pack {pack} ends before byte {offset + length}: it is truncated")
        return data

    def size_bytes(self, pack: PackId) -> int:
        try:
            return self._fs.size_bytes(self._path(pack))
        except FileNotFoundError:
            raise KeyError(pack) from None

    def delete(self, pack: PackId) -> None:
        path = self._path(pack)
        with self._lock:
            self._open.pop(pack, None)
        with translated(f"cannot delete pack {pack}"):
            self._fs.remove(path)
            if self._fs.exists(os.path.dirname(path)):
                self._fs.sync_folder(os.path.dirname(path))

    def quarantine(self, pack: PackId) -> str:
        folder = os.path.join(os.path.dirname(self._folder), "quarantine")
        target = os.path.join(folder, pack + _SUFFIX)
        with self._lock:
            self._open.pop(pack, None)
        with translated(f"cannot move pack {pack} to {folder}"):
            self._fs.make_folders(folder)
            self._fs.rename(self._path(pack), target)
            self._fs.sync_folder(folder)
            self._fs.sync_folder(os.path.dirname(self._path(pack)))
        return target

    def close(self) -> None:
        """Forget all open files."""
        with self._lock:
            self._open.clear()

    def _file(self, pack: PackId) -> ReadableFile:
        """An open pack. A file pushed out of the cache closes when its last reader lets go of it."""
        with self._lock:
            file = self._open.get(pack)
            if file is not None:
                self._open.move_to_end(pack)
                return file
        try:
            file = self._fs.open(self._path(pack))
        except FileNotFoundError:
            raise KeyError(pack) from None
        with self._lock:
            self._open[pack] = file
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return file

    def _path(self, pack: PackId) -> str:
        return os.path.join(self._folder, pack[:2], pack + _SUFFIX)

    def _files(self) -> Iterator[tuple[str, str, int]]:
        for shard in self._fs.list(self._folder):
            if not shard.is_folder:
                yield "", shard.name, shard.size_bytes
                continue
            for entry in self._fs.list(os.path.join(self._folder, shard.name)):
                yield shard.name, entry.name, entry.size_bytes


class FolderPackAppender:
    """A pack file, created at once; its name becomes durable with the first ``sync``."""

    can_continue = True

    def __init__(self, fs: FileSystem, path: str, pack: PackId) -> None:
        self.pack = pack
        self._fs = fs
        self._folder = os.path.dirname(path)
        self._file: WritableFile = fs.create(path)
        self._name_durable = False

    def append(self, buffers: Sequence[Buffer]) -> None:
        with translated(f"cannot write to pack {self.pack}"):
            self._file.write(buffers)

    def sync(self) -> None:
        with translated(f"cannot write to pack {self.pack}"):
            self._file.sync()
            if not self._name_durable:
                self._fs.sync_folder(self._folder)
                self._name_durable = True

    def close(self) -> None:
        self._file.close()


def _is_pack_file(shard: str, name: str) -> bool:
    stem = name.removesuffix(_SUFFIX)
    return name.endswith(_SUFFIX) and is_pack_id(stem) and stem[:2] == shard
