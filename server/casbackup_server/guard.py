"""Outermost layer: no request is too large or too slow, and each leaves a line in the log."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from casbackup.errors import RequestRefused, ServerFault
from casbackup.limits import MAX_REQUEST_BYTES, MAX_UPLOAD_BYTES
from casbackup_server.problems import Refusal, problem
from casbackup_server.protocol import Noted, TakeBody, direct_body, ignored, set_direct_body
from casbackup_server.streaming import CutOff

BODY_PAUSE_S = 30.0
"""The longest pause within the body of a request."""

MIN_BYTES_PER_S = 4096
"""A body that comes more slowly than this, after the first pause's length, is refused."""

PREFIX = "/v1/repositories/{repository}"
_UPLOADS = "/records"
_NOBODY_LISTENS = 499
"""For the log: the client went away before it was answered."""

_log = structlog.get_logger("casbackup.request")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Request(self._app, scope, receive, send).run()


class _Request:
    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._scope = scope
        self._receive = receive
        self._send = send
        self._limit = MAX_UPLOAD_BYTES if scope["path"].endswith(_UPLOADS) else MAX_REQUEST_BYTES
        self._began_s = time.monotonic()
        self._received = self._sent = 0
        self._status = 0
        self._body_ended = False
        self._body_began_s = 0.0
        self._patience = asyncio.timeout(None)

    async def run(self) -> None:
        try:
            await self._answer()
        except RequestRefused as refusal:
            await self._refuse(refusal)
        except TimeoutError:
            await self._refuse(Refusal(408, RequestRefused(f"nothing came for {BODY_PAUSE_S:.0f} s")))
        except ClientDisconnect:
            self._status = self._status or _NOBODY_LISTENS
        except CutOff as cut:
            _log.warning("answer cut off", reason=str(cut), **self._about())
            raise
        except Exception:  # noqa: BLE001  the edge of the process
            _log.exception("request failed", **self._about())
            await self._refuse(ServerFault("the server met an error that it did not expect; its log has more"))
        finally:
            _log.info("request", **self._about())
            self._count()

    async def _answer(self) -> None:
        declared = dict(self._scope["headers"]).get(b"content-length")
        if declared is not None and int(declared) > self._limit:
            raise RequestRefused(f"a request of {int(declared)} bytes is more than {self._limit}")
        take = direct_body(self._scope)
        if take is not None:
            set_direct_body(self._scope, partial(self._take_body, take))
        async with asyncio.timeout(None) as self._patience:
            await self._app(self._scope, self._guarded_receive, self._counted_send)

    async def _guarded_receive(self) -> Message:
        if self._body_ended:
            return await self._receive()
        self._wait_for_more()
        message = await self._receive()
        self._patience.reschedule(None)
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._body_ended = not message.get("more_body", False)
            self._check_pace()
        return message

    async def _take_body(self, take: TakeBody, buffer: memoryview, noted: Noted = ignored) -> None:
        """Like ``_guarded_receive``, of all of the body."""

        def counted(count: int) -> None:
            self._received += count
            self._body_ended = self._received == len(buffer)
            self._check_pace()
            self._wait_for_more()
            noted(count)

        self._wait_for_more()
        await take(buffer, counted)
        self._patience.reschedule(None)

    def _wait_for_more(self) -> None:
        self._body_began_s = self._body_began_s or time.monotonic()
        self._patience.reschedule(asyncio.get_running_loop().time() + BODY_PAUSE_S)

    def _check_pace(self) -> None:
        if self._received > self._limit:
            raise RequestRefused(f"a request of more than {self._limit} bytes")
        late_s = time.monotonic() - self._body_began_s - BODY_PAUSE_S
        if not self._body_ended and late_s > 0 and self._received < late_s * MIN_BYTES_PER_S:
            raise Refusal(408, RequestRefused(f"less than {MIN_BYTES_PER_S} bytes a second"))

    async def _counted_send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        else:
            self._sent += len(message.get("body", b""))
        await self._send(message)

    async def _refuse(self, failure: Any) -> None:
        """If nothing was answered yet; otherwise the connection breaks off, which the client notices."""
        if self._status:
            raise ConnectionAbortedError("the answer was cut off")
        answer = problem(failure, headers={"Connection": "close"})
        await answer(self._scope, self._receive, self._counted_send)

    def _count(self) -> None:
        route = getattr(self._scope.get("route"), "path", "").removeprefix(PREFIX)
        took_s = time.monotonic() - self._began_s
        self._scope["app"].state.server.metrics.count(self._scope["method"], route, self._status, took_s)

    def _about(self) -> dict[str, object]:
        client = self._scope.get("client")
        return {
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self._status,
            "received_bytes": self._received,
            "sent_bytes": self._sent,
            "took_ms": round((time.monotonic() - self._began_s) * 1000, 1),
            "client": client[0] if client else "",
            "token": self._scope.get("casbackup.token", ""),
        }
