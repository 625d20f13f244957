"""QEMU's locks on images: whoever writes to a disk keeps QEMU from opening it, and is kept from one that QEMU uses.

QEMU locks single bytes far inside the file, shared, with locks that belong to an open file description (file-posix.c):
byte 100 + n says that its owner has right n, byte 200 + n that it does not let others have it. Rights are 0 consistent
read, 1 write, 2 write unchanged, 3 resize.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from casbackup.block.device import Closing
from casbackup.errors import DiskInUse, SourceNotFound, SourceUnreadable

_FLOCK = struct.Struct("hhqqi4x")
"""``struct flock`` of Linux on 64 bits: type, whence, start, length, pid."""
_HAS_BYTE = 100
_DENIES_BYTE = 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_HAS = (_READ, _WRITE)
_DENIES = (_WRITE, _RESIZE)


class ImageLock(Closing):
    """Held from its making to ``close``: nobody else who heeds these locks writes to the file."""

    def __init__(self, path: str) -> None:
        """Without effect where the file system knows no such locks.

        :raise DiskInUse: when somebody uses the file in a way that excludes writing.
        :raise SourceError: when it cannot be opened.
        """
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise SourceNotFound(f"{path} does not exist") from error
        except OSError as error:
            raise SourceUnreadable(f"{path} cannot be opened for writing: {error.strerror}") from error
        try:
            self._lock()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self) -> None:
        """First take, then look: of two at the same time at least one sees the other."""
        try:
            for byte in (*(_HAS_BYTE + right for right in _HAS), *(_DENIES_BYTE + right for right in _DENIES)):
                fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._in_use() from error
            return
        against = (*(_DENIES_BYTE + right for right in _HAS), *(_HAS_BYTE + right for right in _DENIES))
        if any(self._held_by_others(byte) for byte in against):
            raise self._in_use()

    def _held_by_others(self, byte: int) -> bool:
        asked = _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0)
        answer = fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def _in_use(self) -> DiskInUse:
        return DiskInUse(f"{self._path} is in use: by a VM, or by another proxy")
