"""A network in a box: passes TCP on with latency, at a bandwidth, and breaks connections after so many bytes."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from types import TracebackType

_PIECE_BYTES = 16 * 1024
_AHEAD = 4096


class Proxy:
    """Listens on ``port`` of the loopback and passes on to ``target``. Settings may be changed at any time.

    ``latency_s`` is that of one way. ``bytes_per_s`` is shared by all connections of one direction, 0: as fast as it
    goes. When ``cut_after_bytes`` more have passed in both directions, all connections break, and it becomes None.
    """

    def __init__(
        self,
        target: int,
        *,
        latency_s: float = 0.0,
        bytes_per_s: float = 0.0,
        cut_after_bytes: int | None = None,
    ) -> None:
        self._target = target
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.cut_after_bytes = cut_after_bytes
        self.passed_bytes = 0
        self.connections = 0
        self.cuts = 0
        self.recorded: list[bytearray] | None = None
        """A list: all that passes is kept in it, an array for each connection and direction."""
        self._lock = threading.Lock()
        self._free_at_s = {True: 0.0, False: 0.0}
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.cut()

    def cut(self) -> None:
        """Break all connections, without a word."""
        with self._lock:
            broken, self._open = self._open, set()
        for end in broken:
            with contextlib.suppress(OSError):
                # The other end is told at once, also if it is just sending; else it may wait until it times out.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {near, far}
            self._pass_on(near, far, upwards=True)
            self._pass_on(far, near, upwards=False)

    def _pass_on(self, source: socket.socket, target: socket.socket, *, upwards: bool) -> None:
        """One direction: a thread takes and stamps pieces, another gives them when they are due."""
        due: queue.Queue[tuple[float, bytes]] = queue.Queue(_AHEAD)
        record = bytearray()
        if self.recorded is not None:
            self.recorded.append(record)
        threading.Thread(target=self._take, args=(source, due, upwards, record), daemon=True).start()
        threading.Thread(target=self._give, args=(target, due), daemon=True).start()

    def _take(
        self, source: socket.socket, due: queue.Queue[tuple[float, bytes]], upwards: bool, record: bytearray
    ) -> None:
        piece = b" "
        while piece:
            try:
                piece = source.recv(_PIECE_BYTES)
            except OSError:
                piece = b""
            if self.recorded is not None:
                record += piece
            due.put((self._time_of(len(piece), upwards), piece))

    def _give(self, target: socket.socket, due: queue.Queue[tuple[float, bytes]]) -> None:
        while True:
            at_s, piece = due.get()
            time.sleep(max(0.0, at_s - time.monotonic()))
            try:
                if not piece:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(piece)
            except OSError:
                return
            if self._counted(len(piece)):  # here, so that something has always got through
                self.cut()

    def _time_of(self, size: int, upwards: bool) -> float:
        """When a piece that came now has got through."""
        with self._lock:
            begins_s = max(time.monotonic(), self._free_at_s[upwards])
            takes_s = size / self.bytes_per_s if self.bytes_per_s else 0.0
            self._free_at_s[upwards] = begins_s + takes_s
            return begins_s + takes_s + self.latency_s

    def _counted(self, size: int) -> bool:
        """Is it time to cut?"""
        with self._lock:
            self.passed_bytes += size
            if self.cut_after_bytes is None:
                return False
            self.cut_after_bytes -= size
            if self.cut_after_bytes > 0:
                return False
            self.cut_after_bytes = None
            self.cuts += 1
            return True
