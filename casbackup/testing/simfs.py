"""A file system in memory that loses what a real one may lose, fills up, and fails when it is told to.

One ``SimulatedMachine`` has one disk; each of its processes is a ``SimulatedFileSystem``, which implements
the ``FileSystem`` port. Every operation that changes something has a number and is a place where the
machine can crash (``crash_at``), where the operation can fail (``fail_at``), or where a test can look at
and interfere with everything (``before``). After a crash all operations of all processes raise
``SimulatedCrash`` until ``restart``, which decides by a seed what was lost.

Paths below ``real_folder`` are the operating system's: LMDB's index has to lie there. To LMDB a committed
transaction is durable and an open one is lost, which is what a copy of its file at the time of the crash
gives.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from casbackup.fs import Buffer, FolderEntry, ReadableFile, RealFileSystem
from casbackup.testing.simdisk import Node, SimulatedFile, SimulatedFolder

_GROWING = frozenset({"create", "write", "mkdir", "link", "rename", "lock"})
"""Operations for which a full disk has no room."""


class SimulatedCrash(BaseException):
    """The power went off. Not an ``Exception``: nothing may handle it."""


class Operation(NamedTuple):
    """An operation that changes something; numbers count from 1."""

    number: int
    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.number} {self.name} {self.path}"


class SimulatedMachine:
    """A disk and what befalls it.

    ``before`` is called before each operation and may raise in its place. ``meanwhile`` is called wherever
    other processes may get their turn: before operations and looks at the index, outside its transactions.
    """

    def __init__(self, *, real_folder: str | None = None, capacity_bytes: int | None = None) -> None:
        self.log: list[Operation] = []
        self.before: Callable[[Operation], None] | None = None
        self.meanwhile: Callable[[], None] | None = None
        self.transactions = 0
        self.capacity_bytes = capacity_bytes
        self.real_folder = real_folder
        self.is_off = False
        self.root = SimulatedFolder()
        self.boots = 1
        self.lock = threading.RLock()
        self._crash_at = 0
        self._failures: dict[int, int] = {}
        self._full_from = 0

    def process(self) -> SimulatedFileSystem:
        """A process that starts now."""
        return SimulatedFileSystem(self)

    def crash_at(self, number: int) -> None:
        """Crash in place of the operation with this number; in the middle of it if it is a write."""
        self._crash_at = number

    def fail_at(self, number: int, code: int = errno.EIO) -> None:
        """The operation with this number raises an OSError and has no effect; ``code`` 0: not after all."""
        self._failures[number] = code

    def fill_at(self, number: int) -> None:
        """From the operation with this number on there is no room; 0: there is room again."""
        self._full_from = number

    def power_off(self) -> None:
        self.is_off = True

    def restart(self, seed: int) -> None:
        """After a crash: lose what is not durable, as ``seed`` decides. Processes and locks are gone."""
        with self.lock:
            self.root.forget(seed)
            self._crash_at = self._full_from = 0
            self._failures = {}
            self.before = self.meanwhile = None
            self.transactions = 0
            self.is_off = False
            self.log = []
            self.boots += 1

    def photo(self) -> SimulatedMachine:
        """The same disk in the same state, independent of this one, without locks and scripted failures."""
        other = SimulatedMachine(real_folder=self.real_folder, capacity_bytes=self.capacity_bytes)
        with self.lock:
            other.root = self.root.copy()
        return other

    def used_bytes(self) -> int:
        return sum(file.size_bytes for file in dict.fromkeys(self.root.files()))

    def room_bytes(self) -> int:
        """How much may still be written."""
        return 2**63 if self.capacity_bytes is None else max(0, self.capacity_bytes - self.used_bytes())

    def look(self, what: str) -> None:
        """Something is read that others may change: let them, if it was so arranged."""
        if self.is_off:
            raise SimulatedCrash(what)
        if self.meanwhile is not None and not self.transactions:
            self.meanwhile()

    def begin(self, name: str, path: str) -> None:
        """Number an operation, and let happen what was arranged to happen."""
        self.look(name)
        operation = Operation(len(self.log) + 1, name, path)
        self.log.append(operation)
        if self.before is not None:
            self.before(operation)
        if operation.number == self._crash_at:
            self.power_off()
            raise SimulatedCrash(str(operation))
        code = self._failures.get(operation.number)
        if self._full_from and operation.number >= self._full_from and name in _GROWING:
            code = errno.ENOSPC
        if code:
            raise OSError(code, os.strerror(code), path)

    def content(self, path: str) -> bytes:
        """A file's bytes as seen now."""
        return self._file(path).content()

    def damage(self, path: str, content: bytes) -> None:
        """Replace a file's bytes behind everybody's back."""
        self._file(path).damage(content)

    def find(self, path: str) -> Node | None:
        node: Node = self.root
        for part in path.split("/"):
            if not part:
                continue
            if not isinstance(node, SimulatedFolder):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            found = node.names.get(part)
            if found is None:
                return None
            node = found
        return node

    def _file(self, path: str) -> SimulatedFile:
        node = self.find(path)
        if not isinstance(node, SimulatedFile):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return node


class SimulatedFileSystem:
    """The file system as one process uses it."""

    def __init__(self, machine: SimulatedMachine) -> None:
        self.machine = machine
        self.read_only = False
        self._boot = machine.boots
        self._real = RealFileSystem()
        self._held: list[SimulatedLock] = []
        self._killed = False

    def kill(self) -> None:
        """The process ends here and now; the machine goes on."""
        self._killed = True
        for lock in list(self._held):
            lock.release()

    @property
    def is_alive(self) -> bool:
        return not self._killed and not self.machine.is_off and self._boot == self.machine.boots

    def create(self, path: str) -> SimulatedHandle:
        with self._changing("create", path):
            folder, name = self._place(path)
            if name in folder.names:
                raise _error(FileExistsError, errno.EEXIST, path)
            file = SimulatedFile()
            folder.change({name: file})
            return SimulatedHandle(self, file, path)

    def open(self, path: str) -> ReadableFile:
        if self._is_real(path):
            return self._real.open(path)
        with self._looking():
            return SimulatedHandle(self, self._file(path), path)

    def read(self, path: str) -> bytes:
        if self._is_real(path):
            return self._real.read(path)
        with self._looking():
            return self._file(path).content()

    def list(self, folder: str) -> list[FolderEntry]:
        if self._is_real(folder):
            return self._real.list(folder)
        with self._looking():
            node = self.machine.find(folder)
            if node is None:
                return []
            if isinstance(node, SimulatedFile):
                raise _error(NotADirectoryError, errno.ENOTDIR, folder)
            return [
                FolderEntry(name, isinstance(entry, SimulatedFolder), getattr(entry, "size_bytes", 0))
                for name, entry in node.names.items()
            ]

    def exists(self, path: str) -> bool:
        if self._is_real(path):
            return self._real.exists(path)
        with self._looking():
            return self.machine.find(path) is not None

    def size_bytes(self, path: str) -> int:
        if self._is_real(path):
            return self._real.size_bytes(path)
        with self._looking():
            return self._file(path).size_bytes

    def make_folders(self, path: str) -> None:
        if self._is_real(path):
            self._real.make_folders(path)
        if self.exists(path) or path == "/":
            return
        parent, name = os.path.split(path)
        self.make_folders(parent)
        with self._changing("mkdir", path):
            folder, name = self._place(path)
            if name not in folder.names:
                folder.change({name: SimulatedFolder()})
        self.sync_folder(parent)

    def rename(self, source: str, target: str) -> None:
        with self._changing("rename", target):
            if self._is_real(source):
                self._real.rename(source, target)
                return
            (old, old_name), (new, new_name) = self._place(source), self._place(target)
            node = old.names.get(old_name)
            if node is None:
                raise _error(FileNotFoundError, errno.ENOENT, source)
            if isinstance(new.names.get(new_name), SimulatedFolder):
                raise _error(IsADirectoryError, errno.EISDIR, target)
            if old is new:
                old.change({new_name: node, old_name: None})
            else:
                old.change({old_name: None}, needs=new.change({new_name: node}))

    def rename_new(self, source: str, target: str) -> None:
        with self._changing("link", target):
            folder, name = self._place(target)
            if name in folder.names:
                raise _error(FileExistsError, errno.EEXIST, target)
            folder.change({name: self._file(source)})
        with self._changing("unlink", source):
            self._drop(source)

    def remove(self, path: str) -> None:
        with self._changing("remove", path):
            if self._is_real(path):
                self._real.remove(path)
            elif self.machine.find(path) is not None:
                self._file(path)
                self._drop(path)

    def remove_folder(self, path: str) -> None:
        with self._changing("rmdir", path):
            if self._is_real(path):
                self._real.remove_folder(path)
                return
            node = self.machine.find(path)
            if isinstance(node, SimulatedFolder) and not node.names:
                self._drop(path)

    def sync_folder(self, path: str) -> None:
        with self._changing("sync_folder", path):
            if self._is_real(path):
                self._real.sync_folder(path)
                return
            node = self.machine.find(path)
            if not isinstance(node, SimulatedFolder):
                raise _error(FileNotFoundError, errno.ENOENT, path)
            node.sync()

    def is_read_only(self, path: str) -> bool:
        return self.read_only

    def lock(self, path: str, *, shared: bool) -> SimulatedLock | None:
        """As with flock, a lock belongs to the inode: a file removed and made anew is another lock."""
        with self._looking():
            if not self.exists(path):
                if self.read_only and shared:
                    raise _error(FileNotFoundError, errno.ENOENT, path)
                self.create(path).close()
            file = self._file(path)
            if file.exclusive is not None or (file.shared and not shared):
                return None
            lock = SimulatedLock(self, file, shared=shared)
            self._held.append(lock)
            return lock

    def released(self, lock: SimulatedLock) -> None:
        if lock in self._held:
            self._held.remove(lock)

    @contextmanager
    def changing(self, name: str, path: str) -> Iterator[None]:
        """An operation of this process that has effect unless something was arranged for it."""
        with self._changing(name, path):
            yield

    @contextmanager
    def _changing(self, name: str, path: str) -> Iterator[None]:
        with self._looking():
            if self.read_only:
                raise _error(OSError, errno.EROFS, path)
            self.machine.begin(name, path)
            yield

    @contextmanager
    def _looking(self) -> Iterator[None]:
        with self.machine.lock:
            self.require_alive()
            yield

    def require_alive(self) -> None:
        if not self.is_alive:
            raise SimulatedCrash("the process is dead")

    def _is_real(self, path: str) -> bool:
        return self.machine.real_folder is not None and path.startswith(self.machine.real_folder)

    def _place(self, path: str) -> tuple[SimulatedFolder, str]:
        parent, name = os.path.split(path)
        node = self.machine.find(parent)
        if not isinstance(node, SimulatedFolder):
            raise _error(FileNotFoundError, errno.ENOENT, path)
        return node, name

    def _file(self, path: str) -> SimulatedFile:
        node = self.machine.find(path)
        if node is None:
            raise _error(FileNotFoundError, errno.ENOENT, path)
        if isinstance(node, SimulatedFolder):
            raise _error(IsADirectoryError, errno.EISDIR, path)
        return node

    def _drop(self, path: str) -> None:
        folder, name = self._place(path)
        folder.change({name: None})


class SimulatedHandle:
    """An open file, for writing or for reading."""

    def __init__(self, fs: SimulatedFileSystem, file: SimulatedFile, path: str) -> None:
        self._fs = fs
        self._file = file
        self._path = path

    def write(self, buffers: Sequence[Buffer]) -> None:
        data = b"".join(bytes(buffer) for buffer in buffers)
        room = self._fs.machine.room_bytes()
        try:
            with self._fs.changing("write", self._path):
                self._file.append(data[:room])
                if room < len(data):
                    raise _error(OSError, errno.ENOSPC, self._path)
        except SimulatedCrash:
            if self._fs.machine.is_off:
                self._file.append(data[: random.Random(len(data)).randint(0, len(data))])
            raise

    def sync(self) -> None:
        with self._fs.changing("sync", self._path):
            self._file.sync()

    def read_at(self, offset: int, length: int) -> bytes:
        self._fs.require_alive()
        return self._file.content()[offset : offset + length]

    def size_bytes(self) -> int:
        return self._file.size_bytes

    def close(self) -> None:
        """Nothing is lost and nothing becomes durable by it."""


class SimulatedLock:
    """A lock that a process holds on a file."""

    def __init__(self, fs: SimulatedFileSystem, file: SimulatedFile, *, shared: bool) -> None:
        self._fs = fs
        self._file = file
        if shared:
            file.shared.append(self)
        else:
            file.exclusive = self

    def release(self) -> None:
        if self._file.exclusive is self:
            self._file.exclusive = None
        self._file.shared = [lock for lock in self._file.shared if lock is not self]
        self._fs.released(self)


def _error(kind: type[OSError], code: int, path: str) -> OSError:
    return kind(code, os.strerror(code), path)
