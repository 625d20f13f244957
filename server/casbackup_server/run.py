"""Running the server: sockets, TLS, signals, an end that loses nothing."""

from __future__ import annotations

import contextlib
import ipaddress
from typing import NamedTuple

import structlog
import uvicorn

from casbackup.errors import ConfigInvalid, Interrupted, UsageError
from casbackup.limits import MAX_UPLOADING_BYTES
from casbackup.units import parse_duration
from casbackup_server.app import create_app
from casbackup_server.audit import Audit
from casbackup_server.budget import ByteBudget
from casbackup_server.gate import Gate, OpenGate, TokenGate
from casbackup_server.jobs.configured import configured_tasks, zone_of
from casbackup_server.jobs.notify import notifier_for
from casbackup_server.jobs.schedule import scheduled
from casbackup_server.protocol import PatientProtocol
from casbackup_server.served import Server, opened
from casbackup_server.settings import Settings
from casbackup_server.threads import Threads
from casbackup_server.tokens import TokenFile

_KEEP_ALIVE_S = 75
_CONNECTIONS = 1024
_BACKLOG = 512

_log = structlog.get_logger("casbackup.server")


class Listen(NamedTuple):
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Can only this machine reach it?"""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse_listen(text: str) -> Listen:
    """:raise UsageError: when it is not ADDRESS:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{text!r} is not an address to listen on: it must look like 127.0.0.1:8007 or [::]:8007")
    return Listen(host, int(port))


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Requests under way are finished then, and sessions parked.

    :raise RepositoryError: when a repository cannot be opened. :raise UsageError: when the settings are not safe.
    """
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
        _log.info("serving", listen=settings.listen, repositories=sorted(served), tls=settings.tls is not None)
        with (
            scheduled(settings, served, zone, notifier, server.metrics),
            contextlib.suppress(KeyboardInterrupt, Interrupted),  # uvicorn raises the signal once more when it is done
        ):
            uvicorn.Server(_config(server, settings, listen)).run()
    _log.info("stopped")


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


def _config(server: Server, settings: Settings, listen: Listen) -> uvicorn.Config:
    tls = settings.tls
    return uvicorn.Config(
        create_app(server),
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
        timeout_graceful_shutdown=_grace_s(settings),
        limit_concurrency=_CONNECTIONS,
        backlog=_BACKLOG,
        ssl_certfile=None if tls is None else tls.cert,
        ssl_keyfile=None if tls is None else tls.key,
    )
