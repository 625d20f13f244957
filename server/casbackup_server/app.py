"""The ASGI applications: the server, and the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager

import structlog
from fastapi import APIRouter, FastAPI

from casbackup import __version__
from casbackup_server import problems
from casbackup_server.guard import PREFIX, Guard
from casbackup_server.localnames import LocalNames
from casbackup_server.routes import (
    browsing,
    diffs,
    disks,
    exports,
    health,
    jobs,
    manifests,
    reading,
    repositories,
    sessions,
)
from casbackup_server.served import Host, Server
from casbackup_server.shortcut import Shortcut

_LOOK_S = 5.0
"""How often silent sessions are looked for."""
_LOOKS_A_NOTE = 12
"""How many such looks pass before the last use of tokens is written down."""

_log = structlog.get_logger("casbackup.server")


def create_app(server: Server) -> FastAPI:
    """The application for these repositories, which the caller opened and closes."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await server.threads.run(_nothing)  # so that the first client does not wait for what this imports
        async with _beside(_look_after(server)):
            yield
        server.gate.note_used()

    modules = (repositories, manifests, sessions, reading, *_RESTORING, jobs)
    app = _application(server, lifespan, [module.router for module in modules], [Shortcut])
    app.include_router(health.router)
    return app


def create_gateway(host: Host) -> FastAPI:
    """The application that lists and restores, and does nothing else; for clients on this machine only."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with _beside(_close_idle(host)):
            yield

    app = _application(host, lifespan, [module.router for module in _RESTORING])
    app.add_middleware(LocalNames)
    return app


_RESTORING = (browsing, diffs, disks, exports)


def _application(
    host: Host,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    routers: Sequence[APIRouter],
    inner: Sequence[type[Shortcut]] = (),
) -> FastAPI:
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
    app.state.server = host
    v1 = APIRouter(prefix=PREFIX)
    for router in routers:
        v1.include_router(router)
    app.include_router(v1)
    for middleware in inner:
        app.add_middleware(middleware)
    app.add_middleware(Guard)
    problems.install(app)
    return app


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Do something that has no end meanwhile."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _close_idle(host: Host) -> None:
    while True:
        await asyncio.sleep(_LOOK_S)
        for browsed in host.repositories.values():
            await host.threads.run(browsed.reading.close_idle)


def _nothing() -> None: ...


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
