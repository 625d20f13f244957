"""Getting data: readings, which keep a snapshot's data, and records by their ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from casbackup.errors import BlobMissing, SnapshotNotFound
from casbackup.fs import Buffer
from casbackup.ids import BlobId, SnapshotId
from casbackup.limits import MAX_QUESTION_IDS
from casbackup.spec.wire import BINARY, encode_lost, unpack_ids
from casbackup.store.blobstore import Stored
from casbackup_server.context import Context, Ctx, ReadingPath, Readings
from casbackup_server.problems import responses
from casbackup_server.rights import Right
from casbackup_server.routes.binary import Binary, body_of, giving, taking
from casbackup_server.routes.browsing import visible

router = APIRouter(tags=["data"])

_PIECE_BYTES = 512 * 1024


class Reading(BaseModel):
    """``id`` is a random number of the client's, so that asking twice is harmless."""

    id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    snapshot: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@router.post("/readings", status_code=204, responses=responses(404))
async def read(context: Ctx, asked: Reading) -> None:
    """Keep a snapshot's data while it is read, even if it is forgotten. To be said again every 10 seconds."""
    context.access.require(Right.RESTORE)

    def work() -> None:
        if context.served.live.goes_on(asked.id):
            return
        snapshot = visible(context).get(SnapshotId(asked.snapshot))
        if snapshot is None:
            raise SnapshotNotFound(f"there is no snapshot {asked.snapshot[:16]}")
        context.access.require(Right.RESTORE, snapshot.manifest.namespace, snapshot.manifest.vm)
        context.served.live.read(asked.id, snapshot)

    await context.server.threads.run(work)


@router.post("/readings/{reading}/end", status_code=204, responses=responses(404))
async def end_reading(context: Ctx, reading: ReadingPath) -> None:
    """The data is not read any more. One that has ended already is no error."""
    context.access.require(Right.RESTORE)
    await context.server.threads.run(partial(context.served.live.end_reading, reading))


@router.post(
    "/fetch",
    response_class=Binary,
    responses={**responses(404), **giving("Records, or what says that one is lost, in any order.")},
    openapi_extra=taking("Distinct ids.", MAX_QUESTION_IDS * 32),
)
async def fetch(context: Ctx, request: Request, readings: Readings = None) -> Response:
    """The records of blobs. Who decodes them verifies them."""
    context.access.require(Right.RESTORE)
    ids = list(dict.fromkeys(unpack_ids(await body_of(request, MAX_QUESTION_IDS * 32))))
    ids, hidden = await context.server.threads.run(partial(_told_apart, context, ids, readings))
    return StreamingResponse(_stream(context, ids, hidden), media_type=BINARY)


def _told_apart(context: Context, ids: list[BlobId], readings: str | None) -> tuple[list[BlobId], bytes]:
    """What may be given, and what is said of the rest: an isolated client gets what its readings are about."""
    if not context.access.grant.isolated:
        return ids, b""
    hidden = set(ids)
    for own in context.served.live.own_of_readings((readings or "").split(",")):
        hidden &= own.strangers(ids)
    lost = [encode_lost(i, BlobMissing(f"blob {i.hex()[:16]} is not in the repository")) for i in ids if i in hidden]
    return [blob_id for blob_id in ids if blob_id not in hidden], b"".join(lost)


async def _stream(context: Context, ids: list[BlobId], first: bytes) -> AsyncIterator[bytes | memoryview]:
    """A thread gathers the next piece while one is sent; a slow client keeps no thread."""
    pieces = _pieces(context.served.repository.store.fetch_stored(ids))

    def following() -> asyncio.Task[Buffer]:
        return asyncio.create_task(context.server.threads.run(lambda: next(pieces, b"")))

    coming = following()
    try:
        if first:
            yield first
        while piece := await coming:
            coming = following()
            yield memoryview(piece)
    finally:
        coming.cancel()


def _pieces(stored: Iterator[Stored]) -> Iterator[Buffer]:
    """What is long goes as it is, the rest together, about ``_PIECE_BYTES`` at a time."""
    parts: list[Buffer] = []
    size = 0
    for item in stored:
        part = encode_lost(*item) if isinstance(item, tuple) else item
        if size and size + len(part) > _PIECE_BYTES:
            yield _joined(parts)
            parts, size = [], 0
        parts.append(part)
        size += len(part)
    if parts:
        yield _joined(parts)


def _joined(parts: list[Buffer]) -> Buffer:
    return parts[0] if len(parts) == 1 else b"".join(parts)
