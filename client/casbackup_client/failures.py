"""What a user is told when a command fails."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

import click

from casbackup.errors import CasbackupError, Interrupted, UsageError
from casbackup_client.views import printable

if TYPE_CHECKING:
    from casbackup_client.documents import ErrorDocument, FailureDocument


class InternalError(CasbackupError):
    """Something happened that the program did not expect: a bug. Committed snapshots are not affected."""

    code = "internal-error"
    advice = "This is a bug; please report it with what CASBACKUP_DEBUG=1 makes the same command print."


class SystemFailure(CasbackupError):
    """The operating system refused something, and there is no more exact error for it."""

    code = "system"
    advice = "The message is the system's own."


def as_failure(error: BaseException) -> CasbackupError:
    """The error as one of the catalogue; what it was is its cause."""
    if isinstance(error, CasbackupError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return _caused(Interrupted("stopped by SIGINT"), error)
    if isinstance(error, click.ClickException):
        return _caused(_BadCommandLine(error), error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return _caused(SystemFailure(f"{place}{error.strerror or error}"), error)
    return _caused(InternalError(f"internal error: {type(error).__name__}: {error}"), error)


def report(error: CasbackupError, *, json: bool) -> int:
    """Print the error to stderr; returns the exit status."""
    if os.environ.get("CASBACKUP_DEBUG") == "1":
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    with contextlib.suppress(OSError):  # nobody listens: the exit status is all that is left to say
        sys.stderr.write((_as_json(error) if json else _as_text(error)) + "\n")
    return int(error.exit_status)


class _BadCommandLine(UsageError):
    """What click has to say; the advice names the command whose help helps."""

    def __init__(self, error: click.ClickException) -> None:
        super().__init__(error.format_message())
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "casbackup"
        self.own_advice = f"Try `{command} --help`."


def _caused(failure: CasbackupError, cause: BaseException) -> CasbackupError:
    failure.__cause__ = cause
    failure.__dict__.update({k: v for k, v in cause.__dict__.items() if k == "session"})
    return failure


def _advice(error: CasbackupError) -> str:
    return str(getattr(error, "own_advice", error.advice))


def _session(error: CasbackupError) -> str | None:
    """The session that a failed backup left behind, if it left one."""
    session = getattr(error, "session", None)
    return str(session) if session is not None else None


def _as_text(error: CasbackupError) -> str:
    lines = [f"casbackup: {printable(error.message)}"]
    if _advice(error):
        lines.append(f"  {_advice(error)}")
    session = _session(error)
    if session is not None:
        lines.append(f"  What was stored is kept for a day; to go on with it: --resume {session}")
    return "\n".join(lines)


def _as_json(error: CasbackupError) -> str:
    import json

    content: ErrorDocument = {
        "code": error.code,
        "message": error.message,
        "advice": _advice(error),
        "exit_status": int(error.exit_status),
        "retryable": error.retryable,
    }
    session = _session(error)
    if session is not None:
        content["session"] = session
    failure: FailureDocument = {"error": content}
    return json.dumps(failure, indent=2)
