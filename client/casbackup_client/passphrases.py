"""Whence passphrases come: the environment, a file descriptor, a file, a command, or somebody at the terminal.

None is ever an argument of a command, is printed, or stands in an error.
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from casbackup.errors import ConfigInvalid, PassphraseNeeded, UsageError
from casbackup.limits import MAX_PASSPHRASE_BYTES

VARIABLE = "CASBACKUP_PASSPHRASE"
NEW_VARIABLE = "CASBACKUP_NEW_PASSPHRASE"
"""For the one that is to be, where there is another one already."""

_COMMAND_S = 60
_TRIES = 3


class Configured(NamedTuple):
    """What a profile says of passphrases."""

    file: str | None = None
    command: str | None = None


_NOT_CONFIGURED = Configured()


class Passphrases:
    """The sources of one passphrase, the first of which that is set counts: ``VARIABLE``, ``VARIABLE_FD``,
    ``VARIABLE_FILE``, ``VARIABLE_COMMAND``, then the profile's, then the terminal.
    """

    def __init__(
        self, environment: Mapping[str, str], variable: str = VARIABLE, configured: Configured = _NOT_CONFIGURED
    ) -> None:
        self._environment = environment
        self._variable = variable
        self._configured = configured

    def given(self) -> bytes | None:
        """Without asking anybody; None when no source is set.

        :raise UsageError: when a source cannot be read, or what comes is no passphrase.
        """
        text = self._environment.get(self._variable)
        if text is not None:
            return _checked(text, self._variable)
        number = self._environment.get(f"{self._variable}_FD")
        if number:
            return _of_descriptor(number)
        for path, command in (
            (self._environment.get(f"{self._variable}_FILE"), self._environment.get(f"{self._variable}_COMMAND")),
            self._configured,
        ):
            if path:
                return _of_file(path)
            if command:
                return _of_command(command)
        return None

    def existing(self, about: str, *, ask: bool = True) -> Iterator[bytes]:
        """What may be the passphrase of something there is: the one given, or else what is typed, three times at most.
        Nothing, where nobody can be asked.
        """
        given = self.given()
        if given is not None:
            yield given
            return
        for attempt in range(_TRIES if ask and _has_terminal() else 0):
            yield _checked(_typed(f"{'Wrong. ' if attempt else ''}Passphrase of {about}: "), "what was typed")

    def new(self, about: str) -> bytes:
        """A passphrase for something: the one given, or what is typed twice.

        :raise PassphraseNeeded: when nobody can be asked. :raise UsageError: when it was not typed the same twice.
        """
        given = self.given()
        if given is not None:
            return given
        if not _has_terminal():
            raise PassphraseNeeded(f"{about} needs a passphrase")
        typed = _checked(_typed(f"New passphrase of {about}: "), "what was typed")
        if typed != _checked(_typed("The same again: "), "what was typed"):
            raise UsageError("the passphrase was not the same both times")
        return typed


def _of_descriptor(number: str) -> bytes:
    """Its first line. The descriptor is read once; a second passphrase would be the next line of it."""
    try:
        data = bytearray()
        while len(data) <= MAX_PASSPHRASE_BYTES and (byte := os.read(int(number), 1)) not in (b"", b"\n"):
            data += byte
    except (OSError, ValueError):
        raise UsageError(f"the passphrase cannot be read from file descriptor {number}") from None
    return _checked(os.fsdecode(bytes(data)), f"what came from file descriptor {number}")


def _of_file(path: str) -> bytes:
    """Its first line."""
    try:
        with open(path, "rb") as file:
            line = file.readline(MAX_PASSPHRASE_BYTES + 2)
    except OSError as error:
        raise UsageError(f"the passphrase file {path} cannot be read: {error.strerror}") from error
    return _checked(os.fsdecode(line.rstrip(b"\r\n")), f"what stands in the passphrase file {path}")


def _of_command(command: str) -> bytes:
    """The first line that it prints. Standard error is the user's; standard input may be a disk to back up."""
    import shlex
    import subprocess

    try:
        done = subprocess.run(
            shlex.split(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=_COMMAND_S, check=True
        )
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        # Neither the command's line nor its output: either may hold the passphrase.
        raise ConfigInvalid(f"the passphrase command failed: {type(error).__name__}") from None
    first = done.stdout.partition(b"\n")[0].rstrip(b"\r")
    return _checked(os.fsdecode(first), "what the passphrase command printed")


def _checked(text: str, what: str) -> bytes:
    """As UTF-8 in normal form C, so that it does not matter which keyboard composed an accent."""
    passphrase = os.fsencode(unicodedata.normalize("NFC", text))
    if not 0 < len(passphrase) <= MAX_PASSPHRASE_BYTES:
        raise UsageError(f"{what} is no passphrase: it is empty or longer than {MAX_PASSPHRASE_BYTES} bytes")
    return passphrase


def _has_terminal() -> bool:
    """Whatever standard input is: that may be data."""
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
        return True
    return False


def _typed(prompt: str) -> str:
    import getpass

    return getpass.getpass(prompt)
