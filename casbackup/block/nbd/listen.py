"""Sockets that a server listens on."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import replace

from casbackup.block.nbd.uri import MAX_SOCKET_PATH_BYTES, NbdAddress
from casbackup.errors import AddressUnusable, UsageError

_BACKLOG = 16


def listen(address: NbdAddress) -> tuple[socket.socket, NbdAddress]:
    """A socket that listens, and where: port 0 becomes the one that the system chose.

    A unix socket can be connected to by its owner only. One that a server left behind is replaced.

    :raise UsageError: when the path of a unix socket is too long.
    :raise AddressUnusable: when the address is in use, or cannot be used.
    """
    try:
        if address.socket_path is not None:
            return _listen_unix(address.socket_path), address
        listener = socket.create_server((address.host, address.port), family=_family(address.host), backlog=_BACKLOG)
        return listener, replace(address, port=listener.getsockname()[1])
    except OSError as error:
        raise AddressUnusable(f"{address}: cannot listen there: {error.strerror or error}") from error


def remove(address: NbdAddress) -> None:
    """Remove the name of a unix socket."""
    if address.socket_path is not None:
        with contextlib.suppress(OSError):
            os.unlink(address.socket_path)


def _listen_unix(path: str) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise UsageError(f"{path}: a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes")
    _remove_left_behind(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # of the name that bind makes; afterwards would be too late
        listener.bind(path)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_left_behind(path: str) -> None:
    """Remove a socket that nobody listens on; one that is in use stays and makes ``bind`` fail.

    :raise AddressUnusable: for anything else.
    """
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AddressUnusable(f"{path} is there, and no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
