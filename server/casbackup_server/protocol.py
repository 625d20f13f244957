"""uvicorn's HTTP protocol, more patient with bodies and less with heads.

By itself it would wait forever for somebody who connects and says nothing, or only half of it; and it would hand on
bodies in pieces of 64 KiB, each copied five times. Who knows how long a body is may have it put into its own memory by
the kernel instead: see ``direct_body``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Protocol, cast

import httptools
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from casbackup.errors import CasbackupError

HEAD_S = 20.0
"""How long the head of a request may take to come, and the first one after the connection."""


_AHEAD_BYTES = 128 * 1024
"""So much of a body is taken before somebody wants it."""

_EXTENSION = "casbackup.body"

Noted = Callable[[int], None]
"""Told how many bytes came. A CasbackupError that it raises ends the taking."""


def ignored(_: int) -> None: ...


class TakeBody(Protocol):
    def __call__(self, buffer: memoryview, noted: Noted = ignored) -> Awaitable[None]:
        """Fill memory of the body's length with the body, of which nothing was received yet.

        :raise ClientDisconnect: when the client went away. :raise CasbackupError: what ``noted`` raises.
        """


def direct_body(scope: MutableMapping[str, Any]) -> TakeBody | None:
    """How to take the body of this request, if the server can do it; other ASGI servers cannot."""
    found: TakeBody | None = scope.get("extensions", {}).get(_EXTENSION)
    return found


def set_direct_body(scope: MutableMapping[str, Any], take: TakeBody) -> None:
    scope["extensions"] = {**scope.get("extensions", {}), _EXTENSION: take}


class PatientProtocol(HttpToolsProtocol):
    """Closes a connection whose request's head does not come in time. There are no WebSockets."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._cancel()
        super().on_headers_complete()
        set_direct_body(cast("MutableMapping[str, Any]", self.scope), partial(self._take_body, self.cycle))

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) > _AHEAD_BYTES:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def body_taken(self) -> None:
        """The body came to its end behind the parser's back; a new parser waits for the next request."""
        self.parser = httptools.HttpRequestParser(self)
        self.on_message_complete()

    async def _take_body(self, cycle: RequestResponseCycle, buffer: memoryview, noted: Noted = ignored) -> None:
        if cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        ahead = len(cycle.body)
        buffer[:ahead] = cycle.body
        cycle.body = bytearray()
        noted(ahead)
        if cycle.disconnected:
            raise ClientDisconnect
        if ahead < len(buffer):
            await self._take_rest(_RestOfBody(self, buffer[ahead:], noted, self.loop.create_future()))

    async def _take_rest(self, rest: _RestOfBody) -> None:
        self.transport.set_protocol(rest)
        self.flow.resume_reading()
        try:
            await rest.ended
        finally:
            if rest.is_wanted:  # what still comes is of no interest, nor is another request behind it
                self.flow.pause_reading()
                self.transport.set_protocol(self)

    def _expect_head(self) -> None:
        self._cancel()
        self._head_timer = self.loop.call_later(HEAD_S, self._give_up)

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _cancel(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _RestOfBody(asyncio.BufferedProtocol):
    """Stands in for the HTTP protocol while the rest of a body arrives: the kernel puts it where it shall be."""

    def __init__(self, http: PatientProtocol, rest: memoryview, noted: Noted, ended: asyncio.Future[None]) -> None:
        self._http = http
        self._rest = rest
        self._noted = noted
        self.ended = ended

    @property
    def is_wanted(self) -> bool:
        """Is the HTTP protocol still out of its place?"""
        return len(self._rest) > 0

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._rest

    def buffer_updated(self, nbytes: int) -> None:
        self._rest = self._rest[nbytes:]
        if not self.is_wanted:
            self._http.transport.set_protocol(self._http)
            self._http.body_taken()
        try:
            self._noted(nbytes)
        except CasbackupError as error:
            self._end(error)
        else:
            if not self.is_wanted:
                self._end(None)

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)
        self._end(ClientDisconnect())

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
