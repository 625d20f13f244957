"""Bodies that are not JSON, and how OpenAPI describes them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from casbackup.errors import RequestRefused, ServerProtocolError
from casbackup.spec.wire import BINARY
from casbackup_server.problems import Refusal
from casbackup_server.protocol import direct_body

_SCHEMA = {"type": "string", "format": "binary"}


def taking(description: str, longest: int) -> dict[str, Any]:
    """What OpenAPI says of an operation with a binary body."""
    schema = {**_SCHEMA, "maxLength": longest}
    return {"requestBody": {"required": True, "description": description, "content": {BINARY: {"schema": schema}}}}


def giving(description: str) -> dict[int | str, dict[str, Any]]:
    """What it says of one with a binary answer."""
    return {200: {"description": description, "content": {BINARY: {"schema": _SCHEMA}}}}


class Binary(Response):
    """A binary answer that is in memory."""

    media_type = BINARY


async def body_of(request: Request, longest: int) -> bytes:
    """All of a body that may be ``longest`` bytes.

    :raise RequestRefused: when it is longer.
    """
    parts: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > longest:
            raise RequestRefused(f"more than {longest} bytes where no more make sense")
        parts.append(piece)
    return b"".join(parts)


def declared_bytes(request: Request) -> int:
    """:raise RequestRefused: when the request does not say how long it is."""
    text = request.headers.get("content-length", "")
    if not text.isascii() or not text.isdigit():
        raise Refusal(411, RequestRefused("a request with records must say its length"))
    return int(text)


async def body_into(request: Request, buffer: memoryview) -> None:
    """Fill memory with a body that has been declared to be as long.

    :raise ServerProtocolError: when it is not.
    """
    take = direct_body(request.scope)
    if take is not None:
        await take(buffer)
        return
    position = 0
    async for piece in request.stream():
        end = position + len(piece)
        if end > len(buffer):
            break
        buffer[position:end] = piece
        position = end
    if position != len(buffer):
        raise ServerProtocolError("the body of the request was cut off")
