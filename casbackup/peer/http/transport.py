"""Requests to one server: a pool of connections, and patience with what passes.

What passes is tried again: no connection, a broken one, a server that is busy (429, 502, 503, 504). Everything else is
final. So every request must be one that may be made twice.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError

from casbackup import __version__
from casbackup.errors import UsageError
from casbackup.peer.http.address import Address
from casbackup.peer.http.patience import PATIENCE_S, Patience
from casbackup.peer.http.problems import failure_of
from casbackup.peer.http.unreachable import not_reached
from casbackup.spec.wire import BINARY

_ANSWER_S = 300.0
"""A commit waits for the server's disk, and a body for a slow line."""
_TIMEOUT = urllib3.Timeout(connect=10.0, read=_ANSWER_S)
_BRIEF = urllib3.Timeout(connect=3.0, read=5.0)
_SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
]
"""A machine that does not even acknowledge what arrives is gone after a minute."""
_CONNECTIONS = 32
_SENT_BYTES = 256 * 1024
"""So much must go out within ``_ANSWER_S``."""

T = TypeVar("T")


class Credentials(NamedTuple):
    """``token`` None: the server wants none. ``cacert``: a file of certificates to trust besides the system's."""

    token: str | None = None
    cacert: str | None = None

    def __repr__(self) -> str:
        return "Credentials(...)"


ANONYMOUS = Credentials()


class Transport:
    """Safe from several threads."""

    def __init__(
        self,
        address: Address,
        credentials: Credentials = ANONYMOUS,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._address = address
        self._patience = Patience(patience_s)
        self._headers = {"User-Agent": f"casbackup/{__version__}"}
        if credentials.token is not None:
            self._headers["Authorization"] = f"Bearer {credentials.token}"
        self._connections = _Connections()
        self._pool = _pool(address, credentials)
        self._pool.ConnectionCls = self._connections.kind(self._pool.ConnectionCls)

    @property
    def name(self) -> str:
        """The server, for messages."""
        return f"{self._address.scheme}://{self._address.host}:{self._address.port}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        content_type: str = BINARY,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        is_last_word: bool = False,
    ) -> bytes:
        """The body of a successful answer. ``is_last_word``: of little consequence, so it is tried once and briefly.

        :raise ServerUnreachable, ServerBusy: when patience did not help. :raise CasbackupError: what the server says.
        """

        def once() -> bytes:
            timeout = _BRIEF if is_last_word or self._patience.is_lost else _TIMEOUT
            with self._answer(method, path, body, content_type, headers, query, timeout) as response:
                return response.data

        return self._patience.run(once, only_once=is_last_word)

    @contextlib.contextmanager
    def stream(
        self, method: str, path: str, body: bytes | None = None, *, headers: Mapping[str, str] | None = None
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """A successful answer, its body yet to be read. Not tried again.

        :raise ServerUnreachable: when the connection breaks, while the body is read too.
        """
        with self._answer(method, path, body, BINARY, headers, None, _TIMEOUT) as response:
            yield response

    def patiently(self, action: Callable[[], T]) -> T:
        """Do it until it succeeds, fails for good, or takes too long."""
        return self._patience.run(action)

    def give_up(self, within_s: float) -> None:
        """Try nothing again from now on, and break what connections there are then."""
        self._patience.end()
        timer = threading.Timer(within_s, self._connections.break_all)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        self._pool.close()

    @contextlib.contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        body: bytes | None,
        content_type: str,
        headers: Mapping[str, str] | None,
        query: Mapping[str, str] | None,
        timeout: urllib3.Timeout,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        sent = {**self._headers, **(headers or {})}
        if body is not None:
            sent["Content-Type"] = content_type
        target = f"{path}?{_encoded(query)}" if query else path
        try:
            response = self._pool.urlopen(
                method,
                target,
                body=body,
                headers=sent,
                redirect=False,
                preload_content=False,
                decode_content=False,
                timeout=timeout,
            )
            complete = False
            try:
                if response.status >= 300:
                    raise failure_of(response.status, response.read())
                self._patience.answered()
                yield response
                complete = True
            finally:
                _give_back(response, complete=complete)
        except (HTTPError, OSError) as error:
            raise not_reached(self.name, error, has_answered=self._patience.has_succeeded) from error


class _Connections:
    """The connections of a pool."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: weakref.WeakSet[HTTPConnection] = weakref.WeakSet()

    def kind(self, base: type[Any]) -> type[Any]:
        """A class of connections that are known here, and patient while they send."""
        connections = self

        class Known(base):  # type: ignore[misc]
            def connect(self) -> None:
                super().connect()
                with connections._lock:
                    connections._made.add(self)

            def send(self, data: Any) -> None:
                """By itself it would give up when all has not gone out within the time for connecting."""
                if self.sock is None:
                    self.connect()
                self.sock.settimeout(_ANSWER_S)
                view = memoryview(data)
                for start in range(0, len(view), _SENT_BYTES):
                    super().send(view[start : start + _SENT_BYTES])

        return Known

    def break_all(self) -> None:
        with self._lock:
            made = list(self._made)
        for connection in made:
            found = connection.sock
            if found is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(found, socket.SHUT_RDWR)  # TLS would want to say good-bye


def _give_back(response: urllib3.BaseHTTPResponse, *, complete: bool) -> None:
    """A connection whose answer was read to its end is used again; another one cannot be."""
    if not complete:
        with contextlib.suppress(HTTPError, OSError):
            response.close()
    response.release_conn()


def _pool(address: Address, credentials: Credentials) -> urllib3.HTTPConnectionPool:
    settings: dict[str, Any] = {
        "maxsize": _CONNECTIONS,
        "block": False,
        "retries": False,
        "socket_options": _SOCKET_OPTIONS,
    }
    if address.scheme == "http":
        return urllib3.HTTPConnectionPool(address.host, address.port, **settings)
    return urllib3.HTTPSConnectionPool(address.host, address.port, ssl_context=_trust(credentials), **settings)


def _trust(credentials: Credentials) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if credentials.cacert is not None:
        try:
            context.load_verify_locations(cafile=credentials.cacert)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"{credentials.cacert} is no file of certificates: {error}") from error
    return context


def _encoded(query: Mapping[str, str]) -> str:
    return urlencode(query)
