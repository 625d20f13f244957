"""``casbackup token``: who may use a repository over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup.units import parse_duration
from casbackup_client.app import App
from casbackup_client.options import CommandGroup, command, global_options, pass_app

if TYPE_CHECKING:
    from casbackup_client.documents import TokenDocument
    from casbackup_client.views import View
    from casbackup_server.tokens import NewToken, Token, TokenFile

_RIGHTS = ("read", "backup", "restore", "prune", "admin")


@click.group("token", cls=CommandGroup)
@global_options
def token() -> None:
    """Manage tokens: who may do what over HTTP with the repository of this folder.

    \b
    casbackup -r /backup/vms token create host1 --right backup --right restore --vm 'vm/1*'
    CASBACKUP_TOKEN=cb1_... casbackup -r https://server:8007/main backup vm/100 scsi0=vm.raw

    A running server notices changes at once.
    """


@command("create")
@click.argument("name")
@click.option(
    "--right",
    "rights",
    metavar="RIGHT",
    type=click.Choice(_RIGHTS),
    multiple=True,
    required=True,
    help="read, backup, restore, prune or admin. Repeatable.",
)
@click.option("--for-namespace", "namespaces", metavar="PATTERN", multiple=True, help="Only these; default: '*'.")
@click.option("--vm", "vms", metavar="PATTERN", multiple=True, help="Only these VMs, such as 'vm/1*'; default: '*'.")
@click.option("--isolated", is_flag=True, help="Tell nothing about blobs of other VMs, not even that they exist.")
@click.option("--expires", metavar="DURATION", type=parse_duration, help="Refuse it after so long, such as 90d.")
@pass_app
def create(
    app: App,
    name: str,
    rights: tuple[str, ...],
    namespaces: tuple[str, ...],
    vms: tuple[str, ...],
    isolated: bool,
    expires: float | None,
) -> None:
    """Create a token and print it. It is not kept and cannot be shown again.

    read lists snapshots; every other right includes it. backup makes snapshots, and by itself can neither
    remove nor change any: the server sets their time. restore gets data. prune forgets snapshots, and changes
    pins, labels and notes. admin is everything. Patterns are those of a shell; * matches / as well.
    """
    from casbackup_server.rights import Grant, Right

    grant = Grant(frozenset(map(Right, rights)), namespaces or ("*",), vms or ("*",), isolated)
    _show_new(app, _file(app).create(name, grant, _ms(expires)))


@command("list")
@pass_app
def list_tokens(app: App) -> None:
    """List tokens, without their secrets."""
    file = _file(app)
    used = file.used()
    documents = [_document(item, used.get(item.id)) for item in file.all()]
    app.output.result({"tokens": documents}, lambda: _table(documents))


@command("revoke")
@click.argument("token", metavar="NAME|ID")
@pass_app
def revoke(app: App, token: str) -> None:
    """Refuse a token from now on."""
    revoked = _file(app).revoke(token)
    app.output.result({"token": _document(revoked, None)}, lambda: [f"revoked token {revoked.name}"], essential=False)


@command("rotate")
@click.argument("token", metavar="NAME|ID")
@click.option("--grace", metavar="DURATION", type=parse_duration, help="Accept the old secret for so much longer.")
@click.option("--expires", metavar="DURATION", type=parse_duration, help="A new expiry, from now on.")
@pass_app
def rotate(app: App, token: str, grace: float | None, expires: float | None) -> None:
    """Give a token a new secret, and print it. Rights stay."""
    _show_new(app, _file(app).rotate(token, _ms(grace) or 0, _ms(expires)))


for _command in (create, list_tokens, revoke, rotate):
    token.add_command(_command)


def _file(app: App) -> TokenFile:
    """:raise NeedsFolder, RepositoryNotFound, NotARepository: when there is no repository in a folder."""
    from casbackup.fs import RealFileSystem
    from casbackup.repository.layout import Layout
    from casbackup.repository.repository import read_config
    from casbackup_server.tokens import TokenFile

    read_config(RealFileSystem(), Layout(app.folder_path))
    return TokenFile(app.folder_path)


def _ms(duration_s: float | None) -> int | None:
    return None if duration_s is None else round(duration_s * 1000)


def _show_new(app: App, new: NewToken) -> None:
    app.output.result({"token": _document(new.token, None), "secret": new.text}, lambda: [new.text])


def _document(token: Token, used_ms: int | None) -> TokenDocument:
    from casbackup.clock import format_time

    return {
        "id": token.id,
        "name": token.name,
        "rights": sorted(token.grant.rights),
        "namespaces": list(token.grant.namespaces),
        "vms": list(token.grant.vms),
        "isolated": token.grant.isolated,
        "created": format_time(token.created_ms),
        "expires": None if token.expires_ms is None else format_time(token.expires_ms),
        "used": None if used_ms is None else format_time(used_ms),
    }


def _table(documents: list[TokenDocument]) -> View:
    from casbackup_client.views import Table

    rows = [
        (
            item["id"],
            item["name"],
            ",".join(item["rights"]),
            ",".join(item["namespaces"]),
            ",".join(item["vms"]),
            "isolated" if item["isolated"] else "",
            item["expires"] or "never",
            item["used"] or "never",
        )
        for item in documents
    ]
    return (
        [Table(("id", "name", "rights", "namespaces", "vms", "", "expires", "used"), rows)] if rows else ["no tokens"]
    )
