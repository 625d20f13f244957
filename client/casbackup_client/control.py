"""Live backups seen and steered from another terminal: each listens on a socket in the user's runtime folder.

A request and its answer are one line of JSON each: ``{"do": "status"}``, also ``pause``, ``resume``, ``cancel``, and
``speed`` with ``bytes_s``. The answer is a ``JobDocument``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from casbackup.errors import BackupJobNotFound

if TYPE_CHECKING:
    from casbackup.ids import Namespace, VmName
    from casbackup.qemu.control import LiveControl
    from casbackup_client.documents import JobDocument

_SUFFIX = ".job"
_TIMEOUT_S = 5.0
_MAX_LINE_BYTES = 64 * 1024


def runtime_folder() -> str:
    """A folder that only this user can use and that ends with the machine's run, made if need be."""
    user = os.geteuid()
    base = os.environ.get("XDG_RUNTIME_DIR") or ("/run" if user == 0 else "")
    folder = os.path.join(base, "casbackup") if base and os.path.isdir(base) else f"/tmp/casbackup-{user}"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user:
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


class ControlServer:
    """While entered, others can control a backup. Without a place for the socket there is just no control."""

    def __init__(self, control: LiveControl, namespace: Namespace, vm: VmName) -> None:
        self._control = control
        self._namespace = namespace
        self._vm = vm
        self._path = ""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            path = os.path.join(runtime_folder(), f"{os.getpid()}{_SUFFIX}")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.fchmod(self._listener.fileno(), 0o600)
            self._listener.bind(path)
            self._listener.listen()
            self._path = path
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            with stream, contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the asker's own fault
                stream.settimeout(_TIMEOUT_S)
                self._obey(_receive(stream))
                stream.sendall(json.dumps(self._document()).encode() + b"\n")

    def _obey(self, request: dict[str, Any]) -> None:
        action = request["do"]
        if action == "pause":
            self._control.pause()
        elif action == "resume":
            self._control.resume()
        elif action == "cancel":
            self._control.cancel("cancelled by `casbackup job cancel`")
        elif action == "speed":
            self._control.limit_speed(int(request["bytes_s"]))

    def _document(self) -> JobDocument:
        status = self._control.status
        return {
            "id": str(os.getpid()),
            "namespace": self._namespace,
            "vm": self._vm,
            "phase": "cancelling" if self._control.cancelled else status.phase,
            "paused": status.paused,
            "done_bytes": status.done_bytes,
            "total_bytes": status.total_bytes,
            "rate_bytes_s": status.taken_bytes_s,
            "speed_limit_bytes_s": status.speed_limit_bytes_s,
            "waiting_bytes": status.waiting_bytes,
            "spooled_bytes": status.spooled_bytes,
        }


def running_jobs() -> list[JobDocument]:
    """Of this user on this machine. Sockets that a dead backup left behind are removed."""
    return [document for _path, document in _jobs()]


def ask(job: str, action: str, **arguments: int) -> JobDocument:
    """Have a job, named by its id or its VM, do something.

    :raise BackupJobNotFound: when there is not exactly one such job.
    """
    matching = [path for path, document in _jobs() if job in (document["id"], document["vm"])]
    if len(matching) != 1:
        raise BackupJobNotFound(f"{len(matching) or 'no'} backups of a running VM match {job!r}")
    answer = _ask(matching[0], {"do": action, **arguments})
    if answer is None:
        raise BackupJobNotFound(f"{job} has just ended")
    return answer


def _jobs() -> Iterator[tuple[str, JobDocument]]:
    folder = runtime_folder()
    for name in sorted(os.listdir(folder)):
        if name.endswith(_SUFFIX):
            path = os.path.join(folder, name)
            document = _ask(path, {"do": "status"})
            if document is not None:
                yield path, document


def _ask(path: str, request: dict[str, Any]) -> JobDocument | None:
    """None when the job is over."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.settimeout(_TIMEOUT_S)
            stream.connect(path)
            stream.sendall(json.dumps(request).encode() + b"\n")
            return cast("JobDocument", _receive(stream))
    except ConnectionRefusedError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        return None
    except (OSError, ValueError):
        return None


def _receive(stream: socket.socket) -> dict[str, Any]:
    """:raise ValueError: when it is no line of JSON."""
    data = b""
    while not data.endswith(b"\n"):
        received = stream.recv(4096)
        if not received or len(data) > _MAX_LINE_BYTES:
            raise ValueError("not a request")
        data += received
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("not a request")
    return document
