"""A connected stream socket that sends and receives exact amounts, and waits for nothing for ever."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import time

from casbackup.block.nbd.uri import NbdAddress
from casbackup.errors import CasbackupError, NbdConnectionFailed
from casbackup.fs import Buffer

_TIMEVAL = struct.Struct("@ll")


class Wire:
    """Blocking, with the kernel's own timeouts.

    Python's ``settimeout`` makes a socket non-blocking and so defeats MSG_WAITALL, which turns the five or
    more reads that a unix socket needs for 1 MiB into one call. One thread at a time.
    """

    def __init__(self, stream: socket.socket, peer: str, timeout_s: float) -> None:
        """Takes over ``stream``. ``peer``: how messages name the server."""
        self.peer = peer
        self._socket = stream
        self._socket.settimeout(None)
        self._timeout_s = 0.0
        self.set_timeout(timeout_s)

    @classmethod
    def connect(cls, address: NbdAddress, *, connect_timeout_s: float, timeout_s: float) -> Wire:
        """:raise NbdConnectionFailed: when nobody listens or it takes too long."""
        try:
            return cls(_connected(address, connect_timeout_s), str(address), timeout_s)
        except OSError as error:
            raise NbdConnectionFailed(f"{address}: no connection: {error.strerror or error}") from error

    @property
    def timeout_s(self) -> float:
        return self._timeout_s

    def set_timeout(self, timeout_s: float) -> None:
        """How long one send or receive may take from now on, in seconds; ``math.inf`` for ever."""
        if timeout_s != self._timeout_s:
            self._timeout_s = timeout_s
            self._apply_timeout(None if math.isinf(timeout_s) else timeout_s)

    def send(self, *buffers: Buffer) -> None:
        """Send all bytes of all buffers. :raise NbdConnectionFailed: when that is not possible in time."""
        rest = [memoryview(buffer) for buffer in buffers]
        deadline = time.monotonic() + self._timeout_s
        while rest:
            sent = self._send_some(rest, deadline)
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if sent:
                rest[0] = rest[0][sent:]

    def receive_into(self, view: memoryview) -> None:
        """Fill ``view``. :raise NbdConnectionFailed: when the peer closes or stalls before it is full."""
        got = self._receive_some(view)
        if got == len(view):
            return
        deadline = time.monotonic() + self._timeout_s
        while len(view) > got:
            view = view[got:]
            self.check(deadline)
            got = self._receive_some(view)

    def receive(self, length: int) -> bytes:
        """Exactly ``length`` bytes, which the caller has bounded. Errors as ``receive_into``."""
        buffer = bytearray(length)
        if length:
            self.receive_into(memoryview(buffer))
        return bytes(buffer)

    def receive_next(self, view: memoryview) -> bool:
        """As ``receive_into``, but waits for the first byte for ever. False when the peer closes before it."""
        while True:
            try:
                got = self._read(view)
                break
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._lost(error) from error
        if 0 < got < len(view):
            self.receive_into(view[got:])
        return got > 0

    def detach(self) -> socket.socket:
        """The socket without its wire, blocking; the wire is not to be used any more."""
        return self._socket

    def stop_receiving(self) -> None:
        """From another thread: what has arrived can still be received, then the connection looks closed."""
        self._shut_down(socket.SHUT_RD)

    def hang_up(self) -> None:
        """From another thread: whatever is under way fails now."""
        self._shut_down(socket.SHUT_RDWR)

    def check(self, deadline: float) -> None:
        """:raise NbdConnectionFailed: when the monotonic time ``deadline`` is over."""
        if time.monotonic() > deadline:
            raise self._timed_out()

    def close(self) -> None:
        self._shut_down(socket.SHUT_RDWR)
        self._socket.close()

    def _shut_down(self, how: int) -> None:
        """Without what TLS does besides, which would disturb a thread that is receiving."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, how)

    def _send_some(self, rest: list[memoryview], deadline: float) -> int:
        self.check(deadline)
        try:
            return self._write(rest)
        except BlockingIOError as error:
            raise self._timed_out() from error
        except OSError as error:
            raise self._lost(error) from error

    def _receive_some(self, view: memoryview) -> int:
        try:
            got = self._read(view)
        except BlockingIOError as error:
            raise self._timed_out() from error
        except OSError as error:
            raise self._lost(error) from error
        if not got:
            raise NbdConnectionFailed(f"{self.peer}: the other side closed the connection")
        return got

    def _apply_timeout(self, timeout_s: float | None) -> None:
        seconds, rest = divmod(timeout_s or 0.0, 1)
        value = _TIMEVAL.pack(int(seconds), max(int(rest * 1_000_000), int(timeout_s is not None and not seconds)))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)

    def _read(self, view: memoryview) -> int:
        """:raise BlockingIOError: when nothing came in time."""
        return self._socket.recv_into(view, len(view), socket.MSG_WAITALL)

    def _write(self, buffers: list[memoryview]) -> int:
        """:raise BlockingIOError: when nothing could be sent in time."""
        return self._socket.sendmsg(buffers)

    def _timed_out(self) -> CasbackupError:
        return NbdConnectionFailed(f"{self.peer}: no answer for {self._timeout_s:g} s")

    def _lost(self, error: OSError) -> CasbackupError:
        return NbdConnectionFailed(f"{self.peer}: the connection was lost: {error.strerror or error}")


def _connected(address: NbdAddress, timeout_s: float) -> socket.socket:
    if address.socket_path is None:
        stream = socket.create_connection((address.host, address.port), timeout_s)
        # Requests are small; waiting to fill a packet would add a round trip's delay to each.
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return stream
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(timeout_s)
        stream.connect(address.socket_path)
    except BaseException:
        stream.close()
        raise
    return stream
