"""The device that a live QEMU writes its backup to.

QEMU lets a guest's write wait until the old data has been written to its target, and fails it when the target
does. So this target never fails and never makes it wait beyond a bound: it acknowledges what is in memory, and
when that stays full for too long, or the consumer fails, the backup is broken and the rest is acknowledged and
dropped. Whoever runs the backup sees it in ``Backlog.failure`` and ends the job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from casbackup.block.backlog import Backlog
from casbackup.block.buffers import MAX_BUFFER_BYTES
from casbackup.block.device import Capabilities, Closing, Extent
from casbackup.errors import BackupBroken, SourceUnreadable
from casbackup.fs import Buffer
from casbackup.units import KiB

_GRANULE_BYTES = 512
"""QEMU rounds the size of a disk up to this."""

ReadBack = Callable[[int, memoryview], None]
"""Fills a buffer with what was written at an offset before."""


class SinkDevice(Closing):
    """One disk's writes become pieces of a backlog, which several disks may share. Nothing is kept.

    For an NBD export both as its device and as its receiver: what arrives is not copied.
    """

    def __init__(
        self,
        spool: Backlog,
        disk: str,
        size_bytes: int,
        *,
        max_guest_stall_s: float = 2.0,
        read_back: ReadBack | None = None,
    ) -> None:
        """``spool`` stays the caller's. ``size_bytes``: of the disk; what QEMU writes beyond is dropped.

        ``max_guest_stall_s``: how long one write may wait for memory before the backup is broken instead.
        ``read_back``: answers reads, which QEMU's copy-before-write filter may make; without it they fail.
        """
        self.size_bytes = size_bytes
        self.capabilities = Capabilities(
            writable=True,
            can_write_zeros=True,
            zero_is_cheap=True,
            multi_conn=True,
            preferred_block_bytes=64 * KiB,
        )
        self._spool = spool
        self._disk = disk
        self._max_guest_stall_s = max_guest_stall_s
        self._read_back = read_back
        self._waste = bytearray(MAX_BUFFER_BYTES)
        self._flushes = 0

    @property
    def flushes(self) -> int:
        """How often a flush came. QEMU sends one, when it closes its target, and none when the job ends."""
        return self._flushes

    # --- as a receiver

    def room(self, length: int) -> memoryview:
        room = self._spool.room(length, timeout_s=self._max_guest_stall_s)
        if room is None:
            self._break_for_slowness()
            return memoryview(self._waste)[:length]
        return room

    def receive(self, offset: int, room: memoryview) -> None:
        if room.obj is self._waste:
            return
        excess = offset + len(room) - self.size_bytes
        if excess <= 0:
            self._spool.write(self._disk, offset, room)
        elif excess < min(len(room), _GRANULE_BYTES):
            self._spool.write(self._disk, offset, room, len(room) - excess)
        else:
            self._spool.give_back(room)

    def give_back(self, room: memoryview) -> None:
        if room.obj is not self._waste:
            self._spool.give_back(room)

    def refuse(self, reason: str) -> None:
        self._spool.fail(BackupBroken(f"{self._disk}: {reason}"))

    # --- as a device

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """:raise SourceUnreadable: when there is nothing to read from."""
        if self._read_back is None:
            raise SourceUnreadable(f"{self._disk}: a backup's target can only be written to")
        self._read_back(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        for at in range(0, len(view), MAX_BUFFER_BYTES):
            part = view[at : at + MAX_BUFFER_BYTES]
            room = self.room(len(part))
            room[:] = part
            self.receive(offset + at, room)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        room = self._spool.room_for_zeros(timeout_s=self._max_guest_stall_s)
        length = min(length, self.size_bytes - offset)
        if room is None:
            self._break_for_slowness()
        elif length > 0:
            self._spool.zero(self._disk, offset, length, room)
        else:
            self._spool.give_back(room)

    def discard(self, offset: int, length: int) -> None:
        """Does nothing: what was backed up stays."""

    def flush(self) -> None:
        """Only counted: what is in memory is durable when the backup is committed, not before."""
        self._flushes += 1

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return iter([Extent(offset, length, False)])

    def changed_size(self) -> int | None:
        return None

    def close(self) -> None:
        """Nothing is held; the spool stays."""

    def _break_for_slowness(self) -> None:
        """There was no room in time; if the backup is broken for another reason, that one stays."""
        self._spool.fail(BackupBroken(f"no data was taken for {self._max_guest_stall_s:g} s; the guest goes first"))
