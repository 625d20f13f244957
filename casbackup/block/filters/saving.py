"""Where old data goes when the guest is about to overwrite it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from casbackup.block.device import BlockDevice, Extent
from casbackup.block.spool import Spool
from casbackup.errors import BackupBroken, CasbackupError


class Saver(Protocol):
    """Takes the old data of a disk, in any order, each cluster once.

    A room is a buffer that is filled and then handed over, or given back. Any number of threads may call.
    """

    def room(self, length: int, *, timeout_s: float | None, background: bool) -> memoryview | None:
        """A room for ``length`` bytes, at most 1 MiB; None when there was none within ``timeout_s``.

        ``background``: leave some to those whom a guest is waiting for.

        :raise CasbackupError: when there will never be one again.
        """

    def save(self, offset: int, room: memoryview) -> None:
        """Take over a room that holds the data at ``offset``; soon done, for a guest may be waiting.

        :raise CasbackupError: when the data is lost. The room is taken over in any case.
        """

    def save_zeros(self, offset: int, length: int, room: memoryview) -> None:
        """The range is zero. ``room``: of any size, taken over. Errors as ``save``."""

    def give_back(self, room: memoryview) -> None:
        """The room is not needed after all."""


class SpoolSaver:
    """Hands old data to a spool as that of one disk: nothing is kept, each byte is read once and written twice."""

    def __init__(self, spool: Spool, disk: str) -> None:
        self._spool = spool
        self._disk = disk

    def room(self, length: int, *, timeout_s: float | None, background: bool) -> memoryview | None:
        room = self._spool.room(length, timeout_s=timeout_s, background=background)
        if room is None and self._spool.failure is not None:
            raise self._broken()
        return room

    def save(self, offset: int, room: memoryview) -> None:
        if not self._spool.write(self._disk, offset, room):
            raise self._broken()

    def save_zeros(self, offset: int, length: int, room: memoryview) -> None:
        if not self._spool.zero(self._disk, offset, length, room):
            raise self._broken()

    def give_back(self, room: memoryview) -> None:
        self._spool.give_back(room)

    def _broken(self) -> CasbackupError:
        return BackupBroken(str(self._spool.failure))


class CallbackSaver:
    """Calls a function ``(offset, data)`` in the thread that saves, with ``data`` None for zeros of a length.

    The function must not wait: a guest may be waiting for it. ``data`` is its own to keep.
    """

    def __init__(self, callback: Callable[[int, int, memoryview | None], None]) -> None:
        """``callback``: takes offset, length and data; it may raise ``CasbackupError``."""
        self._callback = callback

    def room(self, length: int, *, timeout_s: float | None, background: bool) -> memoryview | None:
        return memoryview(bytearray(length))

    def save(self, offset: int, room: memoryview) -> None:
        self._callback(offset, len(room), room)

    def save_zeros(self, offset: int, length: int, room: memoryview) -> None:
        self._callback(offset, length, None)

    def give_back(self, room: memoryview) -> None:
        """It is only memory."""


class ScratchSaver:
    """Keeps old data in a scratch device until somebody has read it there.

    Costs a third write and the space of what the guest overwrites, and needs nobody to take the data at once.
    """

    def __init__(self, scratch: BlockDevice, *, limit_bytes: int | None = None) -> None:
        """``scratch`` is writable, takes any range, begins all zero, and has the size of the disk.

        It stays the caller's. ``limit_bytes``: how much it may keep at a time; None: all.
        """
        self._scratch = scratch
        self._limit_bytes = limit_bytes
        self._kept_bytes = 0
        self._lock = threading.Lock()

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    def room(self, length: int, *, timeout_s: float | None, background: bool) -> memoryview | None:
        return memoryview(bytearray(length))

    def save(self, offset: int, room: memoryview) -> None:
        """:raise BackupBroken: at the limit."""
        with self._lock:
            if self._limit_bytes is not None and self._kept_bytes + len(room) > self._limit_bytes:
                raise BackupBroken(f"the guest overwrote more than {self._limit_bytes} bytes that were not yet read")
            self._kept_bytes += len(room)
        self._scratch.write(offset, room)

    def save_zeros(self, offset: int, length: int, room: memoryview) -> None:
        """Nothing to do: the scratch device begins all zero, and each cluster is saved once."""

    def give_back(self, room: memoryview) -> None:
        """It is only memory."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read back what was saved. Errors as those of the scratch device."""
        self._scratch.read_into(offset, buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """As ``BlockDevice.extents``, of what was saved."""
        return self._scratch.extents(offset, length)
