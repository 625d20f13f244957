"""Where a restore writes to: a new raw file, a block device, or what is there already.

Order of ``Target.commit`` for a new file, and what a crash after each step leaves:

| step | after a crash |
|---|---|
| 1. everything is written and flushed | ``.NAME.xxxxxxxx.partial``, which may be deleted; NAME as it was |
| 2. the device is closed | the same |
| 3. the file gets its name: **the commit point** | the old or the new NAME, each complete |
| 4. the folder is flushed | the new NAME |

Block devices and files restored in place have no commit point: they are written as the restore goes along.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Self

from casbackup.block import _linux
from casbackup.block.device import BlockDevice
from casbackup.block.guard import Guarded
from casbackup.block.pending import PendingFile, existing_file, translated
from casbackup.block.rawfile import RawFile
from casbackup.errors import CasbackupError, TargetTooSmall, TargetUnsuitable


class Target:
    """A writable device and the decision about it: ``commit`` or ``abort``. As a context manager it aborts
    unless it was committed before.
    """

    def __init__(self, device: BlockDevice, *, pending: PendingFile | None, starts_zero: bool) -> None:
        """Takes over both. ``pending``: the file below ``device`` when it is a new one."""
        self.device = device
        self.starts_zero = starts_zero
        """Every byte that was not written reads as zero, so zeros need not be written."""
        self._pending = pending
        self._decided = False

    def commit(self, *, sync: bool = True) -> None:
        """What was written is complete; ``sync``: and survives a crash from now on. The device is closed.

        After an error nothing has been committed; abort then. Errors of the device's ``flush``, and

        :raise TargetExists: when somebody has put a file of that name there meanwhile.
        :raise TargetUnwritable: when it cannot be flushed or renamed.
        :raise ToolFailed: when the program behind the device failed to close the image.
        """
        if sync:
            self.device.flush()
        self.device.close()
        if self._pending is not None:
            self._pending.publish(sync=sync)
        self._decided = True

    def abort(self) -> None:
        """Remove a new file. What is written in place keeps what was written. Harmless after ``commit``."""
        if self._decided:
            return
        self._decided = True
        try:
            with contextlib.suppress(CasbackupError):  # what is thrown away need not be closed well
                self.device.close()
        finally:
            if self._pending is not None:
                self._pending.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def open_raw_target(path: str, size_bytes: int, *, force: bool = False, in_place: bool = False) -> Target:
    """The place for a disk of ``size_bytes`` at ``path``: its device has exactly that size.

    * Nothing there: a new sparse file. A file there: ``force`` replaces it once the new one is complete;
      ``in_place`` opens it as it is, cut or extended to the size, for a caller that writes what differs.
    * A block device: opened as it is, and exclusively. ``force`` takes one that is mounted or in use.

    :raise TargetExists: for an existing file without ``force`` or ``in_place``.
    :raise TargetTooSmall: for a block device below ``size_bytes``; nothing was written then.
    :raise TargetUnsuitable: for a folder, a pipe, a missing parent, a mounted device without ``force``.
    :raise TargetUnwritable: when the system refuses.
    """
    status = existing_file(path)
    if status is not None and stat.S_ISBLK(status.st_mode):
        return _open_block_device(path, status.st_rdev, size_bytes, force=force)
    if status is not None and in_place:
        return _open_in_place(path, size_bytes)
    pending = PendingFile(path, replace=force)
    try:
        with translated(path):
            os.truncate(pending.temporary, size_bytes)
            return Target(_device(pending.temporary, path, size_bytes), pending=pending, starts_zero=True)
    except BaseException:
        pending.discard()
        raise


def _open_in_place(path: str, size_bytes: int) -> Target:
    with translated(path):
        device = _device(path, path, size_bytes, resize=True)
    return Target(device, pending=None, starts_zero=False)


def _open_block_device(path: str, number: int, size_bytes: int, *, force: bool) -> Target:
    with translated(path):
        _check_block_device(path, number, size_bytes, force=force)
        try:
            # Without O_CREAT, O_EXCL asks for exclusive use: the kernel refuses it while a file system, swap,
            # RAID or LVM, in whatever mount namespace, holds the device or a partition of it.
            device = _device(path, path, size_bytes, flags=0 if force else os.O_EXCL)
        except OSError as error:
            if force or error.errno != errno.EBUSY:
                raise
            raise TargetUnsuitable(f"{path} is in use by the system; free it, or force it") from error
    return Target(device, pending=None, starts_zero=False)


def _check_block_device(path: str, number: int, size_bytes: int, *, force: bool) -> None:
    """The size first: a disk that does not fit can never be right, whatever else there is to say."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        room_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
    if room_bytes < size_bytes:
        raise TargetTooSmall(f"{path} has {room_bytes} bytes, the disk {size_bytes}")
    folder = _linux.mounted_at(number)
    if folder is not None and not force:
        raise TargetUnsuitable(f"{path} is mounted at {folder}; unmount it, or force it")


def _device(name: str, path: str, size_bytes: int, *, flags: int = 0, resize: bool = False) -> BlockDevice:
    """The file ``name`` as a device of ``size_bytes``; errors speak of ``path``."""
    descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC | flags)
    try:
        if resize:
            os.ftruncate(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return Guarded(RawFile(descriptor, path, writable=True, size_bytes=size_bytes))
