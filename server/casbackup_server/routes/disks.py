"""The content of disks, raw: all of it, or ranges, as programs expect of a file on a web server."""

from __future__ import annotations

from email.utils import formatdate
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response

from casbackup.errors import UsageError
from casbackup.jobs.restore import find_disk
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import DiskRecord
from casbackup_server.context import BrowsingContext, BrowsingCtx
from casbackup_server.diskbody import RAW, Body, multipart, pieces, plain
from casbackup_server.problems import Refusal, problem, responses
from casbackup_server.ranges import Span, parse_ranges
from casbackup_server.rights import Right
from casbackup_server.routes.browsing import SnapshotPath, restorable
from casbackup_server.streaming import Streamed, begun

router = APIRouter(tags=["restore"])

_PATH = "/snapshots/{snapshot}/disks/{disk}"
_DiskPath = Annotated[str, Path(pattern="^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$", description="The disk's name.")]
_Range = Annotated[
    str | None,
    Header(alias="Range", max_length=4096, description="`bytes=0-1048575`; several ranges come as multipart."),
]
_IfRange = Annotated[
    str | None, Header(alias="If-Range", max_length=256, description="Give ranges only of the disk with this ETag.")
]
_IfNoneMatch = Annotated[
    str | None, Header(alias="If-None-Match", max_length=4096, description="Give nothing if the disk has this ETag.")
]

_CONTENT = {RAW: {"schema": {"type": "string", "format": "binary"}}}
_MULTIPART = {"multipart/byteranges": {"schema": {"type": "string", "format": "binary"}}}
_ANSWERS = {
    **responses(404, 409, 416, 500),
    200: {"description": "The whole disk.", "content": _CONTENT},
    206: {"description": "The ranges.", "content": {**_CONTENT, **_MULTIPART}},
    304: {"description": "The client has this disk already."},
}


@router.get(_PATH, response_class=Response, responses=_ANSWERS)
async def read_disk(
    context: BrowsingCtx,
    snapshot: SnapshotPath,
    disk: _DiskPath,
    range_header: _Range = None,
    if_range: _IfRange = None,
    if_none_match: _IfNoneMatch = None,
) -> Response:
    """A disk's content, raw. Every byte is verified; where some are lost, the connection breaks. Needs `restore`."""
    found, record = await _disk_of(context, snapshot, disk)
    headers = _headers(found, record)
    if _names(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    wanted = range_header if if_range is None or if_range in (headers["ETag"], headers["Last-Modified"]) else None
    try:
        spans = None if wanted is None else parse_ranges(wanted, record.size_bytes)
    except UsageError as error:
        return problem(Refusal(416, error), headers={"Content-Range": f"bytes */{record.size_bytes}"})
    return await _answer(context, found, record, spans, headers)


@router.head(_PATH, response_class=Response, responses={**_ANSWERS, 200: {"description": "Its size and ETag."}})
async def describe_disk(
    context: BrowsingCtx, snapshot: SnapshotPath, disk: _DiskPath, if_none_match: _IfNoneMatch = None
) -> Response:
    """What the same GET without a range would say of the disk."""
    found, record = await _disk_of(context, snapshot, disk)
    headers = _headers(found, record)
    if _names(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(headers={**headers, "Content-Length": str(record.size_bytes)}, media_type=RAW)


async def _disk_of(context: BrowsingContext, snapshot: str, disk: str) -> tuple[Snapshot, DiskRecord]:
    def work() -> tuple[Snapshot, DiskRecord]:
        found = restorable(context, snapshot)
        return found, find_disk(found, disk)

    context.access.require(Right.RESTORE)
    return await context.server.threads.run(work)


def _headers(snapshot: Snapshot, disk: DiskRecord) -> dict[str, str]:
    return {
        "ETag": f'"{disk.root.hex()}"',
        "Last-Modified": formatdate(snapshot.manifest.time_ms // 1000, usegmt=True),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-transform",
    }


def _names(header: str | None, etag: str) -> bool:
    """Does an ``If-None-Match`` name it? Weak tags count as strong ones, as the standard wants it here."""
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return etag in tags or "*" in tags


async def _answer(
    context: BrowsingContext, snapshot: Snapshot, disk: DiskRecord, spans: list[Span] | None, headers: dict[str, str]
) -> Response:
    body = _body(spans, disk.size_bytes)
    headers["Content-Length"] = str(body.length)
    if spans is not None and len(spans) == 1:
        headers["Content-Range"] = spans[0].content_range(disk.size_bytes)
    lease = await context.server.threads.run(partial(context.served.reading.acquire, snapshot))
    try:
        content = await begun(pieces(context.server.threads, lease.served.disks[disk.name], body))
    except BaseException:
        lease.end()
        raise
    status = 200 if spans is None else 206
    return Streamed(content, lease.end, status_code=status, headers=headers, media_type=body.media_type)


def _body(spans: list[Span] | None, size_bytes: int) -> Body:
    if spans is None:
        return plain(Span(0, size_bytes))
    return plain(spans[0]) if len(spans) == 1 else multipart(spans, size_bytes)
