"""``casbackup job``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup_client.app import App
from casbackup_client.options import CommandGroup, command, global_options, pass_app

if TYPE_CHECKING:
    from casbackup_client.documents import JobDocument
    from casbackup_client.views import View


@click.group("job", cls=CommandGroup)
@global_options
def job() -> None:
    """List or steer backups of running VMs, from another terminal.

    A JOB is the id that `job list` shows, or the VM. Signals do the same: SIGUSR1 pauses, SIGUSR2 resumes, SIGTERM
    cancels.
    """


@command("list")
@pass_app
def list_jobs(app: App) -> None:
    """List the backups of running VMs that this user has on this machine."""
    from casbackup_client.control import running_jobs

    found = running_jobs()
    app.output.result({"jobs": list(found)}, lambda: _view(found))


@command("pause")
@click.argument("name", metavar="JOB")
@pass_app
def pause(app: App, name: str) -> None:
    """Stop copying in the background. What the guest overwrites is still saved first."""
    _ask(app, name, "pause", "paused")


@command("resume")
@click.argument("name", metavar="JOB")
@pass_app
def resume(app: App, name: str) -> None:
    """Go on copying."""
    _ask(app, name, "resume", "resumed")


@command("cancel")
@click.argument("name", metavar="JOB")
@pass_app
def cancel(app: App, name: str) -> None:
    """End a backup without a snapshot. The guest notices nothing."""
    _ask(app, name, "cancel", "cancelled")


@command("speed")
@click.argument("name", metavar="JOB")
@click.argument("size", metavar="SIZE")
@pass_app
def speed(app: App, name: str, size: str) -> None:
    """Copy at most SIZE a second in the background; 0: as fast as possible."""
    from casbackup.units import parse_size

    _ask(app, name, "speed", "changed the speed of", bytes_s=parse_size(size))


for one in (list_jobs, pause, resume, cancel, speed):
    job.add_command(one)


def _ask(app: App, name: str, action: str, done: str, **arguments: int) -> None:
    from casbackup_client.control import ask

    document = ask(name, action, **arguments)
    app.output.result({"job": document}, lambda: [f"{done} job {document['id']}"], essential=False)


def _view(found: list[JobDocument]) -> View:
    from casbackup.units import format_size
    from casbackup_client.views import Table

    rows = [
        (
            item["id"],
            item["namespace"],
            item["vm"],
            "paused" if item["paused"] else item["phase"],
            f"{format_size(item['done_bytes'])} of {format_size(item['total_bytes'])}",
            f"{format_size(item['rate_bytes_s'])}/s",
        )
        for item in found
    ]
    columns = ("job", "namespace", "vm", "state", "done", "rate")
    return [Table(columns, rows)] if rows else ["no backups of running VMs"]
