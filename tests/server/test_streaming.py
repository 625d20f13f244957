"""Bodies that are sent a piece at a time: what has been sent, or never will be, takes no memory."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Iterator

import pytest
from starlette.types import Message

from casbackup.errors import DataDamage
from casbackup.fs import Buffer
from casbackup_server.streaming import CutOff, Streamed, begun


class Piece(bytearray):
    """Something that can be seen to be gone."""

    __hash__ = object.__hash__


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


class Client:
    """Takes ``most`` pieces, then it is gone: ``send`` fails, or is told to end."""

    def __init__(self, most: int, error: BaseException | None = None) -> None:
        self._most = most
        self._error = error
        self.alive: list[int] = []
        """How many pieces there were whenever one more was sent."""
        self.sent: weakref.WeakSet[Piece] = weakref.WeakSet()

    async def send(self, message: Message) -> None:
        if not message.get("more_body"):
            return
        self.sent.add(message["body"].obj)
        self.alive.append(len(self.sent))
        if len(self.alive) == self._most and self._error is not None:
            raise self._error
        await asyncio.sleep(0)


async def pieces(count: int, error: BaseException | None = None) -> AsyncIterator[Buffer]:
    for _ in range(count):
        yield Piece(4096)
    if error is not None:
        raise error


async def stream(client: Client, content: AsyncIterator[Buffer]) -> BaseException | None:
    response = Streamed(await begun(content), lambda: None, headers={}, media_type="x/y")
    try:
        await response.stream_response(client.send)
    except BaseException as error:
        return error
    return None


def test_one_piece_at_a_time() -> None:
    client = Client(0)
    assert asyncio.run(stream(client, pieces(20))) is None
    assert client.alive == [1] * 20
    assert not client.sent


@pytest.mark.parametrize("error", [OSError("gone"), asyncio.CancelledError()], ids=["broken", "cancelled"])
def test_a_client_that_went_away_leaves_nothing(error: BaseException) -> None:
    client = Client(3, error)
    kept = asyncio.run(stream(client, pieces(20)))
    assert kept is error
    assert client.alive == [1, 1, 1]
    assert not client.sent, "the error's traceback keeps what was not sent"


def test_a_body_that_cannot_be_completed_leaves_nothing() -> None:
    client = Client(0)
    kept = asyncio.run(stream(client, pieces(2, DataDamage("lost"))))
    assert isinstance(kept, CutOff)
    assert not client.sent
