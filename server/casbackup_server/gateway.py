"""The gateway: restores over HTTP on a host that has the key of an encrypted repository, for programs on that host."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import uvicorn

from casbackup.errors import Interrupted, UsageError
from casbackup.limits import REST_CACHE_BYTES
from casbackup.peer.api import Peer
from casbackup_server.app import create_gateway
from casbackup_server.audit import Audit
from casbackup_server.gate import OneTokenGate
from casbackup_server.heap import bound_heap, collect_garbage
from casbackup_server.listen import Listen
from casbackup_server.opensnapshots import OpenSnapshots
from casbackup_server.run import uvicorn_config
from casbackup_server.served import Browsed, Host
from casbackup_server.threads import Threads

_GRACE_S = 5
"""How long downloads may go on after SIGTERM."""


def run_gateway(
    peer: Peer, name: str, listen: Listen, token: str | None, ready: Callable[[int], None] = lambda _: None
) -> None:
    """Serve one repository under ``name`` until SIGTERM or SIGINT. ``ready`` is told the port, once requests are
    accepted.

    :raise UsageError: when it is no loopback address, or cannot be had.
    """
    bound_heap()
    with _socket(listen) as listening, contextlib.closing(OpenSnapshots(peer, REST_CACHE_BYTES, lambda s: s)) as opened:
        host = Host({name: Browsed(name, peer, opened)}, OneTokenGate(token), Audit(), Threads())
        port = listening.getsockname()[1]
        app = create_gateway(host)
        collect_garbage()
        ready(port)
        with contextlib.suppress(KeyboardInterrupt, Interrupted):  # uvicorn raises the signal once more when it is done
            uvicorn.Server(uvicorn_config(app, listen, _GRACE_S)).run(sockets=[listening])


def _socket(listen: Listen) -> socket.socket:
    if not listen.is_loopback:
        raise UsageError(
            f"a gateway gives out what is encrypted: for loopback addresses only, and {listen.host} is none"
        )
    host = listen.host.strip("[]")
    try:
        return socket.create_server((host, listen.port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(f"cannot listen on {listen.host}:{listen.port}: {error.strerror}") from error
