"""``casbackup server-job``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import click

from casbackup.errors import ServerJobFailed
from casbackup_client.app import App
from casbackup_client.options import CommandGroup, command, global_options, pass_app

if TYPE_CHECKING:
    from casbackup.peer.http.rest import RestClient, RestJob
    from casbackup_client.documents import ServerJobDocument
    from casbackup_client.views import View

_PAUSE_S = 1.0


@click.group("server-job", cls=CommandGroup)
@global_options
def server_job() -> None:
    """Start or watch the jobs that a server does on a repository.

    The repository must be on a server: -r https://host:8007/NAME. A TASK is gc, check, forget where the server has
    rules for it, or the name of one in the server's configuration.
    """


@command("start")
@click.argument("task", metavar="TASK")
@click.option("--wait", is_flag=True, help="Wait until it has ended; exit status 1 if it does not succeed.")
@pass_app
def start(app: App, task: str, wait: bool) -> None:
    """Start a task, or let it wait for the one that runs."""
    with app.server() as server:
        job = server.start_job(task)
        if wait:
            job = _ended(server, job)
    _show(app, job)
    if wait and job.state != "succeeded":
        raise ServerJobFailed(f"{job.task} has {job.state}: {job.result}")


@command("list")
@click.option("--last", metavar="N", type=click.IntRange(1, 500), default=50, help="How many; default: 50.")
@pass_app
def list_jobs(app: App, last: int) -> None:
    """List the jobs, the newest first."""
    with app.server() as server:
        found = server.jobs(last)
    app.output.result({"jobs": [_document(job) for job in found]}, lambda: _table(found))


@command("show")
@click.argument("job", metavar="JOB")
@pass_app
def show(app: App, job: str) -> None:
    """Show how a job stands."""
    with app.server() as server:
        _show(app, server.job(job))


@command("log")
@click.argument("job", metavar="JOB")
@pass_app
def log(app: App, job: str) -> None:
    """Show what a job wrote down."""
    with app.server() as server:
        lines = server.job_log(job)
    app.output.result({"id": job, "lines": lines}, lambda: list(lines))


@command("cancel")
@click.argument("job", metavar="JOB")
@pass_app
def cancel(app: App, job: str) -> None:
    """Have a job end soon. What it has done is sound."""
    with app.server() as server:
        _show(app, server.cancel_job(job))


for one in (start, list_jobs, show, log, cancel):
    server_job.add_command(one)


def _ended(server: RestClient, job: RestJob) -> RestJob:
    while not job.is_over:
        time.sleep(_PAUSE_S)
        job = server.job(job.id)
    return job


def _show(app: App, job: RestJob) -> None:
    app.output.result({"job": _document(job)}, lambda: [_line(job)])


def _document(job: RestJob) -> ServerJobDocument:
    return cast("ServerJobDocument", asdict(job))


def _line(job: RestJob) -> str:
    from casbackup.units import format_size

    doing = f", {job.phase}: {format_size(job.done_bytes)}" if job.phase else ""
    return f"{job.id} {job.task}: {job.state}{doing}{f', {job.result}' if job.result else ''}"


def _table(found: list[RestJob]) -> View:
    from casbackup_client.views import Table

    rows = [(job.id, job.task, job.state, job.created, job.by, job.result or job.phase) for job in found]
    return [Table(("job", "task", "state", "created", "by", "result"), rows)] if rows else ["no jobs"]
