"""What a repository is, and what its snapshots cost."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from casbackup.errors import DataDamage, KeyMissing, SnapshotNotFound
from casbackup.ids import SnapshotId
from casbackup.limits import MAX_FORGET, MAX_KEY_FILE_BYTES
from casbackup.peer.usage import usage_of, usage_to_map
from casbackup.repository.catalog import Snapshot
from casbackup.repository.stored_key import read_stored_key, write_stored_key
from casbackup.spec.config import encode_config
from casbackup_server.context import Ctx
from casbackup_server.problems import Refusal, responses
from casbackup_server.rights import Right
from casbackup_server.routes.binary import Binary, body_of, giving, taking
from casbackup_server.routes.browsing import visible

router = APIRouter(tags=["repositories"])


class Groups(BaseModel):
    """Groups of snapshots, by their ids."""

    groups: list[list[str]] = Field(max_length=MAX_FORGET)


class Usage(BaseModel):
    """What a group of snapshots costs, in bytes."""

    logical_bytes: int = Field(description="Of all disks and configs as they are restored.")
    plain_bytes: int = Field(description="Distinct content, without zeros.")
    stored_bytes: int = Field(description="What all that the group needs takes in the repository.")
    unique_bytes: int = Field(description="What of that nothing else needs.")


class UsageOfGroups(BaseModel):
    """The groups in the order of the question; the rest is about the whole repository."""

    groups: list[Usage]
    total: Usage
    dedup_factor: float
    compression_factor: float
    packs_bytes: int
    index_bytes: int


@router.get("/config", response_class=Binary, responses={**responses(404), **giving("config.json")})
async def config(context: Ctx) -> Response:
    """The repository's config.json."""
    context.access.require(Right.READ)
    return Binary(encode_config(context.served.repository.config))


@router.get("/key", response_class=Binary, responses={**responses(404), **giving("The key file.")})
async def stored_key(context: Ctx) -> Response:
    """The wrapped copy of an encrypted repository's key, for who may make or restore snapshots."""
    context.access.require_any(Right.BACKUP, Right.RESTORE)
    data = await context.server.threads.run(lambda: read_stored_key(context.served.repository))
    if data is None:
        raise KeyMissing("the repository has no copy of its key")
    return Binary(data)


@router.put(
    "/key",
    status_code=204,
    responses=responses(400, 409, 413, 507),
    openapi_extra=taking("The key file, in which the key must be wrapped.", MAX_KEY_FILE_BYTES),
)
async def store_key(
    context: Ctx,
    request: Request,
    replace: Annotated[bool, Query(description="Replace the copy that is there, which needs the right admin.")] = False,
) -> None:
    """Keep a wrapped copy of an encrypted repository's key."""
    context.access.require(Right.ADMIN if replace else Right.BACKUP)
    data = await body_of(request, MAX_KEY_FILE_BYTES)
    await context.server.threads.run(lambda: write_stored_key(context.served.repository, data, replace=replace))
    context.note("key stored", fingerprint=context.served.repository.config.key_fingerprint, replaced=replace)


@router.post("/usage", responses=responses(404, 500))
async def usage(context: Ctx, asked: Groups) -> UsageOfGroups:
    """What groups of snapshots cost, and all of them together."""

    def work() -> dict[str, Any]:
        by_id = visible(context)
        groups = [[_known(by_id, text) for text in group] for group in asked.groups]
        try:
            return usage_to_map(usage_of(context.served.repository, groups))
        except DataDamage as damage:
            raise Refusal(500, damage) from damage

    context.access.require(Right.READ)
    if context.access.grant.isolated:
        context.access.require_all(Right.READ)
    return UsageOfGroups(**await context.server.threads.run(work))


def _known(by_id: dict[SnapshotId, Snapshot], text: str) -> Snapshot:
    snapshot = by_id.get(SnapshotId(text))
    if snapshot is None:
        raise SnapshotNotFound(f"there is no snapshot {text[:16]}")
    return snapshot
