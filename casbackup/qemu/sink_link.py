"""What the sink and the backup say to each other, over two socket pairs.

Data itself does not pass through them: it lies in memory, or in a file, that both processes have.

**Pieces**, from the sink, 32 bytes each:

    off len field     (little-endian)
      0   1 kind      1 data in memory, 2 zeros, 3 end: all has been consumed, 4 data in the overflow
      1   1 zero
      2   2 disk      its number
      4   4 zero
      8   8 offset
     16   8 length    of data at most 1 MiB
     24   8 position  where the data is

Back come numbers of 4 bytes: so many more pieces, in their order, have been consumed, and their places are free.

**Control**, both ways: one JSON object a line. The end of the control connection means that the other side is dead.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from mmap import mmap
from struct import Struct
from typing import Any, NamedTuple

from casbackup.block.backlog import Backlog, Piece
from casbackup.block.buffers import MAX_BUFFER_BYTES
from casbackup.block.device import BlockDevice
from casbackup.block.spool import Consumer
from casbackup.buffers import aligned_buffer
from casbackup.errors import BackupBroken, SinkLost
from casbackup.units import KiB, MiB

_PIECE = Struct("<BxH4xQQQ")
_DATA, _ZERO, _END, _OVERFLOWN = 1, 2, 3, 4
_COUNT = Struct("<I")
_WINDOW_BYTES = 4 * MiB
"""The backup is told of so much at a time; the rest may still go to the overflow."""
_MOST_PIECES = 64
_REPORTED_BYTES = 1 * MiB
"""The sink is told of places that are free when there are so many, or nothing else to do."""
_MAX_MESSAGE_BYTES = 64 * KiB


class Link(NamedTuple):
    """One side's ends."""

    data: socket.socket
    control: socket.socket

    def close(self) -> None:
        self.data.close()
        self.control.close()


def new_link() -> tuple[Link, Link]:
    """The backup's side and the sink's."""
    data, control = socket.socketpair(type=socket.SOCK_SEQPACKET), socket.socketpair()
    return Link(data[0], control[0]), Link(data[1], control[1])


class Sender:
    """The sink's end of the data: tells the backup where the pieces of a backlog are. Disks are numbers here."""

    def __init__(self, stream: socket.socket, backlog: Backlog) -> None:
        self._stream = stream
        self._backlog = backlog
        self._sent: deque[Piece] = deque()

    def start(self) -> None:
        """Two threads, until the connection ends or the backup is broken."""
        for work in (self._send_all, self._receive_counts):
            threading.Thread(target=self._guarded, args=(work,), name="sink-link", daemon=True).start()

    def end(self) -> None:
        """All has been consumed. :raise SinkLost: when nobody listens any more."""
        try:
            self._stream.send(_PIECE.pack(_END, 0, 0, 0, 0))
        except OSError as error:
            raise _gone(error) from error

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self._backlog.fail(_gone(error))
        except Exception as error:  # noqa: BLE001  whatever happens here, the guest goes on
            self._backlog.fail(BackupBroken(f"the sink failed inside: {type(error).__name__}: {error}"))

    def _send_all(self) -> None:
        while pieces := self._backlog.take(_WINDOW_BYTES):
            self._sent += pieces
            for start in range(0, len(pieces), _MOST_PIECES):
                self._stream.send(b"".join([self._packed(piece) for piece in pieces[start : start + _MOST_PIECES]]))

    def _packed(self, piece: Piece) -> bytes:
        kind = _ZERO if piece.zero else _DATA if piece.room is not None else _OVERFLOWN
        return _PIECE.pack(kind, int(piece.disk), piece.offset, piece.length, self._backlog.position(piece))

    def _receive_counts(self) -> None:
        while count := self._stream.recv(_COUNT.size):
            (consumed,) = _COUNT.unpack(count)
            self._backlog.consumed([self._sent.popleft() for _ in range(consumed)])
        self._backlog.fail(SinkLost("the backup takes no more data"))


class Receiver:
    """The backup's end of the data."""

    def __init__(self, stream: socket.socket, memory: mmap, overflow: BlockDevice | None) -> None:
        """``memory`` and ``overflow`` are those of the sink."""
        self._stream = stream
        self._memory = memoryview(memory)
        self._overflow = overflow
        self._buffer = memoryview(b"") if overflow is None else memoryview(aligned_buffer(MAX_BUFFER_BYTES))

    def receive_all(self, consumer: Consumer) -> bool:
        """Hand everything to ``consumer``. False when it ended before it was complete.

        Errors are those of the consumer, and of reading the overflow.
        """
        for pieces in self._packets():
            count = count_bytes = 0
            for kind, disk, offset, length, position in _PIECE.iter_unpack(pieces):
                if kind == _END:
                    return True
                if kind == _ZERO:
                    consumer.zero(str(disk), offset, length)
                else:
                    consumer.write(str(disk), offset, self._data(kind, position, length))
                    count_bytes += length
                count += 1
                if count_bytes >= _REPORTED_BYTES:
                    self._report(count)
                    count = count_bytes = 0
            self._report(count)
        return False

    def _packets(self) -> Iterator[memoryview]:
        """Pieces that came together, until the connection ends."""
        buffer = memoryview(bytearray(_MOST_PIECES * _PIECE.size))
        with contextlib.suppress(OSError):
            while received := self._stream.recv_into(buffer):
                yield buffer[:received]

    def _data(self, kind: int, position: int, length: int) -> memoryview:
        if kind == _DATA:
            return self._memory[position : position + length]
        assert self._overflow is not None
        data = self._buffer[:length]
        self._overflow.read_into(position, data)
        return data

    def _report(self, count: int) -> None:
        """So many more are consumed. That nobody listens any more, the next packet shows by not coming."""
        if count:
            with contextlib.suppress(OSError):
                self._stream.send(_COUNT.pack(count))


def _gone(error: OSError) -> SinkLost:
    return SinkLost(f"the backup takes no more data: {error.strerror}")


class Messages:
    """One end of the control connection. Any thread may send, one receives."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> bool:
        """False when the other side is gone, or takes nothing."""
        try:
            with self._sending:
                self._stream.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self, timeout_s: float) -> list[dict[str, Any]] | None:
        """What came within the time, perhaps nothing; None when the other side is gone."""
        try:
            self._stream.settimeout(timeout_s)
            received = self._stream.recv(_MAX_MESSAGE_BYTES)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not received:
            return None
        self._buffer += received
        return list(self._complete())

    def _complete(self) -> Iterator[dict[str, Any]]:
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            yield json.loads(line)
