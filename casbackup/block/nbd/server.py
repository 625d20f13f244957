"""An NBD server: devices under names, for any client of the fixed newstyle protocol.

One blocking thread a connection, which is faster than an event loop in Python: the kernel fills and empties the
buffers with the GIL released. Connections share their export's device.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from casbackup import limits
from casbackup.block.device import Closing
from casbackup.block.nbd import listen
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.haggling import Chosen, Haggling
from casbackup.block.nbd.session import Session
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.nbd.wire import Wire
from casbackup.errors import CasbackupError, NbdConnectionFailed, UsageError

_POLL_MS = 50
"""How soon a thread that waits for connections sees that the server stops."""
_PAUSE_S = 0.1
"""After an accept that failed, for instance for lack of descriptors: the next one would, too."""


def _nobody(_message: str) -> None:
    """Nobody wants to know."""


class NbdServer(Closing):
    """Serves from ``listen`` to ``close``. Whatever a client sends costs at most its own connection."""

    def __init__(
        self,
        exports: Sequence[Export],
        *,
        tls: ssl.SSLContext | None = None,
        handshake_timeout_s: float = limits.NBD_HANDSHAKE_TIMEOUT_S,
        stall_timeout_s: float = limits.NBD_STALL_TIMEOUT_S,
        max_connections: int = limits.MAX_NBD_CONNECTIONS,
        report: Callable[[str], None] = _nobody,
    ) -> None:
        """``tls``: demanded of every client. ``report``: told, in any thread, why connections ended badly.

        ``stall_timeout_s``: how long a request may take to arrive, or its reply to be taken, once begun;
        ``math.inf`` for ever. Between requests a client may be silent as long as it likes.

        :raise UsageError: when two exports have the same name.
        """
        self._exports = {export.encoded_name: export for export in exports}
        if len(self._exports) != len(exports):
            raise UsageError("two exports have the same name")
        self._tls = tls
        self._handshake_timeout_s = handshake_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._max_connections = max_connections
        self._report = report
        self._listeners: list[tuple[socket.socket, NbdAddress]] = []
        self._accepting: list[threading.Thread] = []
        self._connections: dict[threading.Thread, Wire] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._connections)

    def listen(self, address: NbdAddress) -> NbdAddress:
        """Listen on an address more, and serve whoever connects. Returns the address with its real port.

        Errors as ``listen.listen``.
        """
        listener, actual = listen.listen(address)
        self._listeners.append((listener, actual))
        self.serve(listener)
        return actual

    def serve(self, listener: socket.socket) -> None:
        """Serve whoever connects to a socket that listens already. It stays the caller's.

        Other processes may accept from it, too; it is made non-blocking for that.
        """
        listener.setblocking(False)
        thread = threading.Thread(target=self._accept, args=(listener,), name="nbd-accept", daemon=True)
        self._accepting.append(thread)
        thread.start()

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Take no more connections and requests, answer those that have arrived, then end all connections.

        What is not done within ``timeout_s`` is cut off. Harmless when it is done already.
        """
        self._stop_listening()
        deadline = time.monotonic() + timeout_s
        with self._changed:
            for wire in self._connections.values():
                wire.stop_receiving()
            self._changed.wait_for(lambda: not self._connections, timeout_s)
            threads = list(self._connections)
            for wire in self._connections.values():
                wire.hang_up()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()) + _PAUSE_S)

    def _stop_listening(self) -> None:
        self._stopping.set()
        for thread in self._accepting:
            thread.join()
        for listener, address in self._listeners:
            listener.close()
            listen.remove(address)
        self._listeners.clear()

    def _accept(self, listener: socket.socket) -> None:
        """Until the server stops. Nothing is accepted after that: the socket may be somebody else's, too."""
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        while not self._stopping.is_set():
            if not waiting.poll(_POLL_MS):
                continue
            try:
                stream, peer = listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                self._report(f"a connection could not be accepted: {error.strerror}")
                self._stopping.wait(_PAUSE_S)
            else:
                self._welcome(stream, _peer_name(peer))

    def _welcome(self, stream: socket.socket, peer: str) -> None:
        """Serve a new connection in a thread of its own, if there is a place for it."""
        thread = threading.Thread(target=self._serve, name="nbd-connection", daemon=True)
        try:
            if stream.family != socket.AF_UNIX:
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # it may vanish between requests
            wire = Wire(stream, peer, self._handshake_timeout_s)
            with self._changed:
                if len(self._connections) >= self._max_connections:
                    raise NbdConnectionFailed(f"{peer}: refused, there are {self._max_connections} connections")
                self._connections[thread] = wire
                thread.start()
        except (OSError, RuntimeError, CasbackupError) as error:  # no descriptors, no threads, no place
            self._connections.pop(thread, None)
            stream.close()
            self._report(str(error))

    def _serve(self) -> None:
        """One connection, in its thread, from the handshake to its end."""
        thread = threading.current_thread()
        wire = self._connections[thread]
        try:
            chosen = self._haggle(thread, wire)
            if chosen is not None:
                self._transmit(self._connections[thread], chosen)
        except CasbackupError as error:
            self._report(error.message)
        except Exception as error:  # noqa: BLE001  the edge: no client may bring the server down
            self._report(f"{wire.peer}: {type(error).__name__}: {error}")
        finally:
            with self._changed:
                self._connections.pop(thread).close()
                self._changed.notify_all()

    def _haggle(self, thread: threading.Thread, wire: Wire) -> Chosen | None:
        haggling = Haggling(wire, self._exports, self._tls)
        try:
            return haggling.run()
        finally:
            with self._changed:
                self._connections[thread] = haggling.wire  # with TLS it is another one

    def _transmit(self, wire: Wire, chosen: Chosen) -> None:
        try:
            wire.set_timeout(self._stall_timeout_s)
            if not self._stopping.is_set():
                Session(wire, chosen).run()
        finally:
            chosen.export.release()


def _peer_name(peer: object) -> str:
    """How messages name a client; one on a unix socket has no address."""
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "a local client"
