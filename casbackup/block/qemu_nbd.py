"""Image files of any format that QEMU knows, through a ``qemu-nbd`` of our own.

**Options.** None is newer than QEMU 2.12, so nothing has to be detected. Read-only images are served with
``--read-only``; writable ones with ``--discard=unmap --detect-zeroes=off``. Both use ``--cache=writeback``:
the host's page cache, and a flush of ours becomes an fsync.

**Nothing stays behind.** qemu-nbd runs in a session of its own, so that a Ctrl-C at the terminal does not
reach it before our cleanup, and without ``--persistent``, so that it ends when the last of our connections
does. Before the first connection that does not help, so a small shell beside it waits on a pipe whose other
end only we hold: when we are gone, however that came about, it ends qemu-nbd and removes the folder with the
socket. (PR_SET_PDEATHSIG would fire when the *thread* that started the program ends, and needs
``preexec_fn``, which is unsafe with threads.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator

from casbackup.block.nbd.client import MAX_CONNECTIONS, NbdClient, open_pool
from casbackup.block.nbd.connection import Connection
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.private_folder import private_folder
from casbackup.block.qemu_img import local_name, tool_environment, tool_message
from casbackup.errors import CasbackupError, NbdConnectionFailed, TargetUnsuitable, ToolFailed, ToolMissing

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 60.0
"""A writable image may have gigabytes to bring to the disk when it is closed."""
_POLL_S = 0.003
_REQUEST_TIMEOUT_S = 60.0

_SOCKET = "nbd.sock"
_MESSAGES = "stderr"

# $1: the folder; the rest: the command. The shell becomes qemu-nbd, whose process id therefore is $$ and ours
# to wait for. A line on the pipe says that all is well and over, the end of the pipe that we are dead. One
# SIGTERM is not enough then: qemu-nbd forgets those that come while it starts.
_LAUNCHER = f"""
folder=$1
shift
clean() {{
    rm -f "$folder/{_SOCKET}" "$folder/{_MESSAGES}"
    rmdir "$folder"
}}
exec 3<&0 </dev/null
(
    trap '' HUP INT
    if ! read line <&3; then
        tries=0
        while kill $$ && [ $tries -lt 50 ]; do
            clean
            sleep 0.1
            tries=$((tries + 1))
        done
        kill -9 $$
        clean
    fi
) >/dev/null 2>&1 &
exec 3<&-
exec "$@"
"""


class QemuNbd:
    """A running qemu-nbd that serves one image on a socket in a folder that only we can enter."""

    def __init__(self, path: str, image_format: str, *, writable: bool) -> None:
        """Start it; it may not be listening yet.

        :raise ToolMissing: when qemu-nbd is not installed.
        :raise ToolFailed: when it cannot be started.
        """
        program = shutil.which("qemu-nbd")
        if program is None:
            raise ToolMissing(f"qemu-nbd is not installed; it is needed for {path}")
        self._path = path
        try:
            self._folder = private_folder(_SOCKET)
        except TargetUnsuitable as error:
            raise ToolFailed(f"qemu-nbd cannot be started: {error.message}") from error
        self.address = NbdAddress(socket_path=os.path.join(self._folder, _SOCKET))
        try:
            self._process, self._lifeline = self._launch(program, _options(image_format, writable=writable))
        except BaseException as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise ToolFailed(f"qemu-nbd cannot be started: {error.strerror}") from error
            raise

    def connect(self) -> Connection:
        """The first connection, as soon as it listens.

        :raise ToolFailed: when it ends instead or takes too long, with what it said.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._process.poll() is None:
            if os.path.exists(self.address.socket_path or ""):
                with contextlib.suppress(NbdConnectionFailed):
                    return self.connect_more()
            if time.monotonic() > deadline:
                raise ToolFailed(f"qemu-nbd did not serve {self._path} within {_START_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
        raise self.failure()

    def connect_more(self) -> Connection:
        """A further connection. Errors as ``Connection.open``."""
        return Connection.open(self.address, connect_timeout_s=_START_TIMEOUT_S, timeout_s=_REQUEST_TIMEOUT_S)

    def failure(self) -> CasbackupError:
        """The error that says how it ended, or that it did not."""
        self._ended_within(1.0)  # a connection ends a moment before the process
        status = self._process.returncode
        how = "does not answer" if status is None else f"ended with status {status}"
        return ToolFailed(f"qemu-nbd {how} while serving {self._path}: {self._messages()}")

    def stop(self) -> None:
        """Wait until it has closed the image after the last disconnect, and clean up. Harmless if it is done.

        :raise ToolFailed: when it did not end well: what was written may not be there.
        """
        if self._lifeline < 0:
            return
        try:
            if not self._ended_within(_STOP_TIMEOUT_S) or self._process.returncode != 0:
                raise self.failure()
        finally:
            self.kill()

    def kill(self) -> None:
        """End it now, and clean up. Nothing is promised about the image then; for readers that is no loss."""
        if self._lifeline < 0:
            return
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            os.write(self._lifeline, b"\n")
        os.close(self._lifeline)
        self._lifeline = -1
        shutil.rmtree(self._folder, ignore_errors=True)

    def _launch(self, program: str, options: list[str]) -> tuple[subprocess.Popen[bytes], int]:
        """The process and the end of the pipe whose closing ends it."""
        socket = f"--socket={self.address.socket_path}"
        command = [program, *options, socket, "--", local_name(self._path)]
        theirs, ours = os.pipe()
        try:
            with open(os.path.join(self._folder, _MESSAGES), "wb") as messages:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", _LAUNCHER, "sh", self._folder, *command],
                    stdin=theirs,
                    stdout=messages,
                    stderr=messages,
                    env=tool_environment(),
                    start_new_session=True,
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return process, ours

    def _ended_within(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _messages(self) -> str:
        try:
            with open(os.path.join(self._folder, _MESSAGES), "rb") as file:
                return tool_message(file.read())
        except OSError:
            return "it gave no reason"


class QemuImage(NbdClient):
    """An image of any format as a block device. Closing it ends the qemu-nbd behind.

    Calls raise ``ToolFailed``, with what qemu-nbd said, where it has gone; otherwise what ``NbdClient`` does.
    """

    def __init__(self, server: QemuNbd) -> None:
        """Takes over ``server``."""
        self._server = server
        pool = open_pool(server.connect(), server.connect_more, MAX_CONNECTIONS)
        super().__init__(pool, _REQUEST_TIMEOUT_S)

    @classmethod
    def open(cls, path: str, image_format: str, *, writable: bool = False) -> QemuImage:
        """Serve an image file and connect to it.

        :raise ToolMissing: when qemu-nbd is not installed.
        :raise ToolFailed: when qemu-nbd cannot open it: not of that format, no rights, in use by a VM, …
        """
        server = QemuNbd(path, image_format, writable=writable)
        try:
            return cls(server)
        except BaseException:
            server.kill()
            raise

    def close(self) -> None:
        """:raise ToolFailed: when qemu-nbd failed to close an image that it had open for writing."""
        super().close()
        if self.capabilities.writable:
            self._server.stop()
        else:
            self._server.kill()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        try:
            with super()._connection() as connection:
                yield connection
        except NbdConnectionFailed as error:
            raise self._server.failure() from error


def _options(image_format: str, *, writable: bool) -> list[str]:
    access = ["--discard=unmap", "--detect-zeroes=off"] if writable else ["--read-only"]
    return [*access, f"--format={image_format}", "--cache=writeback", f"--shared={MAX_CONNECTIONS}"]
