"""What Linux offers for files and block devices beyond ``os``: fallocate, BLKDISCARD, sysfs, mounts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from functools import cache

# linux/falloc.h, linux/fs.h
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10
_BLKDISCARD = 0x1277

_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY})
"""EINVAL is among them: block devices answer it to ranges that are not aligned to their logical blocks."""


def punch_hole(descriptor: int, offset: int, length: int) -> bool:
    """Make the range of a file or block device read as zeros and give its space back.

    On block devices this works since Linux 4.9; there it also drops the range from the page cache, which the
    ioctl BLKZEROOUT does only since 5.x. Returns False, with nothing changed, when it is not supported.

    :raise OSError: when it failed for another reason.
    """
    return _fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(descriptor: int, offset: int, length: int) -> bool:
    """As ``punch_hole``, but the space stays allocated."""
    return _fallocate(descriptor, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def discard_blocks(descriptor: int, offset: int, length: int) -> None:
    """Tell a block device that the range is not needed. It may not support that, which is not an error."""
    try:
        fcntl.ioctl(descriptor, _BLKDISCARD, struct.pack("QQ", offset, length))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> bool:
    import ctypes  # noqa: PLC0415  5 ms that a backup need not spend

    while _libc_fallocate()(descriptor, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


@cache
def _libc_fallocate() -> Callable[[int, int, int, int], int]:
    """The C library's fallocate with 64-bit offsets; that of ``os`` cannot punch holes."""
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if function is None:
        return _no_fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def _no_fallocate(_descriptor: int, _mode: int, _offset: int, _length: int) -> int:
    import ctypes  # noqa: PLC0415

    ctypes.set_errno(errno.ENOSYS)
    return -1


def queue_limit(device_number: int, name: str) -> int:
    """A figure of ``/sys/dev/block/MAJOR:MINOR/queue``, for a partition its disk's; 0 if not known."""
    base = f"/sys/dev/block/{os.major(device_number)}:{os.minor(device_number)}"
    for queue in (f"{base}/queue", f"{base}/../queue"):
        with contextlib.suppress(OSError, ValueError), open(f"{queue}/{name}", encoding="ascii") as file:
            return int(file.read())
    return 0


def mounted_at(device_number: int) -> str | None:
    """Where the block device is mounted in this process's view, or None."""
    for source, folder in _mounts():
        with contextlib.suppress(OSError):
            status = os.stat(source)
            if stat.S_ISBLK(status.st_mode) and status.st_rdev == device_number:
                return folder
    return None


def _mounts() -> Iterator[tuple[str, str]]:
    """(device, folder) of each mount of a device; the kernel writes blanks in names as ``\\040``."""
    try:
        with open("/proc/self/mounts", "rb") as file:
            lines = os.fsdecode(file.read()).splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(" ")
        if len(fields) > 1 and fields[0].startswith("/"):
            yield _unescaped(fields[0]), _unescaped(fields[1])


def _unescaped(text: str) -> str:
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escape, character)
    return text
