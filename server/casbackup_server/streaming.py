"""Bodies of any length, a piece at a time.

Whoever has passed a piece on forgets it: the next one may take long to come, and when a client goes away, the frames
live on in the error's traceback until the garbage is collected.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from casbackup.errors import CasbackupError
from casbackup.fs import Buffer

STALL_S = 60.0
"""A client that takes nothing for so long is given up: it keeps data from being removed."""


class CutOff(ConnectionAbortedError):
    """The body cannot be completed. Breaking the connection is what tells the client."""


class Streamed(StreamingResponse):
    """``pieces`` are sent as they come; ``ended`` is called once, whatever happens."""

    def __init__(
        self,
        pieces: AsyncIterator[Buffer],
        ended: Callable[[], None],
        *,
        status_code: int = 200,
        headers: Mapping[str, str],
        media_type: str,
    ) -> None:
        super().__init__(_as_sent(pieces), status_code, headers, media_type)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self.body_iterator:
            message: dict[str, object] = {"type": "http.response.body", "body": piece, "more_body": True}
            del piece
            try:
                await self._send(send, message)
            finally:
                message.clear()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: dict[str, object]) -> None:
        try:
            async with asyncio.timeout(STALL_S):
                await send(message)
        except TimeoutError as error:
            raise CutOff(f"the client took nothing for {STALL_S:.0f} s") from error


async def begun(pieces: AsyncIterator[Buffer]) -> AsyncIterator[Buffer]:
    """The same pieces, the first of them already there: what keeps it from coming is raised here, while the answer
    can still say so.
    """
    first = await anext(pieces, b"")
    return _chained(first, pieces)


async def _chained(first: Buffer, rest: AsyncIterator[Buffer]) -> AsyncIterator[Buffer]:
    if first:
        yield first
    del first
    async for piece in rest:
        yield piece
        del piece


async def _as_sent(pieces: AsyncIterator[Buffer]) -> AsyncIterator[memoryview]:
    try:
        async for piece in pieces:
            yield memoryview(piece)
            del piece
    except CasbackupError as error:
        raise CutOff(str(error)) from error
