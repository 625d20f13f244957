"""The ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import structlog
from fastapi import APIRouter, FastAPI

from casbackup import __version__
from casbackup_server import problems
from casbackup_server.guard import PREFIX, Guard
from casbackup_server.routes import browsing, disks, exports, health, jobs, manifests, reading, repositories, sessions
from casbackup_server.served import Server

_LOOK_S = 5.0
"""How often silent sessions are looked for."""
_LOOKS_A_NOTE = 12
"""How many such looks pass before the last use of tokens is written down."""

_log = structlog.get_logger("casbackup.server")


def create_app(server: Server) -> FastAPI:
    """The application for these repositories, which the caller opened and closes."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_look_after(server))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            server.gate.note_used()

    app = FastAPI(
        title="casbackup",
        version=__version__,
        summary="A chunk server: backups, restores and the catalog of its repositories.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        redirect_slashes=False,
    )
    app.state.server = server
    app.include_router(_v1())
    app.include_router(health.router)
    app.add_middleware(Guard)
    problems.install(app)
    return app


def _v1() -> APIRouter:
    router = APIRouter(prefix=PREFIX)
    for module in (repositories, manifests, sessions, reading, browsing, disks, exports, jobs):
        router.include_router(module.router)
    return router


async def _look_after(server: Server) -> None:
    """What is to be done now and then."""
    for look in itertools.count(1):
        await asyncio.sleep(_LOOK_S)
        for served in server.repositories.values():
            for session in await server.threads.run(served.live.park_silent):
                _log.warning("session parked: nothing was heard of its client", session=session, repository=served.name)
            await server.threads.run(served.reading.close_idle)
        if look % _LOOKS_A_NOTE == 0:
            await server.threads.run(server.gate.note_used)
