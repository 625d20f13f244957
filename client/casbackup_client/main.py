"""The edge of the process: arguments in, exit status out. Every failure ends here, as text or as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from casbackup.errors import CasbackupError, ExitStatus
from casbackup_client.app import App
from casbackup_client.cli import COMPLETION_VARIABLE, cli
from casbackup_client.failures import as_failure, report
from casbackup_client.signals import signals_raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``casbackup ARGUMENTS`` (default: those of the process) and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _tolerate_any_text()
    app = App()
    try:
        with signals_raise():
            status = _complete(app)
            if status is None:
                status = _run(app, given or ["--help"])
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        _forget_output()
        return ExitStatus.READER_GONE
    except (CasbackupError, click.ClickException, OSError, KeyboardInterrupt) as error:
        return report(as_failure(error), json=app.json or "--json" in given)
    except Exception as error:  # noqa: BLE001  the last one who can say anything
        return report(as_failure(error), json=app.json or "--json" in given)


def _run(app: App, arguments: list[str]) -> int:
    """``click.Command.main`` without its own ideas of how a process ends."""
    try:
        with cli.make_context("casbackup", arguments, obj=app) as context:
            cli.invoke(context)
    except click.exceptions.Exit as request:  # --help and --version
        return request.exit_code
    return ExitStatus.OK


def _complete(app: App) -> int | None:
    """Answer a shell that asks what could stand at its cursor; None: it was not one that called."""
    instruction = os.environ.get(COMPLETION_VARIABLE)
    if not instruction:
        return None
    from click.shell_completion import shell_complete

    return shell_complete(cli, {"obj": app}, "casbackup", COMPLETION_VARIABLE, instruction)


def _tolerate_any_text() -> None:
    """File names need not be valid text, and a terminal may know few characters: that must not end a
    backup.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Nobody reads the output any more: what is left of it must not fail once more at the exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
