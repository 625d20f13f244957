"""A raw image: a regular file or a host block device."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from casbackup.block import _linux
from casbackup.block.device import Capabilities, Closing, Extent, merged
from casbackup.errors import CasbackupError, SourceChanged, SourceNotFound, SourceUnreadable, TargetUnwritable
from casbackup.fs import Buffer
from casbackup.units import GiB, MiB

_ZEROS = bytes(1 * MiB)
_ZERO_STEP_BYTES = 1 * GiB
"""Zeroing goes in steps of this, so that a signal is seen between them."""


class RawFile(Closing):
    """The bytes of a regular file or block device as they are, through the page cache.

    A file that shrinks while it is read gives ``SourceChanged``, never zeros or a short read. Growing goes
    unnoticed until ``changed_size`` is asked. Holes of files are found with SEEK_DATA and SEEK_HOLE.
    """

    def __init__(self, descriptor: int, path: str, *, writable: bool, size_bytes: int | None = None) -> None:
        """Takes over ``descriptor``. ``size_bytes`` below the real size shows only the beginning."""
        self._descriptor = descriptor
        self._path = path
        self._opened_size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        self.size_bytes = self._opened_size_bytes if size_bytes is None else size_bytes
        status = os.fstat(descriptor)
        self._is_device = stat.S_ISBLK(status.st_mode)
        device_number = status.st_rdev if self._is_device else None
        self.capabilities = _capabilities(device_number, status.st_blksize, writable=writable)

    @classmethod
    def open(cls, path: str, *, writable: bool = False) -> RawFile:
        """Open what exists.

        :raise SourceNotFound: when there is nothing at ``path``.
        :raise SourceUnreadable: for missing rights, an I/O error, or anything but a file or block device.
        """
        # O_NONBLOCK: opening a fifo or a device without a medium must not wait. Files ignore it afterwards.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SourceNotFound(f"{path} does not exist") from error
        except OSError as error:
            raise SourceUnreadable(f"{path} cannot be opened: {error.strerror}") from error
        try:
            _check_kind(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        try:
            device = cls(descriptor, path, writable=writable)
        except OSError as error:
            raise SourceUnreadable(f"{path} has no size: {error.strerror}") from error
        if not writable:
            device._expect_sequential_reads()
        return device

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """:raise SourceChanged: when the file ends before.

        :raise SourceUnreadable: when the system says so.
        """
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._unreadable(offset + done, error) from error
            if not got:
                raise self._shrank()
            done += got

    def write(self, offset: int, data: Buffer) -> None:
        """:raise TargetUnwritable: when the system refuses, for instance because it is full."""
        view = memoryview(data)
        with self._writing(f"writing at byte {offset}"):
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                offset += written
                view = view[written:]

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        """By punching a hole or by allocating zeros; where the storage knows neither, by writing them."""
        with self._writing(f"zeroing at byte {offset}"):
            for start in range(offset, offset + length, _ZERO_STEP_BYTES):
                self._zero_step(start, min(_ZERO_STEP_BYTES, offset + length - start), may_trim)

    def discard(self, offset: int, length: int) -> None:
        with self._writing(f"discarding at byte {offset}"):
            if self._is_device:
                _linux.discard_blocks(self._descriptor, offset, length)
            else:
                _linux.punch_hole(self._descriptor, offset, length)

    def flush(self) -> None:
        """:raise TargetUnwritable: also for earlier writes that the system could not bring to the disk."""
        with self._writing("flushing"):
            os.fsync(self._descriptor)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """:raise SourceChanged: when the file now ends within the range; that is no hole."""
        return merged(self._seek_extents(offset, offset + length))

    def changed_size(self) -> int | None:
        """:raise SourceUnreadable: when the size cannot be had any more."""
        now = self._size_now()
        return None if now == self._opened_size_bytes else now

    def fileno(self) -> int:
        """Its descriptor, which stays its own."""
        return self._descriptor

    def close(self) -> None:
        """:raise TargetUnwritable: where only closing tells that a write failed, as on NFS."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with self._writing("closing"):
                os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def _zero_step(self, offset: int, length: int, may_trim: bool) -> None:
        if may_trim and _linux.punch_hole(self._descriptor, offset, length):
            return
        if _linux.zero_range(self._descriptor, offset, length):
            return
        zeros = memoryview(_ZEROS)
        for start in range(offset, offset + length, len(_ZEROS)):
            self.write(start, zeros[: offset + length - start])

    def _seek_extents(self, start: int, end: int) -> Iterator[Extent]:
        while start < end:
            data = self._seek(start, os.SEEK_DATA)
            if data is None:  # no data from here to the end of the file: where is that now?
                if self._size_now() < end:
                    raise self._shrank()
                data = end
            if data > start:
                yield Extent(start, min(data, end) - start, True)
            if data >= end:
                return
            hole = self._seek(data, os.SEEK_HOLE) or data
            # A hole that begins where the data does was punched just now; the next round will see it. What
            # was data a moment ago is reported as such, so that the iteration always advances.
            start = min(max(hole, data + 1), end)
            yield Extent(data, start - data, False)

    def _seek(self, offset: int, whence: int) -> int | None:
        """Where the next data or hole begins; None when there is none before the end of the file.

        Nobody uses the position of the descriptor that lseek moves, so threads do not disturb each other.
        """
        try:
            return os.lseek(self._descriptor, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY):  # not known here: all data
                return offset if whence == os.SEEK_DATA else self.size_bytes
            raise self._unreadable(offset, error) from error

    def _size_now(self) -> int:
        try:
            return os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise self._unreadable(0, error) from error

    def _expect_sequential_reads(self) -> None:
        with contextlib.suppress(OSError):  # only a hint
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TargetUnwritable(f"{self._path}: {what} failed: {error.strerror}") from error

    def _unreadable(self, offset: int, error: OSError) -> CasbackupError:
        return SourceUnreadable(f"{self._path}: reading at byte {offset} failed: {error.strerror}")

    def _shrank(self) -> CasbackupError:
        sizes = f"from {self._opened_size_bytes} to {self._size_now()} bytes"
        return SourceChanged(f"{self._path} shrank while it was read, {sizes}")


def _check_kind(descriptor: int, path: str) -> None:
    """:raise SourceUnreadable: for anything but a regular file or a block device."""
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        kind = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise SourceUnreadable(f"{path} is {kind}")


def _capabilities(device_number: int | None, block_bytes: int, *, writable: bool) -> Capabilities:
    """What a file (no device number) or a block device can do. ``block_bytes``: st_blksize."""
    if device_number is None:
        return Capabilities(
            writable=writable,
            can_write_zeros=writable,
            zero_is_cheap=writable,
            can_trim=writable,
            knows_zeros=True,
            multi_conn=True,
            preferred_block_bytes=max(block_bytes, 1),
        )
    return Capabilities(
        writable=writable,
        can_write_zeros=writable,
        zero_is_cheap=writable and _linux.queue_limit(device_number, "write_zeroes_max_bytes") > 0,
        can_trim=writable and _linux.queue_limit(device_number, "discard_max_bytes") > 0,
        multi_conn=True,
        preferred_block_bytes=max(_linux.queue_limit(device_number, "physical_block_size"), 4096),
    )
