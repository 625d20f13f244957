"""The short way to the routes that a backup or a restore asks for hundreds of times.

FastAPI's way, which finds the route, validates each parameter and makes what the route depends on, takes half of the
processor time of a question for a hundred ids. Here it is one regular expression. The routes are the same functions;
what is not well-formed takes the long way, which says what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from casbackup.errors import CasbackupError
from casbackup.spec.wire import ATTACHMENT_HEADER, READING_HEADER
from casbackup_server.context import Context, context_of
from casbackup_server.guard import PREFIX
from casbackup_server.problems import problem
from casbackup_server.routes import reading, sessions

_PATH = re.compile(
    re.escape(PREFIX).replace(r"\{repository\}", "(?P<repository>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})")
    + "(?:/sessions/(?P<session>[0-9a-f]{32})/(?P<question>missing|records)|/(?P<fetch>fetch))"
)
_ATTACHMENT = re.compile("[0-9a-f]{32}")
_MAX_READINGS_LENGTH = 4096

_QUESTIONS: dict[str, Callable[[Context, str, str, Request], Awaitable[Response]]] = {
    "missing": sessions.missing,
    "records": sessions.records,
}


class _Route(NamedTuple):
    """What metrics are told."""

    path: str


class Shortcut:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send) if scope["type"] == "http" and scope["method"] == "POST" else None
        answer = None if request is None else _answer(request)
        if answer is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await answer
        except CasbackupError as error:
            response = problem(error)
        await response(scope, receive, send)


def _answer(request: Request) -> Awaitable[Response] | None:
    """None: this is not one of those, or not well-formed."""
    found = _PATH.fullmatch(request.scope["path"])
    if found is None or request.scope["query_string"]:
        return None
    if found["fetch"]:
        readings = request.headers.get(READING_HEADER)
        return None if len(readings or "") > _MAX_READINGS_LENGTH else _fetch(request, found["repository"], readings)
    attachment = request.headers.get(ATTACHMENT_HEADER, "")
    if not _ATTACHMENT.fullmatch(attachment):
        return None
    return _question(request, found["repository"], found["session"], found["question"], attachment)


async def _fetch(request: Request, repository: str, readings: str | None) -> Response:
    request.scope["route"] = _Route(f"{PREFIX}/fetch")
    return await reading.fetch(await context_of(request, repository), request, readings)


async def _question(request: Request, repository: str, session: str, question: str, attachment: str) -> Response:
    request.scope["route"] = _Route(f"{PREFIX}/sessions/{{session}}/{question}")
    context = await context_of(request, repository)
    return await _QUESTIONS[question](context, session, attachment, request)
