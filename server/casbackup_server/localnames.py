"""Keeps web pages out of the gateway.

A page that a browser on this machine shows may send requests to a loopback address under a name of its own, which it
lets point there, and would then be given the answers. But it cannot send another name than its own as ``Host``.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from casbackup.errors import RequestRefused
from casbackup_server.listen import is_loopback
from casbackup_server.problems import Refusal, problem


class LocalNames:
    """ASGI middleware: refuses requests for any other host than this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = dict(scope["headers"]).get(b"host", b"localhost").decode("latin-1")
            if not is_loopback(_without_port(name)):
                refused = problem(Refusal(421, RequestRefused("the gateway is only reached by a loopback address")))
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _without_port(name: str) -> str:
    return name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
