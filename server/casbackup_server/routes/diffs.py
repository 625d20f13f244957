"""Where two snapshots differ: found here, so that neither data nor tree nodes travel."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from casbackup.errors import CasbackupError, SnapshotNotFound
from casbackup.ids import DiskName, parse_disk
from casbackup.limits import MAX_DISKS
from casbackup.peer.differing import walked_ranges
from casbackup.repository.catalog import Snapshot
from casbackup.spec.wire import LINES
from casbackup.units import KiB
from casbackup_server.context import BrowsingContext, BrowsingCtx
from casbackup_server.problems import Problem, problem_body, responses, status_of
from casbackup_server.rights import Right
from casbackup_server.routes.browsing import SnapshotPath, found_snapshot
from casbackup_server.streaming import Streamed, begun

router = APIRouter(tags=["restore"])

_PIECE_BYTES = 64 * KiB


class DiffLine(BaseModel):
    """A line: one with `disk` for each disk, followed by its ranges. The last line of all has `complete`, or `problem`
    if that is not all.
    """

    disk: str | None = Field(default=None, examples=["scsi0"])
    old_size_bytes: int | None = Field(default=None, description="Absent where that snapshot lacks the disk.")
    new_size_bytes: int | None = None
    offset: int | None = Field(default=None, examples=[1048576])
    length: int | None = Field(default=None, examples=[65536])
    complete: bool | None = None
    problem: Problem | None = None


_ANSWERS = {
    **responses(404, 409, 500),
    200: {
        "description": "A JSON object a line, as `DiffLine`. If the last one is missing, the connection broke.",
        "content": {LINES: {"schema": DiffLine.model_json_schema()}},
    },
}
_To = Annotated[
    str, Query(pattern="^[0-9a-f]{4,64}$", description="The other snapshot's id, or so much that no other fits.")
]
_Disks = Annotated[
    list[str] | None, Query(alias="disk", max_length=MAX_DISKS, description="Only this disk. Repeatable.")
]


@router.get("/snapshots/{snapshot}/diff", response_class=Response, responses=_ANSWERS)
async def diff_snapshots(context: BrowsingCtx, snapshot: SnapshotPath, to: _To, disks: _Disks = None) -> Response:
    """Where the disks of two snapshots differ, as byte ranges: outside of them they are equal, within them they may
    differ. Needs `restore` for both.
    """
    context.access.require(Right.RESTORE)
    wanted = [parse_disk(name) for name in disks or ()]
    stack = contextlib.ExitStack()

    def work() -> Iterator[bytes]:
        old, new = (_comparable(context, id_text) for id_text in (snapshot, to))
        for item in (old, new):
            stack.callback(context.served.reading.acquire(item).end)
        return _pieces(_lines(context, old, new, _chosen(old, new, wanted)))

    try:
        pieces = await context.server.threads.run(work)
        content = await begun(_from_thread(context, pieces))
    except BaseException:
        stack.close()
        raise
    return Streamed(content, stack.close, headers={}, media_type=LINES)


def _comparable(context: BrowsingContext, id_text: str) -> Snapshot:
    """Also of an encrypted repository: where snapshots differ can be told without the key.

    :raise RightMissing: when the request may only see it.
    """
    found = found_snapshot(context, id_text)
    context.access.require(Right.RESTORE, found.manifest.namespace, found.manifest.vm)
    return found


def _chosen(old: Snapshot, new: Snapshot, wanted: list[DiskName]) -> list[DiskName]:
    """:raise SnapshotNotFound: when neither snapshot has one of them."""
    names = sorted({disk.name for snapshot in (old, new) for disk in snapshot.manifest.disks})
    for name in wanted:
        if name not in names:
            raise SnapshotNotFound(f"neither snapshot has a disk {name}")
    return wanted or names


def _lines(
    context: BrowsingContext, old: Snapshot, new: Snapshot, disks: list[DiskName]
) -> Iterator[dict[str, object]]:
    for disk in disks:
        sizes = {"old_size_bytes": _size(old, disk), "new_size_bytes": _size(new, disk)}
        yield {"disk": disk, **{key: size for key, size in sizes.items() if size is not None}}
        for found in walked_ranges(context.served.peer, old, new, disk):
            yield {"offset": found.offset, "length": found.length}
    yield {"complete": True}


def _size(snapshot: Snapshot, name: DiskName) -> int | None:
    return next((disk.size_bytes for disk in snapshot.manifest.disks if disk.name == name), None)


def _pieces(lines: Iterator[dict[str, object]]) -> Iterator[bytes]:
    """An error before the first piece is raised: the answer can still say so. A later one is the last line."""
    piece = bytearray()
    is_first = True
    try:
        for line in lines:
            piece += json.dumps(line, separators=(",", ":")).encode() + b"\n"
            if len(piece) >= _PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
                is_first = False
    except CasbackupError as error:
        if is_first:
            raise
        piece += b'{"problem":' + problem_body(status_of(error), error) + b"}\n"
    yield bytes(piece)


async def _from_thread(context: BrowsingContext, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while piece := await context.server.threads.run(lambda: next(pieces, b"")):
        yield piece
