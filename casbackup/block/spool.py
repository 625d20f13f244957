"""A backlog that a thread of its own hands to a consumer."""

from __future__ import annotations

import threading
from typing import Protocol

from casbackup.block.backlog import Backlog, Piece
from casbackup.block.buffers import MAX_BUFFER_BYTES, BufferPool
from casbackup.block.device import BlockDevice
from casbackup.buffers import aligned_buffer
from casbackup.errors import BackupBroken, CasbackupError
from casbackup.limits import SINK_MEMORY_BYTES
from casbackup.units import MiB

_WINDOW_BYTES = 2 * MiB
"""The thread has so much in its hands; the rest may still go to the overflow."""


class Consumer(Protocol):
    """Gets every range of every disk once, in any order, in one thread that is not the caller's.

    It may raise any error; that breaks the backup. ``data`` is valid until it returns: it copies what it keeps.
    """

    def write(self, disk: str, offset: int, data: memoryview) -> None: ...

    def zero(self, disk: str, offset: int, length: int) -> None: ...


class Spool(Backlog):
    """Hands pieces of several disks to one consumer. Any number of threads may put pieces in."""

    def __init__(
        self, consumer: Consumer, *, limit_bytes: int = SINK_MEMORY_BYTES, overflow: BlockDevice | None = None
    ) -> None:
        """Starts the thread that calls ``consumer``. ``limit_bytes``: of the memory for data not yet consumed.

        ``overflow``: as for ``Backlog``.

        :raise ValueError: for a limit below 2 MiB.
        """
        super().__init__(BufferPool(limit_bytes), overflow)
        self._consumer = consumer
        self._buffer = memoryview(aligned_buffer(MAX_BUFFER_BYTES)) if overflow is not None else memoryview(b"")
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def close(self, *, timeout_s: float = 5.0) -> None:
        """End the thread; what it has not begun is dropped. A consumer that hangs is left behind."""
        self.fail(BackupBroken("the backup was ended"))
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while pieces := self.take(_WINDOW_BYTES):
            for piece in pieces:
                if self.failure is None:
                    self._try_to_consume(piece)
                self.consumed([piece])

    def _try_to_consume(self, piece: Piece) -> None:
        try:
            self._consume(piece)
        except CasbackupError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001  whatever the consumer does, the guest goes on
            self.fail(BackupBroken(f"the backup failed inside: {type(error).__name__}: {error}"))

    def _consume(self, piece: Piece) -> None:
        if piece.zero:
            self._consumer.zero(piece.disk, piece.offset, piece.length)
        else:
            self._consumer.write(piece.disk, piece.offset, self._data(piece))

    def _data(self, piece: Piece) -> memoryview:
        if piece.room is not None:
            return piece.room[: piece.length]
        assert self._overflow is not None
        data = self._buffer[: piece.length]
        self._overflow.read_into(piece.position, data)
        return data
