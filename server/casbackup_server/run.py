"""Running the server: sockets, TLS, signals, an end that loses nothing."""

from __future__ import annotations

import contextlib

import structlog
import uvicorn
from fastapi import FastAPI

from casbackup.errors import ConfigInvalid, Interrupted, UsageError
from casbackup.limits import MAX_UPLOADING_BYTES
from casbackup.units import parse_duration
from casbackup_server.app import create_app
from casbackup_server.audit import Audit
from casbackup_server.budget import ByteBudget
from casbackup_server.gate import Gate, OpenGate, TokenGate
from casbackup_server.granian_front import run_granian
from casbackup_server.heap import bound_heap, collect_garbage
from casbackup_server.jobs.configured import configured_tasks, zone_of
from casbackup_server.jobs.notify import notifier_for
from casbackup_server.jobs.schedule import scheduled
from casbackup_server.listen import Listen, parse_listen
from casbackup_server.protocol import PatientProtocol
from casbackup_server.served import Server, opened
from casbackup_server.settings import Settings, TlsSettings
from casbackup_server.threads import Threads
from casbackup_server.tokens import TokenFile

_KEEP_ALIVE_S = 75
_CONNECTIONS = 1024
_BACKLOG = 512

_log = structlog.get_logger("casbackup.server")


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Requests under way are finished then, and sessions parked.

    :raise RepositoryError: when a repository cannot be opened. :raise UsageError: when the settings are not safe.
    """
    bound_heap()
    listen = parse_listen(settings.listen)
    require_safe(settings, listen)
    paths = {name: item.path for name, item in settings.repositories.items()}
    tasks, zone, notifier = configured_tasks(settings), zone_of(settings), notifier_for(settings.notify.urls)
    with contextlib.closing(Audit(settings.audit_log)) as audit, opened(paths, tasks) as served:
        server = Server(
            served,
            _gate(settings, audit),
            audit,
            Threads(),
            ByteBudget(MAX_UPLOADING_BYTES),
            metrics_token=_metrics_token(settings.metrics_token_file),
        )
        _log.info(
            "serving",
            listen=settings.listen,
            repositories=sorted(served),
            tls=settings.tls is not None,
            server=settings.server,
        )
        with (
            scheduled(settings, served, zone, notifier, server.metrics),
            contextlib.suppress(KeyboardInterrupt, Interrupted),  # uvicorn raises the signal once more when it is done
        ):
            app = create_app(server)
            collect_garbage()
            _serve(app, settings, listen)
    _log.info("stopped")


def _serve(app: FastAPI, settings: Settings, listen: Listen) -> None:
    grace_s = _grace_s(settings)
    if settings.server == "granian":
        run_granian(app, listen.host.strip("[]"), listen.port, grace_s, settings.tls)
    else:
        uvicorn.Server(uvicorn_config(app, listen, grace_s, settings.tls)).run()


def require_safe(settings: Settings, listen: Listen) -> None:
    """:raise UsageError: when strangers could do what they like."""
    if settings.insecure_no_auth and not listen.is_loopback:
        raise UsageError(f"--insecure-no-auth is for loopback addresses; {listen.host} is none")


def _metrics_token(path: str | None) -> str | None:
    """:raise ConfigInvalid: when there is none in the file."""
    if path is None:
        return None
    try:
        with open(path, encoding="ascii") as file:
            token = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path} cannot be read: {error}") from error
    if not token:
        raise ConfigInvalid(f"{path} is empty; it must hold the token for metrics")
    return token


def _grace_s(settings: Settings) -> int:
    """:raise ConfigInvalid: when it is no duration."""
    try:
        return round(parse_duration(settings.stop_grace))
    except UsageError as error:
        raise ConfigInvalid(f"stop-grace: {error}") from error


def _gate(settings: Settings, audit: Audit) -> Gate:
    if settings.insecure_no_auth:
        return OpenGate()
    return TokenGate({name: TokenFile(item.path) for name, item in settings.repositories.items()}, audit)


def uvicorn_config(app: FastAPI, listen: Listen, grace_s: int, tls: TlsSettings | None = None) -> uvicorn.Config:
    """``grace_s``: how long requests may go on after SIGTERM."""
    return uvicorn.Config(
        app,
        host=listen.host.strip("[]"),
        port=listen.port,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s,
        limit_concurrency=_CONNECTIONS,
        backlog=_BACKLOG,
        ssl_certfile=None if tls is None else tls.cert,
        ssl_keyfile=None if tls is None else tls.key,
    )
