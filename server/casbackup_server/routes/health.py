"""Is the server well? Not below ``/v1``, for programs that watch it."""

from __future__ import annotations

import hmac
import ipaddress

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse, PlainTextResponse

from casbackup.errors import RightMissing, ServerBusy, TokenInvalid
from casbackup_server.figures import look
from casbackup_server.served import Server

router = APIRouter(include_in_schema=False)

_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_FORWARDED = ("forwarded", "x-forwarded-for")


@router.get("/healthz")
async def healthz() -> Response:
    """The process answers."""
    return PlainTextResponse("ok\n")


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """Every repository can be read."""
    server: Server = request.app.state.server

    def work() -> list[str]:
        return [name for name, served in server.repositories.items() if not _readable(served.repository.layout.config)]

    broken = await server.threads.run(work)
    if broken:
        raise ServerBusy(f"repositories that cannot be read: {', '.join(broken)}")
    return JSONResponse({"repositories": len(server.repositories)})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus: with the token for that, or from this machine where none is set."""
    server: Server = request.app.state.server
    _admit(request, server.metrics_token)

    def work() -> bytes:
        for served in server.repositories.values():
            look(served, server.metrics)
        return server.metrics.text()

    return Response(await server.threads.run(work), media_type=_METRICS)


def _readable(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def _admit(request: Request, token: str | None) -> None:
    if token is not None:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(shown.encode(), token.encode()):
            raise TokenInvalid("this is not the token for metrics")
    elif not _is_local(request):
        raise RightMissing("metrics are for this machine only, as no metrics-token-file is set")


def _is_local(request: Request) -> bool:
    """Asked from this machine, and not by a proxy on it for somebody else."""
    host = request.client.host if request.client else ""
    try:
        return ipaddress.ip_address(host).is_loopback and not any(name in request.headers for name in _FORWARDED)
    except ValueError:
        return False
