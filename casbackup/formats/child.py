"""A program that archives are piped through: its ends, its failure in words, its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Self, cast

from casbackup.errors import ToolFailed, ToolMissing

_TAIL_BYTES = 2000
_PATIENCE_S = 5.0
"""Between asking a program to end and killing it."""
_READ_BYTES = 4096


class Child:
    """A running program. Its standard error is read all the time, and the end of it kept for messages."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.name = name
        self._process = process
        self._tail = b""
        self._reader = threading.Thread(target=self._keep_tail, name="stderr", daemon=True)
        self._reader.start()

    @classmethod
    @contextlib.contextmanager
    def piped(
        cls, command: Sequence[str] | str, name: str, *, stdin: bool = True, stdout: int | None = subprocess.PIPE
    ) -> Iterator[Self]:
        """Start a program, or a shell's command line, and end it when the context ends, if it has not by then.

        ``stdin``: it gets a pipe, else nothing to read. ``stdout``: a descriptor; None: it goes where ours goes.

        :raise ToolMissing: when there is no such program.
        """
        is_shell = isinstance(command, str)
        try:
            process = subprocess.Popen(
                command,
                shell=is_shell,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                start_new_session=is_shell,
            )
        except FileNotFoundError as error:
            raise ToolMissing(f"{name} is not installed") from error
        except OSError as error:
            raise ToolFailed(f"{name} cannot be started: {error.strerror}") from error
        try:
            yield cls(process, name)
        finally:
            _end(process, whole_group=is_shell)

    @property
    def input(self) -> BinaryIO:
        """Its standard input."""
        return cast(BinaryIO, self._process.stdin)

    @property
    def output(self) -> BinaryIO:
        """Its standard output."""
        return cast(BinaryIO, self._process.stdout)

    def close_input(self) -> None:
        """There is no more for it. Harmless when it has gone already."""
        with contextlib.suppress(BrokenPipeError):
            self.input.close()

    def is_reading(self) -> bool:
        """Some kilobytes can be written to it without waiting, within a few seconds."""
        return bool(select.select([], [self.input], [], _PATIENCE_S)[1])

    def wait(self) -> None:
        """Give it a few seconds to end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_S)

    def ended(self) -> str | None:
        """Wait for its end; None if it ended well, else how it failed and the last that it said."""
        status = self._process.wait()
        self._reader.join(_PATIENCE_S)
        if status == 0:
            return None
        how = f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
        said = self._tail.decode(errors="backslashreplace").strip()
        return f"{self.name} failed with {how}" + (f": {said}" if said else "")

    def _keep_tail(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            while data := os.read(pipe.fileno(), _READ_BYTES):
                self._tail = (self._tail + data)[-_TAIL_BYTES:]


def _end(process: subprocess.Popen[bytes], *, whole_group: bool) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if process.poll() is None:
        _signal(process, signal.SIGTERM, whole_group)
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL, whole_group)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals, whole_group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if whole_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
