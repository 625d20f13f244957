"""What the commands that serve disks over NBD share: where they listen, TLS, what they print, and how they end."""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

import click

from casbackup.errors import UsageError

if TYPE_CHECKING:
    import ssl

    from casbackup.block.nbd.exports import Export
    from casbackup.block.nbd.server import NbdServer
    from casbackup.block.nbd.uri import NbdAddress
    from casbackup_client.app import App

F = TypeVar("F", bound=Callable[..., object])

_UNIX = "unix:"
_LOOK_S = 1.0
"""How soon a signal is seen that came a moment before the waiting began."""


class NbdFlags(NamedTuple):
    """The options of ``nbd_options``, as given."""

    listen: str | None
    tls_certificates: str | None
    tls_verify_clients: bool
    insecure: bool

    def address(self) -> NbdAddress:
        """Where to listen.

        :raise UsageError: when it is no address, or one that others can reach, without TLS.
        """
        from casbackup.block.nbd.uri import NbdAddress

        if self.listen is None:
            return NbdAddress(socket_path=_own_socket())
        if self.listen.startswith(_UNIX) and self.listen != _UNIX:
            return NbdAddress(socket_path=os.path.abspath(self.listen.removeprefix(_UNIX)))
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise UsageError(f"{self.listen!r} is neither unix:PATH nor HOST:PORT")
        host = host.removeprefix("[").removesuffix("]")
        if not (self.tls_certificates or self.insecure or _is_loopback(host)):
            raise UsageError(f"others can reach {host}: give --tls-certificates, or --insecure if that is meant")
        return NbdAddress(host=host, port=int(port))

    def context(self) -> ssl.SSLContext | None:
        """:raise UsageError: when the certificates cannot be used."""
        from casbackup.block.nbd.tls import server_context

        if self.tls_certificates is None:
            if self.tls_verify_clients:
                raise UsageError("--tls-verify-clients needs --tls-certificates")
            return None
        return server_context(self.tls_certificates, verify_clients=self.tls_verify_clients)


def nbd_options(function: F) -> F:
    """The options of ``NbdFlags``."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


_OPTIONS = (
    click.option(
        "--listen",
        metavar="ADDRESS",
        help="Where to listen: unix:PATH or HOST:PORT; default: a socket in the user's runtime folder.",
    ),
    click.option(
        "--tls-certificates",
        metavar="FOLDER",
        type=click.Path(),
        help="Demand TLS, with server-cert.pem and server-key.pem from this folder.",
    ),
    click.option(
        "--tls-verify-clients",
        is_flag=True,
        help="Demand a certificate of each client, signed by ca-cert.pem of that folder.",
    ),
    click.option("--insecure", is_flag=True, help="Listen without TLS where others can connect."),
)


def started(app: App, flags: NbdFlags, exports: Sequence[Export]) -> NbdServer:
    """A server that does not listen yet; it says on stderr why connections end badly."""
    from casbackup.block.nbd.server import NbdServer

    return NbdServer(exports, tls=flags.context(), report=app.output.complain)


def uri(address: NbdAddress, export: str, flags: NbdFlags) -> str:
    """For clients; one with TLS must name its own folder of certificates."""
    from dataclasses import replace

    from casbackup.block.nbd.uri import ClientTls

    return str(replace(address, export=export, tls=ClientTls() if flags.tls_certificates else None))


def qemu_blockdev(address: NbdAddress, export: str, flags: NbdFlags, *, read_only: bool, lasting: bool) -> str:
    """The option of QEMU that opens an export as a block node of its name. A comma within a value is doubled.

    ``lasting``: another server may take the place of this one, with all that was written. QEMU then waits for it.
    """
    if address.socket_path is not None:
        server = ["server.type=unix", f"server.path={_doubled(address.socket_path)}"]
    else:
        server = ["server.type=inet", f"server.host={_doubled(address.host)}", f"server.port={address.port}"]
    node = "".join(c if c.isalnum() or c in "-._" else "-" for c in export)
    parts = ["driver=nbd", f"node-name={node}", *server, f"export={_doubled(export)}"]
    parts += ["reconnect-delay=30"] if lasting else []
    parts += ["read-only=on"] if read_only else []
    parts += ["tls-creds=tls0"] if flags.tls_certificates else []
    return f"-blockdev {','.join(parts)}"


def wait_for_signal() -> NoReturn:
    """:raise Interrupted: when one of those that ``signals_raise`` knows comes."""
    while True:
        time.sleep(_LOOK_S)


def _own_socket() -> str:
    from casbackup_client.control import runtime_folder

    return os.path.join(runtime_folder(), f"nbd-{os.getpid()}.sock")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _doubled(text: str) -> str:
    return text.replace(",", ",,")
