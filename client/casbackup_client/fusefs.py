"""Snapshots as a file system, through libfuse. Importing this needs mfusepy and libfuse (ImportError or OSError)."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mfusepy

from casbackup.clock import Clock
from casbackup.errors import CasbackupError, MountpointUnusable
from casbackup.peer.served import Report
from casbackup_client.openfiles import OpenFiles
from casbackup_client.snapshottree import File, Folder

_FRESH_S = 2.0
"""How long a listing of the repository is believed."""
_BLOCK_BYTES = 512
_THREADS = 8
_ENDED = (7, 8)
"""What ``fuse_main`` returns once it was mounted, for a signal, too (fuse.h)."""


class SnapshotFiles(mfusepy.Operations):  # type: ignore[misc]
    """What libfuse calls, from many threads. Everything is read-only and belongs to whoever mounted it.

    Modes only say who can read: libfuse lets in the owner alone, or everybody.
    """

    use_ns = True

    def __init__(
        self, tree: Callable[[], Folder], files: OpenFiles, clock: Clock, report: Report, *, for_all: bool
    ) -> None:
        """``tree``: asked again after a while, so new snapshots appear and forgotten ones vanish.

        ``for_all``: whether other users can read, too.
        """
        self._tree = tree
        self._files = files
        self._clock = clock
        self._report = report
        self.for_all = for_all
        self._folder_mode, self._file_mode = (0o555, 0o444) if for_all else (0o500, 0o400)
        self._owner = {"st_uid": os.getuid(), "st_gid": os.getgid()}
        self._root = tree()
        self._fresh_until_s = clock.monotonic_s() + _FRESH_S
        self._lock = threading.Lock()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = self._find(path)
        time_ns = (found.time_ms or 0) * 1_000_000
        times = {"st_mtime": time_ns, "st_ctime": time_ns, "st_atime": time_ns}
        if isinstance(found, Folder):
            folders = sum(isinstance(entry, Folder) for entry in found.entries.values())
            return {"st_mode": stat.S_IFDIR | self._folder_mode, "st_nlink": 2 + folders, **times, **self._owner}
        size = found.size_bytes
        # One block less than the size needs: programs look for holes only in files that seem to have some.
        blocks = max(min(1, size), size // _BLOCK_BYTES - 1)
        mode = {"st_mode": stat.S_IFREG | self._file_mode, "st_nlink": 1, "st_size": size, "st_blocks": blocks}
        return {**mode, **times, **self._owner}

    def readdir(self, path: str, fh: int) -> list[str]:
        found = self._find(path)
        if isinstance(found, File):
            raise OSError(errno.ENOTDIR, path)
        return [".", "..", *found.entries]

    def open(self, path: str, flags: int) -> int:
        found = self._find(path)
        if isinstance(found, Folder):
            raise OSError(errno.EISDIR, path)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, path)
        return self._files.open(found)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return self._files.read(fh, offset, size)

    def lseek(self, path: str, offset: int, whence: int, fh: int) -> int:
        return self._files.seek(fh, offset, hole=whence == os.SEEK_HOLE)

    def release(self, path: str, fh: int) -> int:
        self._files.release(fh)
        return 0

    def _find(self, path: str) -> File | Folder:
        found = self._current().find(path)
        if found is None:
            raise OSError(errno.ENOENT, path)
        return found

    def _current(self) -> Folder:
        """The tree as it is, or as it was last if the repository cannot be asked now."""
        with self._lock:
            if self._clock.monotonic_s() >= self._fresh_until_s:
                try:
                    self._root = self._tree()
                except CasbackupError as error:
                    self._report(error.message)
                self._fresh_until_s = self._clock.monotonic_s() + _FRESH_S
            return self._root


class _Fuse(mfusepy.FUSE):  # type: ignore[misc]
    """With what mfusepy leaves out: seeking to data and holes."""

    def lseek(self, path: bytes | None, offset: int, whence: int, info: Any) -> int:
        found: int = self.operations.lseek(path, offset, whence, info.contents.fh)
        return found


def serve(operations: SnapshotFiles, folder: str) -> None:
    """Until it is unmounted, or SIGINT, SIGTERM or SIGHUP comes, which unmounts it.

    :raise MountpointUnusable: when it cannot be mounted there; libfuse has said why on stderr.
    """
    options: dict[str, Any] = {"ro": True, "fsname": "casbackup", "subtype": "casbackup", "kernel_cache": True}
    if operations.for_all:
        options["allow_other"] = True
    if (mfusepy.fuse_version_major, mfusepy.fuse_version_minor) >= (3, 12):
        # Some releases take their own defaults for mistakes, and say so.
        options |= {"max_threads": _THREADS, "max_idle_threads": _THREADS}
    with _signals_end_libfuse():
        try:
            _Fuse(operations, folder, foreground=True, **options)
        except RuntimeError as error:
            if error.args[0] not in _ENDED:
                raise MountpointUnusable(f"{folder}: nothing can be mounted there") from error


@contextlib.contextmanager
def _signals_end_libfuse() -> Iterator[None]:
    """libfuse takes the signals that nobody has taken before; Python would see them only once it is over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
