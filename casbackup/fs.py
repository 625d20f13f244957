"""The file system as a port, so that tests can lose unsynced writes, tear the last one, and fill the disk.

Paths are absolute strings. Every method lets ``OSError`` through; ``translated`` turns the ones that users
meet into errors of their own. Durability rules that callers rely on, and that the simulation enforces:
written bytes survive a crash only after ``sync`` of the file; a new, renamed or removed name only after
``sync_folder`` of its folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from casbackup.errors import CasbackupError, RepositoryBusy, RepositoryFull, RepositoryReadOnly

Buffer = bytes | bytearray | memoryview


_MAX_BUFFERS = 1024
"""Linux's IOV_MAX."""


class FolderEntry(NamedTuple):
    name: str
    is_folder: bool
    size_bytes: int


class WritableFile(Protocol):
    """A new file, written from front to back by one thread at a time."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append all bytes of all buffers, in order."""

    def sync(self) -> None:
        """Everything written so far survives a crash."""

    def close(self) -> None: ...


class ReadableFile(Protocol):
    """A file read at any offset by any number of threads. Stays readable after the name is gone."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""

    def size_bytes(self) -> int: ...

    def close(self) -> None: ...


class FileSystem(Protocol):
    """What casbackup needs of a file system. ``is_read_only`` is about this process's rights to ``path``."""

    def create(self, path: str) -> WritableFile:
        """:raise FileExistsError: when the name is taken."""

    def open(self, path: str) -> ReadableFile: ...

    def read(self, path: str) -> bytes: ...

    def list(self, folder: str) -> list[FolderEntry]:
        """Entries in no particular order. A missing folder lists as empty."""

    def exists(self, path: str) -> bool: ...

    def size_bytes(self, path: str) -> int: ...

    def make_folders(self, path: str) -> None:
        """Create the folder and its parents durably; existing ones are fine."""

    def rename(self, source: str, target: str) -> None:
        """Atomic; replaces ``target``."""

    def rename_new(self, source: str, target: str) -> None:
        """Atomic; :raise FileExistsError: when ``target`` exists."""

    def remove(self, path: str) -> None:
        """A missing file is not an error."""

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder; missing or non-empty ones are left alone."""

    def sync_folder(self, path: str) -> None: ...

    def is_read_only(self, path: str) -> bool: ...

    def lock(self, path: str, *, shared: bool) -> FileLock | None:
        """Lock the file (created if it may be), or None when somebody else holds it. Ends with the process."""


class FileLock(Protocol):
    def release(self) -> None:
        """Give the lock up. Releasing twice is harmless."""


class RealFile:
    """One open descriptor, for writing or for reading."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, buffers: Sequence[Buffer]) -> None:
        for start in range(0, len(buffers), _MAX_BUFFERS):
            batch = buffers[start : start + _MAX_BUFFERS]
            written = os.writev(self._descriptor, batch)
            if written < (total := sum(map(len, batch))):
                rest = memoryview(b"".join(batch))
                while written < total:
                    written += os.write(self._descriptor, rest[written:])

    def read_at(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        if len(data) == length or not data:
            return data
        parts = [data]
        while data and (got := sum(map(len, parts))) < length:
            data = os.pread(self._descriptor, length - got, offset + got)
            parts.append(data)
        return b"".join(parts)

    def size_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


class RealLock:
    """An flock: held by an open descriptor, so it ends with the process, however that ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class RealFileSystem:
    """The operating system's."""

    def create(self, path: str) -> RealFile:
        return RealFile(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o640))

    def open(self, path: str) -> RealFile:
        return RealFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def list(self, folder: str) -> list[FolderEntry]:
        found: list[FolderEntry] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    with contextlib.suppress(FileNotFoundError):
                        size = 0 if is_folder else entry.stat(follow_symlinks=False).st_size
                        found.append(FolderEntry(entry.name, is_folder, size))
        except FileNotFoundError:
            return []
        return found

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def size_bytes(self, path: str) -> int:
        return os.stat(path).st_size

    def make_folders(self, path: str) -> None:
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        self.make_folders(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o750)
        self.sync_folder(parent)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def rename_new(self, source: str, target: str) -> None:
        os.link(source, target)
        os.unlink(source)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def remove_folder(self, path: str) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(path)

    def sync_folder(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def is_read_only(self, path: str) -> bool:
        return not os.access(path, os.W_OK) or bool(os.statvfs(path).f_flag & os.ST_RDONLY)

    def lock(self, path: str, *, shared: bool) -> RealLock | None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            if not shared or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return RealLock(descriptor)


def write_durably(fs: FileSystem, path: str, data: bytes, *, replace: bool) -> None:
    """Write a small file so that after a crash it is there whole or not at all.

    :raise FileExistsError: when it exists and ``replace`` is false.
    """
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    fs.remove(temporary)
    file = fs.create(temporary)
    try:
        file.write([data])
        file.sync()
        file.close()
        (fs.rename if replace else fs.rename_new)(temporary, path)
    except BaseException:
        file.close()
        with contextlib.suppress(OSError):
            fs.remove(temporary)
        raise
    fs.sync_folder(os.path.dirname(path))


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn a full disk, missing rights and a read-only mount into errors that say what to do about ``what``.

    :raise RepositoryFull: for ENOSPC and EDQUOT.
    :raise RepositoryReadOnly: for EROFS, EACCES and EPERM.
    """
    try:
        yield
    except OSError as error:
        translation = _TRANSLATION.get(error.errno or 0)
        if translation is None:
            raise
        raise translation(f"{what}: {error.strerror}") from error


_TRANSLATION: dict[int, type[CasbackupError]] = {
    errno.ENOSPC: RepositoryFull,
    errno.EDQUOT: RepositoryFull,
    errno.EROFS: RepositoryReadOnly,
    errno.EACCES: RepositoryReadOnly,
    errno.EPERM: RepositoryReadOnly,
    errno.EWOULDBLOCK: RepositoryBusy,
}
