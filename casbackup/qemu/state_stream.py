"""The sink's end of the stream in which QEMU sends a VM's memory.

The guest waits for a page that it wants to write to until QEMU has got rid of the old one. So what comes here is
taken into memory like the data of disks, and when that stays full for too long, or the backup is broken, it is
dropped: the stream is read to its end whatever happens. When nobody does, the migration fails, and the guest of an
earlier QEMU hangs.
"""

from __future__ import annotations

import contextlib
import socket
import threading

from casbackup.block.backlog import Backlog
from casbackup.block.buffers import MAX_BUFFER_BYTES
from casbackup.errors import BackupBroken

_END_S = 30.0
"""After QEMU has said that all is sent, for what is still on the way."""


class StateReceiver:
    """Puts a stream into a spool as the data of ``disk``, from offset 0 on; in a thread of its own."""

    def __init__(self, spool: Backlog, disk: str, stream: socket.socket, *, max_guest_stall_s: float) -> None:
        """``stream`` is taken over."""
        self._spool = spool
        self._disk = disk
        self._stream = stream
        self._max_guest_stall_s = max_guest_stall_s
        self._waste = memoryview(bytearray(MAX_BUFFER_BYTES))
        self._thread = threading.Thread(target=self._run, name="vmstate", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the end of the stream; if it does not come, the backup is broken."""
        self._thread.join(_END_S)
        if self._thread.is_alive():
            self._spool.fail(BackupBroken("the stream of the VM's memory does not end"))

    def wait(self) -> None:
        """Until QEMU has ended the stream, however long that takes."""
        self._thread.join()

    def _run(self) -> None:
        with self._stream:
            offset = 0
            while length := self._take(offset):
                offset += length

    def _take(self, offset: int) -> int:
        """Take what comes next; returns how much it was, 0 at the end."""
        room = self._spool.room(MAX_BUFFER_BYTES, timeout_s=self._max_guest_stall_s, background=True)
        if room is None:
            self._spool.fail(
                BackupBroken(f"no memory of the VM was taken for {self._max_guest_stall_s:g} s; the guest goes first")
            )
            return self._receive(self._waste)
        length = self._receive(room)
        if length:
            self._spool.write(self._disk, offset, room, length)
        else:
            self._spool.give_back(room)
        return length

    def _receive(self, room: memoryview) -> int:
        with contextlib.suppress(OSError):  # QEMU has died: whoever controls it notices
            return self._stream.recv_into(room, 0, socket.MSG_WAITALL)
        return 0


def drained(stream: socket.socket) -> threading.Thread:
    """A running thread that drops everything up to the end of a stream, in the place of a sink that is gone."""
    waste = bytearray(MAX_BUFFER_BYTES)

    def drain() -> None:
        with contextlib.suppress(OSError):
            while stream.recv_into(waste):
                pass

    thread = threading.Thread(target=drain, name="vmstate-drain", daemon=True)
    thread.start()
    return thread
