"""The catalog: listing and finding snapshots, changing what may change about them, forgetting them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from casbackup.errors import SnapshotAmbiguous, SnapshotNotFound
from casbackup.ids import SnapshotId, parse_namespace
from casbackup.limits import MAX_FORGET, MAX_LABELS, MAX_STORED_NOTES_BYTES
from casbackup.repository.catalog import Snapshot
from casbackup_server.arrival import check_texts
from casbackup_server.context import Context, Ctx, NamespaceQuery, VmQuery, owner_of
from casbackup_server.problems import responses
from casbackup_server.rights import Right
from casbackup_server.routes.binary import Binary, giving
from casbackup_server.routes.browsing import visible
from casbackup_server.snapshotframes import frame_of, frames_of

router = APIRouter(prefix="/manifests", tags=["snapshots"])

_SnapshotId = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Annotation(BaseModel):
    """What to change; what is absent stays."""

    id: _SnapshotId
    pinned: bool | None = None
    labels: list[str] | None = Field(default=None, max_length=MAX_LABELS)
    notes: str | None = Field(default=None, max_length=MAX_STORED_NOTES_BYTES)


class Forget(BaseModel):
    ids: list[_SnapshotId] = Field(max_length=MAX_FORGET)


class Forgotten(BaseModel):
    removed: int


@router.get("", response_class=Binary, responses={**responses(404), **giving("Snapshots.")})
async def list_manifests(context: Ctx, namespace: NamespaceQuery = None, vm: VmQuery = None) -> Response:
    """Snapshots, in order of namespace, VM and number."""
    context.access.require(Right.READ)
    wanted = owner_of(namespace, vm)

    def work() -> bytes:
        repository = context.served.repository
        found, damaged = repository.catalog.survey(*wanted)
        seen = [s for s in found if context.access.sees(s.manifest.namespace, s.manifest.vm)]
        return frames_of(repository, seen, damaged if context.access.grant.covers_all else [])

    return Binary(await context.server.threads.run(work))


@router.get("/find", response_class=Binary, responses={**responses(404, 409), **giving("The snapshot.")})
async def find(
    context: Ctx,
    reference: Annotated[str, Query(max_length=2400, description="As on the command line: vm/100, an id, ...")],
    namespace: Annotated[str, Query(max_length=1100)] = "default",
) -> Response:
    """The snapshot that a reference means."""
    context.access.require(Right.READ)
    default = parse_namespace(namespace)

    def work() -> bytes:
        repository = context.served.repository
        snapshot = _hiding_others(context, lambda: repository.catalog.find(reference, default), reference)
        return frame_of(repository, snapshot)

    return Binary(await context.server.threads.run(work))


@router.post("/annotate", response_class=Binary, responses={**responses(404, 409, 507), **giving("The snapshot.")})
async def annotate(context: Ctx, asked: Annotation) -> Response:
    """Change a snapshot's pin, labels or notes."""
    context.access.require(Right.PRUNE)
    check_texts(tuple(asked.labels or ()), asked.notes or "")

    def work() -> bytes:
        snapshot = _own(context, [asked.id])[0]
        changed = context.served.peer.annotate(snapshot, pinned=asked.pinned, labels=asked.labels, notes=asked.notes)
        context.note("snapshot changed", snapshot=changed.reference, id=changed.id, changes=_changes(asked))
        return frame_of(context.served.repository, changed)

    return Binary(await context.server.threads.run(work))


@router.post("/forget", responses=responses(404, 409, 507))
async def forget(context: Ctx, asked: Forget) -> Forgotten:
    """Forget snapshots: all of them, or none if one is pinned. Those that are gone already are passed over."""
    context.access.require(Right.PRUNE)

    def work() -> int:
        present = visible(context)
        snapshots = _own(context, [text for text in asked.ids if SnapshotId(text) in present])
        context.served.peer.remove(snapshots)
        for snapshot in snapshots:
            context.note("snapshot forgotten", snapshot=snapshot.reference, id=snapshot.id)
        return len(snapshots)

    return Forgotten(removed=await context.server.threads.run(work))


def _changes(asked: Annotation) -> dict[str, object]:
    return asked.model_dump(exclude={"id"}, exclude_none=True)


def _own(context: Context, ids: list[str]) -> list[Snapshot]:
    """The snapshots with these ids, which the request may change.

    :raise SnapshotNotFound: for one that it may not even see.
    """
    present = visible(context)
    found: list[Snapshot] = []
    for text in dict.fromkeys(ids):
        snapshot = present.get(SnapshotId(text))
        if snapshot is None:
            raise SnapshotNotFound(f"there is no snapshot {text[:16]}")
        context.access.require(Right.PRUNE, snapshot.manifest.namespace, snapshot.manifest.vm)
        found.append(snapshot)
    return found


def _hiding_others(context: Context, find: Callable[[], Snapshot], reference: str) -> Snapshot:
    """What a token may not see is not there for it; not even as one of several that match."""
    try:
        snapshot = find()
    except SnapshotAmbiguous:
        if context.access.grant.covers_all:
            raise
        raise SnapshotNotFound(f"no snapshot matches {reference}") from None
    if not context.access.sees(snapshot.manifest.namespace, snapshot.manifest.vm):
        raise SnapshotNotFound(f"no snapshot matches {reference}")
    return snapshot
