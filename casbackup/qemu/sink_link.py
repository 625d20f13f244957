"""What the sink and the backup say to each other, over two socket pairs.

**Data**, from the sink: a header of 24 bytes, for data followed by ``length`` bytes, at most 1 MiB:

    off len field     (little-endian)
      0   1 kind      1 data, 2 zeros, 3 end: all has come
      1   1 zero
      2   2 disk      its number
      4   4 zero
      8   8 offset
     16   8 length

**Control**, both ways: one JSON object a line. The end of the control connection means that the other side is dead.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from struct import Struct
from typing import Any, NamedTuple

from casbackup.block.buffers import MAX_BUFFER_BYTES
from casbackup.block.spool import Consumer
from casbackup.buffers import aligned_buffer
from casbackup.errors import SinkLost
from casbackup.units import KiB, MiB

_HEADER = Struct("<BxH4xQQ")
_DATA, _ZERO, _END = 1, 2, 3
_SOCKET_BUFFER_BYTES = 4 * MiB
"""As much of it as the system's limits permit: fewer switches between the two processes."""
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
    data, control = socket.socketpair(), socket.socketpair()
    for end in data:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
    return Link(data[0], control[0]), Link(data[1], control[1])


class DataSender:
    """The sink's end of the data: a consumer of its spool. The disks of a spool are numbers here."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        """:raise SinkLost: when nobody takes the data any more."""
        self._send(_HEADER.pack(_DATA, int(disk), offset, len(data)), data)

    def zero(self, disk: str, offset: int, length: int) -> None:
        """Errors as ``write``."""
        self._send(_HEADER.pack(_ZERO, int(disk), offset, length), memoryview(b""))

    def end(self) -> None:
        """All has been sent. Errors as ``write``."""
        self._send(_HEADER.pack(_END, 0, 0, 0), memoryview(b""))

    def _send(self, header: bytes, data: memoryview) -> None:
        try:
            sent = self._stream.sendmsg([header, data])
            if sent < len(header):
                self._stream.sendall(header[sent:])
                sent = len(header)
            if sent < len(header) + len(data):
                self._stream.sendall(data[sent - len(header) :])
        except OSError as error:
            raise SinkLost(f"the backup takes no more data: {error.strerror}") from error


def receive_all(stream: socket.socket, consumer: Consumer) -> bool:
    """The backup's end of the data: hand everything to ``consumer``. False when it ended before it was complete.

    Errors are those of the consumer.
    """
    header = memoryview(bytearray(_HEADER.size))
    buffer = memoryview(aligned_buffer(MAX_BUFFER_BYTES))
    while _receive(stream, header):
        kind, disk, offset, length = _HEADER.unpack(header)
        if kind == _END:
            return True
        if kind == _ZERO:
            consumer.zero(str(disk), offset, length)
        elif _receive(stream, buffer[:length]):
            consumer.write(str(disk), offset, buffer[:length])
        else:
            return False
    return False


def _receive(stream: socket.socket, view: memoryview) -> bool:
    """Fill ``view``; False when the other side is gone."""
    got = 0
    while got < len(view):
        try:
            received = stream.recv_into(view[got:], 0, socket.MSG_WAITALL)
        except OSError:
            return False
        if not received:
            return False
        got += received
    return True


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
