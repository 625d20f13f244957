"""Backup sessions: asking what is missing, sending records, committing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from casbackup.errors import CasbackupError, ClockSkewed, DataDamage, ManifestDamaged, ServerProtocolError
from casbackup.ids import SessionId, parse_namespace, parse_vm
from casbackup.limits import (
    MAX_ADOPTED,
    MAX_CLOCK_SKEW_MS,
    MAX_KNOWN_IDS,
    MAX_MANIFEST_BYTES,
    MAX_QUESTION_IDS,
    MAX_REQUEST_BYTES,
    MAX_UPLOAD_BYTES,
)
from casbackup.spec.manifest import Manifest, Sidecar, decode_manifest, decode_sidecar
from casbackup.spec.wire import (
    RefusedFrame,
    SnapshotFrame,
    decode_snapshots,
    encode_refused_snapshot,
    pack_flags,
    pack_ids,
    unpack_ids,
)
from casbackup_server.arrival import check_draft, check_manifest, check_texts, verified_records
from casbackup_server.context import Attachment, Context, Ctx, SessionPath
from casbackup_server.isolation import OwnBlobs
from casbackup_server.known import known_nodes
from casbackup_server.live import LiveSession
from casbackup_server.problems import Refusal, problem_body, responses, status_of
from casbackup_server.rights import Right
from casbackup_server.routes.binary import Binary, body_into, body_of, declared_bytes, giving, taking
from casbackup_server.snapshotframes import frame_of

router = APIRouter(prefix="/sessions", tags=["sessions"])

_HexId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class OpenSession(BaseModel):
    """Whose backup it is, and the number by which the client names itself from now on."""

    namespace: str = Field(max_length=1100, examples=["default"])
    vm: str = Field(max_length=140, examples=["vm/100"])
    attachment: _HexId


class Attach(BaseModel):
    attachment: _HexId
    take_over: bool = Field(
        default=False, description="Also in the place of a client that was attached with the same token."
    )


class SessionOpened(BaseModel):
    id: str = Field(description="Names the session from now on, also to resume it.")


@router.post("", responses=responses(404, 409, 507))
async def open_session(context: Ctx, asked: OpenSession) -> SessionOpened:
    """Open a session. Asked again with the same attachment, it is the same session."""
    namespace, vm = parse_namespace(asked.namespace), parse_vm(asked.vm)
    context.access.require(Right.BACKUP, namespace, vm)
    work = partial(context.served.live.open, namespace, vm, asked.attachment, context.access.name)
    session = await context.server.threads.run(work)
    context.note("session opened", session=session, namespace=namespace, vm=vm)
    return SessionOpened(id=session)


@router.post("/{session}/resume", responses=responses(404, 409))
async def resume(context: Ctx, session: SessionPath, asked: Attach) -> SessionOpened:
    """Attach to a session that is parked, or to which this client is attached already.

    With `take_over`, a client with the same token that is attached loses the session: it may be dead.
    """
    allowed = partial(context.access.require, Right.BACKUP)
    work = partial(
        context.served.live.resume,
        SessionId(session),
        asked.attachment,
        context.access.name,
        allowed,
        take_over=asked.take_over,
    )
    resumed = await context.server.threads.run(work)
    context.note("session resumed", session=resumed, take_over=asked.take_over)
    return SessionOpened(id=resumed)


@router.get("/{session}/known", response_class=Binary, responses={**responses(404, 409, 410), **giving("Ids.")})
async def known(context: Ctx, session: SessionPath, attachment: Attachment) -> Response:
    """Ids of tree nodes of the VM's last snapshot that the session need not ask for."""

    def work() -> bytes:
        with context.served.live.using(SessionId(session), attachment) as live:
            context.access.require(Right.BACKUP, live.namespace, live.vm)
            snapshots, _ = context.served.repository.catalog.survey(live.namespace, live.vm)
            disks = snapshots[-1].manifest.disks if snapshots else ()
            return pack_ids(known_nodes(context.served.repository, live.session, disks, MAX_KNOWN_IDS))

    return Binary(await context.server.threads.run(work))


@router.post("/{session}/heartbeat", status_code=204, responses=responses(404, 409, 410))
async def heartbeat(context: Ctx, session: SessionPath, attachment: Attachment) -> None:
    """A sign of life, for a client that has nothing else to say."""

    def work() -> None:
        with context.served.live.using(SessionId(session), attachment) as live:
            context.access.require(Right.BACKUP, live.namespace, live.vm)

    await context.server.threads.run(work)


@router.post(
    "/{session}/missing",
    response_class=Binary,
    responses={**responses(404, 409, 410), **giving("Flags: which of them must be sent.")},
    openapi_extra=taking("Ids.", MAX_QUESTION_IDS * 32),
)
async def missing(context: Ctx, session: SessionPath, attachment: Attachment, request: Request) -> Response:
    """Which of these blobs must be sent? All others stay stored until the session ends."""
    body = await body_of(request, MAX_QUESTION_IDS * 32)

    def work() -> bytes:
        ids = unpack_ids(body)
        with context.served.live.using(SessionId(session), attachment) as live:
            context.access.require(Right.BACKUP, live.namespace, live.vm)
            absent = live.missing(ids, _own(context, live))
        return pack_flags([blob_id in absent for blob_id in ids])

    return Binary(await context.server.threads.run(work))


@router.post(
    "/{session}/records",
    response_class=Binary,
    responses={**responses(404, 408, 409, 410, 411, 507), **giving("Flags: which of them were new.")},
    openapi_extra=taking("Records, children before the nodes that name them.", MAX_UPLOAD_BYTES),
)
async def records(context: Ctx, session: SessionPath, attachment: Attachment, request: Request) -> Response:
    """Store records. They are verified, and durable when this is answered. What is stored already counts for nothing.

    If a tree node is refused, what stands before it is stored all the same.
    """
    size = declared_bytes(request)

    def work() -> bytes:
        with context.served.live.using(SessionId(session), attachment) as live:
            context.access.require(Right.BACKUP, live.namespace, live.vm)
            return pack_flags(_stored(context, live, body))

    async with context.server.uploading.taken(size):
        with context.server.bodies.lent(size) as body:
            await body_into(request, body)
            return Binary(await context.server.threads.upload(work))


@router.post(
    "/{session}/commit",
    response_class=Binary,
    responses={**responses(404, 409, 410, 507), **giving("The snapshot.")},
    openapi_extra=taking("The manifest as in its file, with number 0 and no parent.", MAX_MANIFEST_BYTES),
)
async def commit(context: Ctx, session: SessionPath, attachment: Attachment, request: Request) -> Response:
    """Make the snapshot visible; the session is over. Asked again, the answer is the same."""
    body = await body_of(request, MAX_MANIFEST_BYTES)

    def work() -> bytes:
        draft = _draft(body)
        context.access.require(Right.BACKUP, draft.namespace, draft.vm)
        prepare = partial(_prepared, context, draft)
        snapshot = context.served.live.commit(SessionId(session), attachment, prepare)
        context.note("snapshot committed", session=session, snapshot=snapshot.reference, id=snapshot.id)
        return frame_of(context.served.repository, snapshot)

    return Binary(await context.server.threads.run(work))


@router.post(
    "/{session}/adopt",
    response_class=Binary,
    responses={**responses(404, 409, 410, 507), **giving("The snapshots.")},
    openapi_extra=taking(f"Snapshots of another repository, {MAX_ADOPTED} at the most.", MAX_REQUEST_BYTES),
)
async def adopt(context: Ctx, session: SessionPath, attachment: Attachment, request: Request) -> Response:
    """Make copies of another repository's snapshots visible as they are, in their order. The session goes on.

    If a copy is refused, those before it are adopted all the same; the answer ends with why.
    """
    body = await body_of(request, MAX_REQUEST_BYTES)

    def work() -> bytes:
        copies = _copied(body)
        for copy in copies:
            for right in (Right.BACKUP, Right.PRUNE):  # its time, number and pin are the sender's
                context.access.require(right, copy.manifest.namespace, copy.manifest.vm)
        with context.served.live.using(SessionId(session), attachment) as live:
            return b"".join(_adopted(context, live, copies))

    return Binary(await context.server.threads.run(work))


@router.post("/{session}/park", status_code=204, responses=responses(404, 409, 410))
async def park(context: Ctx, session: SessionPath, attachment: Attachment) -> None:
    """Leave the session to be resumed."""
    await context.server.threads.run(partial(_end, context, session, attachment, abort=False))


@router.post("/{session}/abort", status_code=204, responses=responses(404, 409, 410))
async def abort(context: Ctx, session: SessionPath, attachment: Attachment) -> None:
    """Give the session up: what only it needs becomes garbage."""
    await context.server.threads.run(partial(_end, context, session, attachment, abort=True))


def _end(context: Context, session: str, attachment: str, *, abort: bool) -> None:
    context.access.require(Right.BACKUP, *context.served.live.owner(SessionId(session)))
    context.served.live.end(SessionId(session), attachment, abort=abort)
    context.note("session aborted" if abort else "session parked", session=session)


def _own(context: Context, live: LiveSession) -> OwnBlobs | None:
    """What the client may be told about; None: everything."""
    return context.served.live.own(live) if context.access.grant.isolated else None


def _stored(context: Context, live: LiveSession, body: memoryview) -> list[bool]:
    """Damage in what arrives is the sender's."""
    try:
        with context.server.threads.computing:
            records = verified_records(body, context.served.repository.codec)
        return live.store(records, _own(context, live))
    except DataDamage as damage:
        raise Refusal(422, damage) from damage


def _draft(body: bytes) -> Manifest:
    try:
        return decode_manifest(body, "in the request")[0]
    except ManifestDamaged as damage:
        raise Refusal(422, damage) from damage


class _Copied(NamedTuple):
    bytes: bytes
    manifest: Manifest
    sidecar: Sidecar


def _copied(body: bytes) -> list[_Copied]:
    """The snapshots of a request, checked."""
    try:
        copies = [_copy(frame) for frame in itertools.islice(decode_snapshots(body), MAX_ADOPTED + 1)]
    except ManifestDamaged as damage:
        raise Refusal(422, damage) from damage
    if not 1 <= len(copies) <= MAX_ADOPTED:
        raise ServerProtocolError(f"the request does not hold 1 to {MAX_ADOPTED} snapshots")
    return copies


def _copy(frame: SnapshotFrame | RefusedFrame | ManifestDamaged) -> _Copied:
    """:raise ManifestDamaged: when it is. :raise UsageError: when a limit is exceeded or a name wrong."""
    if isinstance(frame, ManifestDamaged):
        raise frame
    if isinstance(frame, RefusedFrame):
        raise ServerProtocolError("the request holds what only an answer does")
    manifest, _ = decode_manifest(frame.manifest, "in the request")
    sidecar = decode_sidecar(frame.sidecar, "in the request") if frame.sidecar else Sidecar()
    check_manifest(manifest)
    check_texts(sidecar.labels or (), sidecar.notes or "")
    return _Copied(frame.manifest, manifest, sidecar)


def _adopted(context: Context, live: LiveSession, copies: Sequence[_Copied]) -> Iterator[bytes]:
    """A frame for each that was adopted, and one for the first that was refused."""
    own = _own(context, live)
    for copy in copies:
        try:
            if own is not None:
                own.check_manifest(copy.manifest)
            snapshot = live.session.adopt(copy.bytes, copy.sidecar)
        except CasbackupError as error:
            status = 422 if isinstance(error, DataDamage) else status_of(error)
            yield encode_refused_snapshot(problem_body(status, error))
            return
        context.note("snapshot adopted", session=live.session.id, snapshot=snapshot.reference, id=snapshot.id)
        yield frame_of(context.served.repository, snapshot)


def _prepared(context: Context, draft: Manifest, live: LiveSession) -> Manifest:
    """The draft, checked; time and host are the server's unless the client is trusted with them.

    In a sealed manifest neither can be changed: its time must be near that of the server.
    """
    context.access.require(Right.BACKUP, live.namespace, live.vm)
    own = _own(context, live)
    if own is not None:
        own.check_manifest(draft)
    try:
        check_draft(context.served.repository, draft)
    except DataDamage as damage:
        raise Refusal(422, damage) from damage
    if context.access.stamps and draft.sealed:
        _require_near(draft.time_ms, live.attached_ms, context.served.repository.clock.now_ms())
    elif context.access.stamps:
        return replace(draft, time_ms=live.attached_ms, host=context.access.name)
    return draft


def _require_near(time_ms: int, attached_ms: int, now_ms: int) -> None:
    """:raise ClockSkewed: when it is not a time between the client's coming and now, or near."""
    off_ms = max(attached_ms - time_ms, time_ms - now_ms)
    if off_ms > MAX_CLOCK_SKEW_MS:
        raise ClockSkewed(f"the time of the snapshot is {off_ms // 1000} s off the server's clock")
