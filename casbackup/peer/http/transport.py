"""Requests to one server: a pool of connections, and patience with what passes.

What passes is tried again: no connection, a broken one, a server that is busy (429, 502, 503, 504). Everything else is
final. A server that has never answered gets ``FIRST_PATIENCE_S``, one that has ``PATIENCE_S``: it may be restarting.
So every request must be one that may be made twice.
"""

from __future__ import annotations

import contextlib
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import urllib3
from urllib3.exceptions import HTTPError, NameResolutionError, SSLError

from casbackup import __version__
from casbackup.errors import CasbackupError, ServerBusy, ServerUnreachable, UsageError
from casbackup.peer.http.address import Address
from casbackup.peer.http.problems import failure_of
from casbackup.spec.wire import BINARY

FIRST_PATIENCE_S = 3.0
PATIENCE_S = 120.0

_CONNECT_S = 10.0
_ANSWER_S = 300.0
"""A commit waits for the server's disk."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_CONNECTIONS = 32

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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address = address
        self._patience_s = patience_s
        self._sleep = sleep
        self._reached = False
        self._jitter = random.Random()  # not the one that all of the process shares
        self._headers = {"User-Agent": f"casbackup/{__version__}"}
        if credentials.token is not None:
            self._headers["Authorization"] = f"Bearer {credentials.token}"
        self._pool = _pool(address, credentials)

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
    ) -> bytes:
        """The body of a successful answer.

        :raise ServerUnreachable, ServerBusy: when patience did not help. :raise CasbackupError: what the server says.
        """

        def once() -> bytes:
            with self._answer(method, path, body, content_type, headers, query) as response:
                return response.data

        return self.patiently(once)

    @contextlib.contextmanager
    def stream(
        self, method: str, path: str, body: bytes | None = None, *, headers: Mapping[str, str] | None = None
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """A successful answer, its body yet to be read. Not tried again.

        :raise ServerUnreachable: when the connection breaks, while the body is read too.
        """
        with self._answer(method, path, body, BINARY, headers, None) as response:
            yield response

    def patiently(self, action: Callable[[], T]) -> T:
        """Do it until it succeeds, fails for good, or takes too long."""
        deadline: float | None = None
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return action()
            except (ServerUnreachable, ServerBusy) as failure:
                if failure.__dict__.get("final"):
                    raise
                now = time.monotonic()
                if deadline is None:
                    deadline = now + (self._patience_s if self._reached else min(FIRST_PATIENCE_S, self._patience_s))
                if now + pause > deadline:
                    raise
            self._sleep(pause * self._jitter.uniform(0.75, 1.25))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

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
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        sent = {**self._headers, **(headers or {})}
        if body is not None:
            sent["Content-Type"] = content_type
        target = f"{path}?{_encoded(query)}" if query else path
        try:
            response = self._pool.urlopen(
                method, target, body=body, headers=sent, redirect=False, preload_content=False, decode_content=False
            )
            complete = False
            try:
                if response.status >= 300:
                    raise failure_of(response.status, response.read())
                self._reached = True
                yield response
                complete = True
            finally:
                _give_back(response, complete=complete)
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> CasbackupError:
        failure = ServerUnreachable(f"{self.name} cannot be reached: {_reason(error)}")
        failure.__dict__["final"] = isinstance(error, SSLError | NameResolutionError)
        return failure


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
        "timeout": urllib3.Timeout(connect=_CONNECT_S, read=_ANSWER_S),
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


def _reason(error: Exception) -> str:
    """The innermost cause, without the objects that urllib3 prints around it."""
    while error.__cause__ is not None or error.__context__ is not None:
        inner = error.__cause__ or error.__context__
        if not isinstance(inner, HTTPError | OSError):
            break
        error = inner
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rpartition(": ")[2] or type(error).__name__
