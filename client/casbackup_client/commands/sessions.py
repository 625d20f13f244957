"""``casbackup sessions``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup_client.app import App
from casbackup_client.options import CommandGroup, command, global_options, pass_app

if TYPE_CHECKING:
    from casbackup.repository.sessions import SessionRow
    from casbackup_client.views import View


@click.group("sessions", cls=CommandGroup, invoke_without_command=True)
@global_options
@click.pass_context
def sessions(context: click.Context) -> None:
    """List sessions, or abort one.

    A session is a backup that is under way (active) or was interrupted (it can go on with `backup
    --resume`), or somebody who reads. `gc` gives up interrupted ones after a day.
    """
    if context.invoked_subcommand is None:
        _list(context.ensure_object(App))


def _list(app: App) -> None:
    from casbackup_client.documenting import session_document

    with app.repository() as repository:
        found = repository.sessions.all()
    found.sort(key=lambda item: item[0].seen_ms)
    app.output.result({"sessions": [session_document(row, active) for row, active in found]}, lambda: _view(found))


def _view(found: list[tuple[SessionRow, bool]]) -> View:
    from casbackup_client.documenting import session_document
    from casbackup_client.views import Table

    rows = [
        (d["id"], d["kind"], "active" if active else "interrupted", d["namespace"], d["vm"], d["seen"])
        for row, active in found
        for d in [session_document(row, active)]
    ]
    return [Table(("session", "kind", "state", "namespace", "vm", "seen"), rows)] if rows else ["no sessions"]


@command("abort")
@click.argument("session", metavar="SESSION")
@pass_app
def abort(app: App, session: str) -> None:
    """Give up an interrupted backup: what only it needs becomes garbage. An active one is refused."""
    from casbackup.ids import parse_session

    session_id = parse_session(session)
    with app.repository() as repository:
        repository.require_writable()
        repository.sessions.resume(session_id).abort()
    app.output.result({"aborted": session_id}, lambda: [f"aborted session {session_id}"], essential=False)


sessions.add_command(abort)
