"""Snapshots as archives of other formats, made while they are sent."""

from __future__ import annotations

import contextlib
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from casbackup.errors import ArchiveUnsupported, ServerBusy
from casbackup.formats.port import ArchiveFormat, ArchiveWriter
from casbackup.formats.registry import format_by_name
from casbackup.jobs.export import archive_name, plan_export
from casbackup.limits import MAX_DISKS, MAX_REST_EXPORTS
from casbackup.repository.catalog import Snapshot
from casbackup_server.context import BrowsingContext, BrowsingCtx
from casbackup_server.diskbody import RAW
from casbackup_server.exporting import RunningExport
from casbackup_server.problems import responses
from casbackup_server.rights import Right
from casbackup_server.routes.browsing import SnapshotPath, restorable
from casbackup_server.streaming import Streamed, begun

router = APIRouter(tags=["restore"])

_Format = Annotated[
    str,
    Query(
        alias="format",
        pattern="^[a-z0-9_-]{1,32}$",
        description="Any that can be written to a pipe: `vma`, `tar`, `qcow2`, `raw`, ...",
        examples=["vma"],
    ),
]
_Disks = Annotated[
    list[str] | None, Query(alias="disk", max_length=MAX_DISKS, description="Only this disk. Repeatable.")
]
_ANSWERS = {
    **responses(404, 409, 500),
    200: {
        "description": "The archive. If it cannot be completed, the connection breaks.",
        "content": {RAW: {"schema": {"type": "string", "format": "binary"}}},
    },
}


@router.get("/snapshots/{snapshot}/export", response_class=Response, responses=_ANSWERS)
async def export_snapshot(
    context: BrowsingCtx,
    snapshot: SnapshotPath,
    format_name: _Format = "vma",
    compress: Annotated[Literal["none", "zstd", "gzip"], Query(description="Compress the archive.")] = "none",
    disks: _Disks = None,
) -> Response:
    """The snapshot as an archive, the same bytes as `casbackup export` writes to a pipe. Needs `restore`."""
    context.access.require(Right.RESTORE)

    def work() -> tuple[RunningExport, str]:
        with contextlib.ExitStack() as stack:
            found = restorable(context, snapshot)
            _take_place(context, stack)
            stack.enter_context(context.served.peer.reading(found))
            return _started(context, found, format_name, compress, disks or [], stack)

    running, name = await context.server.threads.run(work)
    try:
        content = await begun(running.pieces(context.server.threads))
    except BaseException:
        running.end()
        raise
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Streamed(content, running.end, headers=headers, media_type=RAW)


def _take_place(context: BrowsingContext, stack: contextlib.ExitStack) -> None:
    places = context.server.exports
    if not places.acquire(blocking=False):
        raise ServerBusy(f"{MAX_REST_EXPORTS} exports are under way already")
    stack.callback(places.release)


def _started(
    context: BrowsingContext,
    snapshot: Snapshot,
    format_name: str,
    compression: str,
    disks: list[str],
    stack: contextlib.ExitStack,
) -> tuple[RunningExport, str]:
    """Start it; what ``stack`` holds is its from then on."""
    archive_format = format_by_name(format_name)
    writer = _writer(archive_format)
    plan = plan_export(context.served.peer, snapshot, archive_format.name, disks)
    writer.check(plan.head)
    context.note("snapshot exported", snapshot=snapshot.reference, id=snapshot.id, format=archive_format.name)
    running = RunningExport(context.served.peer, plan, writer, compression, stack.pop_all().close)
    return running, archive_name(plan, archive_format, compression)


def _writer(archive_format: ArchiveFormat) -> ArchiveWriter:
    """:raise ArchiveUnsupported: when there is none that can write to a pipe."""
    writer = None if archive_format.writer is None else archive_format.writer()
    if writer is None or not writer.capabilities.streams:
        raise ArchiveUnsupported(f"archives of format {archive_format.name} cannot be written to a pipe")
    return writer
