"""``casbackup serve``."""

from __future__ import annotations

from typing import Literal

import click

from casbackup.errors import UsageError
from casbackup_client.app import App
from casbackup_client.options import command, pass_app


@command("serve")
@click.option("--listen", metavar="ADDR:PORT", help="Where to listen; default: 127.0.0.1:8007.")
@click.option(
    "--repository",
    "repositories",
    metavar="NAME=PATH",
    multiple=True,
    help="Serve the repository in this folder under this name. Repeatable.",
)
@click.option("--config", "config_file", metavar="FILE", type=click.Path(), help="A configuration file of the server.")
@click.option("--tls-cert", metavar="FILE", type=click.Path(), help="The certificate, with its chain; PEM.")
@click.option("--tls-key", metavar="FILE", type=click.Path(), help="The certificate's key; PEM.")
@click.option("--insecure-no-auth", is_flag=True, help="Let everybody do everything; on loopback addresses only.")
@click.option(
    "--server",
    metavar="NAME",
    type=click.Choice(["uvicorn", "granian"]),
    help="What speaks HTTP: uvicorn, the default, or granian, if it is installed, with quicker TLS.",
)
@pass_app
def serve(
    app: App,
    listen: str | None,
    repositories: tuple[str, ...],
    config_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    insecure_no_auth: bool,
    server: Literal["uvicorn", "granian"] | None,
) -> None:
    """Serve repositories over HTTP until SIGTERM.

    \b
    casbackup serve --repository main=/backup/vms --listen 0.0.0.0:8007 --tls-cert c.pem --tls-key k.pem
    casbackup -r https://host:8007/main backup vm/100 scsi0=vm.raw

    Clients need a token: see `casbackup token`. What a file given by --config says can be overridden by
    options.
    """
    from casbackup_server import logs, run
    from casbackup_server.settings import read_settings, with_options

    settings = with_options(
        read_settings(config_file),
        listen=listen,
        repositories=_parsed(repositories),
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure_no_auth=insecure_no_auth,
        server=server,
    )
    logs.configure("debug" if app.verbose else "warning" if app.quiet else "info")
    run.run(settings)


def _parsed(repositories: tuple[str, ...]) -> dict[str, str]:
    from casbackup.peer.http.address import parse_repository_name

    found: dict[str, str] = {}
    for text in repositories:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UsageError(f"{text!r} is not NAME=PATH")
        if parse_repository_name(name) in found:
            raise UsageError(f"repository {name} is given twice")
        found[name] = path
    return found
