"""The token for a server, whom to trust, and how long to wait. A token is never printed, and no error quotes it.

Whence the token: ``CASBACKUP_TOKEN``, then ``CASBACKUP_TOKEN_FILE``, then ``CASBACKUP_TOKEN_COMMAND``, then the same
of the profile: ``token``, ``token-file``, ``token-command``. Without any, the server is asked without.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping

from casbackup.errors import ConfigInvalid, UsageError
from casbackup.peer.http.patience import PATIENCE_S
from casbackup.peer.http.transport import Credentials
from casbackup.units import parse_duration
from casbackup_client.config_file import Profile

_COMMAND_S = 60
_LONGEST = 1024


def find_credentials(profile: Profile | None, environment: Mapping[str, str], cacert: str | None) -> Credentials:
    """:raise UsageError: when a file cannot be read, a command fails, or what comes is no token."""
    return Credentials(
        _token(profile or Profile(), environment),
        cacert or environment.get("CASBACKUP_CACERT") or (profile.cacert if profile is not None else None),
    )


def find_patience(profile: Profile | None, environment: Mapping[str, str]) -> float:
    """Seconds for which a server that does not answer any more is waited for.

    :raise InvalidSize: when what is set is no duration.
    """
    text = environment.get("CASBACKUP_PATIENCE") or (profile.patience if profile is not None else None)
    return PATIENCE_S if text is None else parse_duration(text)


def _token(profile: Profile, environment: Mapping[str, str]) -> str | None:
    for token, path, command in (
        (
            environment.get("CASBACKUP_TOKEN"),
            environment.get("CASBACKUP_TOKEN_FILE"),
            environment.get("CASBACKUP_TOKEN_COMMAND"),
        ),
        (profile.token, profile.token_file, profile.token_command),
    ):
        if token:
            return _checked(token, "the token given")
        if path:
            return _of_file(path)
        if command:
            return _of_command(command)
    return None


def _of_file(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            line = file.readline(_LONGEST)
    except OSError as error:
        raise UsageError(f"the token file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the token file {path} holds no token") from error
    return _checked(line, f"what stands in the token file {path}")


def _of_command(command: str) -> str:
    """What it prints on standard output. Standard error is the user's; standard input may be a disk to back up."""
    try:
        arguments = shlex.split(command)
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=_COMMAND_S, check=True
        )
        text = done.stdout.decode("ascii")
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        # Neither the command's line nor its output: either may hold the token.
        raise ConfigInvalid(f"the token command failed: {type(error).__name__}") from None
    return _checked(text, "what the token command printed")


def _checked(text: str, what: str) -> str:
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token or len(token) > _LONGEST:
        raise UsageError(f"{what} is no token")
    return token
