"""The guest's agent (qemu-ga): freezing the guest's file systems while the point in time is taken.

Its socket speaks JSON lines like QMP, but greets nobody, knows no ids and may still hold an answer that nobody took:
so each conversation begins with ``guest-sync-delimited``. Everything has a timeout, for a guest may hang or lie.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from typing import Any

from casbackup.block.device import Closing
from casbackup.errors import GuestAgentFailed, GuestAgentUnavailable
from casbackup.units import KiB, MiB

SYNC_TIMEOUT_S = 3.0
FREEZE_TIMEOUT_S = 20.0
"""Freezing writes out what is dirty and runs the guest's hooks."""
THAW_TIMEOUT_S = 10.0
_THAW_TRIES = 3
_DELIMITER = b"\xff"
_MAX_ANSWER_BYTES = 1 * MiB


class GuestAgent(Closing):
    """A connection to the agent's unix socket. One thread."""

    def __init__(self, path: str, *, timeout_s: float = SYNC_TIMEOUT_S) -> None:
        """:raise GuestAgentUnavailable: when nobody listens, or the guest does not answer."""
        self._path = path
        self._stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = bytearray()
        try:
            self._stream.settimeout(timeout_s)
            self._stream.connect(path)
            self._synchronise(timeout_s)
        except OSError as error:
            self._stream.close()
            raise GuestAgentUnavailable(f"{path}: {_reason(error)}") from error
        except BaseException:
            self._stream.close()
            raise

    def freeze(self, *, timeout_s: float = FREEZE_TIMEOUT_S) -> int:
        """Freeze all file systems that can be; returns how many. ``thaw`` must follow, even after an error.

        :raise GuestAgentUnavailable: when it takes too long: it may still freeze then.
        :raise GuestAgentFailed: when the agent reports an error.
        """
        return int(self._execute("guest-fsfreeze-freeze", timeout_s))

    def thaw(self, *, timeout_s: float = THAW_TIMEOUT_S) -> int:
        """Thaw them; returns how many. Tried several times, for a frozen guest is worse than a lost backup.

        Errors as ``freeze``, of the last try.
        """
        for attempt in range(1, _THAW_TRIES + 1):
            try:
                self._synchronise(timeout_s)
                return int(self._execute("guest-fsfreeze-thaw", timeout_s))
            except (GuestAgentUnavailable, GuestAgentFailed):
                if attempt == _THAW_TRIES:
                    raise
        raise AssertionError("not reached")

    def close(self) -> None:
        self._stream.close()

    def _synchronise(self, timeout_s: float) -> None:
        """Drop what an earlier client did not take; afterwards requests and answers go together."""
        number = secrets.randbits(31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        deadline = time.monotonic() + timeout_s
        self._send(_DELIMITER + json.dumps(request).encode() + b"\n", timeout_s)
        while True:
            line = self._line(deadline)
            _, delimiter, rest = line.rpartition(_DELIMITER)
            if delimiter and _parsed(rest).get("return") == number:
                return

    def _execute(self, command: str, timeout_s: float) -> Any:
        self._send(json.dumps({"execute": command}).encode() + b"\n", timeout_s)
        answer = _parsed(self._line(time.monotonic() + timeout_s))
        if "error" in answer:
            error = answer["error"]
            raise GuestAgentFailed(f"{command} failed in the guest: {_field(error, 'desc')}")
        return answer.get("return")

    def _send(self, data: bytes, timeout_s: float) -> None:
        try:
            self._stream.settimeout(timeout_s)
            self._stream.sendall(data)
        except OSError as error:
            raise GuestAgentUnavailable(f"{self._path}: {_reason(error)}") from error

    def _line(self, deadline: float) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0 or len(self._buffer) > _MAX_ANSWER_BYTES:
                raise GuestAgentUnavailable(f"{self._path}: the guest's agent does not answer")
            self._buffer += self._receive(left)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _receive(self, timeout_s: float) -> bytes:
        try:
            self._stream.settimeout(timeout_s)
            received = self._stream.recv(64 * KiB)
        except OSError as error:
            raise GuestAgentUnavailable(f"{self._path}: {_reason(error)}") from error
        if not received:
            raise GuestAgentUnavailable(f"{self._path}: the connection was closed")
        return received


def _parsed(line: bytes) -> dict[str, Any]:
    """An answer; what is none has no fields. The guest is not to be trusted with more."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _field(error: object, name: str) -> str:
    text = error.get(name) if isinstance(error, dict) else None
    return str(text)[:300] if text else "no reason given"


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "the guest's agent does not answer"
    return error.strerror or str(error)
