"""``casbackup gateway``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from casbackup.errors import UsageError
from casbackup_client.app import App, is_address
from casbackup_client.options import command, pass_app

if TYPE_CHECKING:
    from casbackup_client.documents import GatewayDocument

_NAME = "main"


@command("gateway")
@click.option("--listen", metavar="ADDR:PORT", default="127.0.0.1:8008", help="Where to listen; port 0: any.")
@click.option("--name", metavar="NAME", help="The repository's name in addresses; default: as on its server, or main.")
@click.option(
    "--token-file", metavar="FILE", type=click.Path(), help="Let in only who shows what stands in its first line."
)
@pass_app
def gateway(app: App, listen: str, name: str | None, token_file: str | None) -> None:
    """Serve restores over HTTP on this machine, decrypted, until SIGTERM.

    \b
    casbackup -r https://backup.example.com:8007/main gateway
    curl -r 0-511 http://127.0.0.1:8008/v1/repositories/main/snapshots/ID/disks/scsi0

    It has the routes by which a server restores, and no others: nothing can be written. A server cannot give out
    what is encrypted, for it has no key; here the key is. The address must be one of loopback. Without --token-file,
    everybody on this machine can read all of the repository.
    """
    from casbackup.peer.http.address import parse_address, parse_repository_name
    from casbackup_server import logs
    from casbackup_server.gateway import run_gateway
    from casbackup_server.listen import parse_listen

    place = app.repository_path
    shown = parse_repository_name(name) if name else parse_address(place).repository if is_address(place) else _NAME
    address, token = parse_listen(listen), None if token_file is None else _token(token_file)
    logs.configure("debug" if app.verbose else "warning")

    def ready(port: int) -> None:
        document: GatewayDocument = {
            "url": f"http://{address.host}:{port}/v1/repositories/{shown}",
            "encrypted": peer.config.encrypted,
        }
        app.output.result(document, lambda: [f"serving {document['url']} until SIGTERM or SIGINT"], essential=False)
        sys.stdout.flush()

    with app.peer() as peer:
        run_gateway(peer, shown, address, token, ready)


def _token(path: str) -> str:
    """:raise UsageError: when there is none in the file."""
    try:
        with open(path, encoding="ascii") as file:
            token = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token file {path} cannot be read: {error}") from error
    if not token:
        raise UsageError(f"the token file {path} is empty")
    return token
