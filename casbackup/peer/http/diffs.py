"""What a server says of where two snapshots differ: a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import urllib3

from casbackup.errors import ServerProtocolError, ServerUnreachable
from casbackup.peer.http.problems import failure_of
from casbackup.peer.http.transport import Transport
from casbackup.tree.diff import Range
from casbackup.units import KiB

_READ_BYTES = 64 * KiB
_LONGEST_LINE_BYTES = 64 * KiB
_FAULT = 500


@dataclass(slots=True)
class RestDiskDifference:
    """``ranges`` where the disk may differ, as fine as chunks. A size of None: that snapshot lacks the disk."""

    disk: str
    old_size_bytes: int | None
    new_size_bytes: int | None
    ranges: list[Range] = field(default_factory=list)


def read_diff(transport: Transport, path: str) -> list[RestDiskDifference]:
    """All of an answer.

    :raise ServerUnreachable: when it was cut off. :raise CasbackupError: what the server met.
    """
    found: list[RestDiskDifference] = []
    with transport.stream("GET", path) as answer:
        for line in _lines(answer):
            if line.get("complete") is True:
                return found
            _take(line, found)
    raise ServerUnreachable("the server did not complete its answer")


def _lines(answer: urllib3.BaseHTTPResponse) -> Iterator[dict[str, Any]]:
    rest = b""
    while data := answer.read(_READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _LONGEST_LINE_BYTES:
            raise ServerProtocolError("the server sent a line that is too long")
        yield from map(_parsed, lines)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ServerProtocolError("the server sent something that is no JSON") from error
    if not isinstance(content, dict):
        raise ServerProtocolError("the server sent something that is no JSON object")
    return content


def _take(line: dict[str, Any], found: list[RestDiskDifference]) -> None:
    match line:
        case {"disk": str(disk)}:
            found.append(RestDiskDifference(disk, line.get("old_size_bytes"), line.get("new_size_bytes")))
        case {"offset": int(offset), "length": int(length)} if found:
            found[-1].ranges.append(Range(offset, length))
        case {"problem": dict(problem)}:
            raise failure_of(_FAULT, json.dumps(problem).encode())
        case _:
            raise ServerProtocolError("the server's answer is not understood")
