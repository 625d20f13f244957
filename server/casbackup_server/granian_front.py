"""granian in the place of uvicorn, whose TLS is slower. An extra: it need not be installed.

What uvicorn does by itself is done here: when the server is stopped, requests under way are finished and new ones are
told to come again; only then is granian told to stop, which would cut them off.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from casbackup.errors import ServerBusy, UsageError
from casbackup_server.problems import problem
from casbackup_server.protocol import HEAD_S

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from casbackup_server.settings import TlsSettings

_CONNECTIONS = 1024
_BACKLOG = 512


class Draining:
    """ASGI middleware that knows how many requests are under way, and takes no more once it drains."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._under_way = 0
        self._draining = False
        self._idle = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._draining:
            await problem(ServerBusy("the server is being stopped"))(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def drain(self, grace_s: float) -> None:
        """Wait for what is under way, but no longer than this."""
        self._draining = True
        try:
            async with asyncio.timeout(grace_s):
                while self._under_way:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return


def run_granian(app: ASGIApp, host: str, port: int, grace_s: float, tls: TlsSettings | None) -> None:
    """Serve until SIGTERM or SIGINT.

    :raise UsageError: when granian is not installed.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(app, host, port, grace_s, tls))


async def _serve(app: ASGIApp, host: str, port: int, grace_s: float, tls: TlsSettings | None) -> None:
    draining = Draining(app)
    server = _server(draining, host, port, tls)
    stopping = asyncio.Event()
    serving = asyncio.create_task(server.serve())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not serving.done():
        await draining.drain(grace_s)
        server.stop()
    await serving


def _server(app: ASGIApp, host: str, port: int, tls: TlsSettings | None) -> Any:
    try:
        from granian.constants import HTTPModes, Interfaces, SSLProtocols  # noqa: PLC0415  an extra
        from granian.http import HTTP1Settings  # noqa: PLC0415
        from granian.server.embed import Server  # noqa: PLC0415
    except ImportError as error:
        raise UsageError("granian is not installed; try: pip install 'casbackup[granian]'") from error
    return Server(
        app,
        host,
        port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        websockets=False,
        backlog=_BACKLOG,
        backpressure=_CONNECTIONS,
        http1_settings=HTTP1Settings(header_read_timeout=round(HEAD_S * 1000)),
        log_enabled=False,
        ssl_cert=None if tls is None else Path(tls.cert),
        ssl_key=None if tls is None else Path(tls.key),
        ssl_protocol_min=SSLProtocols.tls12,
    )
