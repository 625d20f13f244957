"""A client of QMP, QEMU's monitor in JSON (docs/interop/qmp-spec.rst of QEMU). Synchronous, for any number of threads.

One thread reads. It hands each answer to whoever waits for it, and keeps the latest events. The library ``qemu.qmp``
does the same with asyncio; importing it takes 134 ms, this module 6, and the process beside the guest wants to stay
small.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from casbackup.block.device import Closing
from casbackup.errors import (
    QmpCommandFailed,
    QmpError,
    QmpLost,
    QmpProtocolError,
    QmpTimeout,
    QmpUnreachable,
)
from casbackup.units import KiB, MiB

TIMEOUT_S = 30.0
"""For one command. Most take milliseconds; a transaction drains the guest's requests."""
_CONNECT_TIMEOUT_S = 10.0
_MAX_MESSAGE_BYTES = 64 * MiB
_RECEIVE_BYTES = 64 * KiB
_EVENTS = 1024
"""Events that are kept; nobody relies on one, since what it tells can be asked for."""
_CREDENTIALS = struct.Struct("3i")


class Event(NamedTuple):
    """Something that QEMU told unasked."""

    name: str
    data: Mapping[str, Any]


class Peer(NamedTuple):
    """Who listens at the other end of the socket: usually QEMU itself."""

    pid: int
    uid: int
    gid: int


class QmpClient(Closing):
    """A connection that has been through the handshake."""

    def __init__(self, stream: socket.socket, path: str) -> None:
        """Takes over ``stream``. Use ``connect``."""
        self.path = path
        self.version: tuple[int, int, int] = 0, 0, 0
        self.peer = Peer(*_CREDENTIALS.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
        self._stream = stream
        self._lines = _Lines(stream)
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._answers: dict[int, dict[str, Any] | None] = {}
        self._events: deque[Event] = deque(maxlen=_EVENTS)
        self._next_id = 1
        self._over: QmpError | None = None
        self._reader = threading.Thread(target=self._read, name="qmp", daemon=True)

    @classmethod
    def connect(cls, path: str, *, timeout_s: float = _CONNECT_TIMEOUT_S) -> QmpClient:
        """Connect to a unix socket and agree on capabilities.

        :raise QmpUnreachable: when nobody listens, or somebody else has the monitor.
        :raise QmpProtocolError: when what is there is not QMP.
        """
        client = cls(_connected(path, timeout_s), path)
        try:
            client._greet()
            client._stream.settimeout(None)
            client._reader.start()
            client.execute("qmp_capabilities", timeout_s=timeout_s)
        except BaseException:
            client.close()
            raise
        return client

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        fds: Sequence[int] = (),
    ) -> Any:
        """Run a command and return what it returns. ``fds``: open files that go with it.

        :raise QmpCommandFailed: when QEMU refuses. :raise QmpTimeout: when it does not answer in time.
        :raise QmpLost: when the connection has ended.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        with self._changed:
            request["id"] = number = self._next_id
            self._next_id += 1
            self._answers[number] = None
        try:
            self._send(request, fds)
            return _result(command, self._answer(number, command, timeout_s))
        finally:
            with self._changed:
                self._answers.pop(number, None)

    def pass_fd(self, name: str, fd: int) -> None:
        """Give QEMU a copy of an open file, by which it can be told to use it under ``name``. Errors as ``execute``."""
        self.execute("getfd", {"fdname": name}, fds=[fd])

    def wait_event(self, timeout_s: float) -> Event | None:
        """The oldest event that nobody took yet; None when none came in time.

        :raise QmpLost: when the connection has ended and all events are taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._over is not None, timeout_s)
            if self._events:
                return self._events.popleft()
            if self._over is not None:
                raise _again(self._over)
            return None

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        return self._over is not None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        if self._reader.is_alive():
            self._reader.join()
        self._stream.close()

    def _greet(self) -> None:
        try:
            greeting = self._lines.next()
            qemu = greeting["QMP"]["version"]["qemu"]
            self.version = qemu["major"], qemu["minor"], qemu["micro"]
        except TimeoutError as error:
            raise QmpUnreachable(f"{self.path}: no greeting came: another client has the monitor") from error
        except (OSError, QmpLost) as error:
            raise QmpUnreachable(f"{self.path}: the connection was closed at once") from error
        except (KeyError, TypeError) as error:
            raise QmpProtocolError(f"{self.path} does not greet like a QMP monitor") from error

    def _send(self, request: Mapping[str, Any], fds: Sequence[int]) -> None:
        data = json.dumps(request).encode() + b"\n"
        try:
            with self._sending:
                sent = socket.send_fds(self._stream, [data], fds) if fds else 0
                self._stream.sendall(data[sent:])
        except OSError as error:
            raise QmpLost(f"{self.path}: the connection to QEMU is lost: {error.strerror or error}") from error

    def _answer(self, number: int, command: str, timeout_s: float) -> Mapping[str, Any]:
        with self._changed:
            self._changed.wait_for(lambda: self._answers[number] is not None or self._over is not None, timeout_s)
            answer = self._answers[number]
            if answer is None and self._over is not None:
                raise _again(self._over)
        if answer is None:
            raise QmpTimeout(f"{self.path}: QEMU did not answer {command} within {timeout_s:g} s")
        return answer

    def _read(self) -> None:
        try:
            while True:
                self._dispatch(self._lines.next())
        except OSError as error:
            self._end(QmpLost(f"{self.path}: the connection to QEMU is lost: {error.strerror or error}"))
        except QmpError as error:
            self._end(error)

    def _dispatch(self, message: Mapping[str, Any]) -> None:
        with self._changed:
            if "event" in message:
                self._events.append(Event(str(message["event"]), message.get("data") or {}))
            elif message.get("id") in self._answers:
                self._answers[message["id"]] = dict(message)
            self._changed.notify_all()

    def _end(self, error: QmpError) -> None:
        with self._changed:
            self._over = error
            self._changed.notify_all()


class _Lines:
    """JSON objects, one a line."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._buffer = bytearray()

    def next(self) -> dict[str, Any]:
        """:raise QmpLost: at the end. :raise QmpProtocolError: for what is no JSON object. :raise OSError: as recv."""
        scanned = 0
        while (end := self._buffer.find(b"\n", scanned)) < 0:
            scanned = len(self._buffer)
            received = self._stream.recv(_RECEIVE_BYTES)
            if not received:
                raise QmpLost("QEMU closed the connection: it has quit or crashed")
            self._buffer += received
            if len(self._buffer) > _MAX_MESSAGE_BYTES:
                raise QmpProtocolError(f"a message of more than {_MAX_MESSAGE_BYTES} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return _parsed(line)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QmpProtocolError(f"not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise QmpProtocolError(f"not a JSON object: {line[:80]!r}")
    return message


def _result(command: str, answer: Mapping[str, Any]) -> Any:
    error = answer.get("error")
    if error is not None:
        raise QmpCommandFailed(f"QEMU refused {command}: {error.get('desc', error)}")
    return answer.get("return")


def _connected(path: str, timeout_s: float) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                stream.connect(path)
                return stream
            except BlockingIOError:  # the backlog is full: others are waiting, too
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
    except OSError as error:
        stream.close()
        raise QmpUnreachable(f"{path}: no QMP monitor there: {error.strerror or error}") from error
    except BaseException:
        stream.close()
        raise


def _again(error: QmpError) -> QmpError:
    """The same error for one more caller: an exception object belongs to one thread's traceback."""
    return type(error)(error.message)
