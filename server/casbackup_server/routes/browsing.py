"""What there is to restore, as JSON: namespaces, VMs, snapshots and what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from casbackup.clock import format_time
from casbackup.errors import DiskSealed, SnapshotAmbiguous, SnapshotNotFound
from casbackup.ids import SnapshotId
from casbackup.jobs.restore import read_config
from casbackup.limits import MAX_LISTED_SNAPSHOTS
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import ConfigRecord
from casbackup_server.context import BrowsingContext, BrowsingCtx, NamespaceQuery, VmQuery, owner_of
from casbackup_server.problems import responses
from casbackup_server.rights import Right
from casbackup_server.routes.binary import Binary, giving

router = APIRouter(tags=["restore"])

SnapshotPath = Annotated[
    str, Path(pattern="^[0-9a-f]{4,64}$", description="The snapshot's id, or so much of it that no other fits.")
]
_ConfigPath = Annotated[str, Path(pattern="^[A-Za-z0-9_.][A-Za-z0-9._@+ -]{0,254}$", description="The config's name.")]


class Namespace(BaseModel):
    """A namespace that has snapshots."""

    name: str = Field(examples=["default", "acme/prod"])
    vms: int = Field(description="VMs with snapshots.", examples=[12])
    snapshots: int = Field(examples=[340])


class Namespaces(BaseModel):
    namespaces: list[Namespace]


class Vm(BaseModel):
    """A VM that has snapshots. ``latest`` is the one that was made last."""

    namespace: str = Field(examples=["default"])
    name: str = Field(examples=["vm/100"])
    snapshots: int = Field(examples=[31])
    latest: str = Field(description="Id of the latest snapshot.", examples=["3f" * 32])
    latest_time: str = Field(examples=["2026-11-22T20:00:00.123Z"])


class Vms(BaseModel):
    vms: list[Vm]


class Disk(BaseModel):
    """A disk of a snapshot. ``root`` is the hash of all its content and its ``ETag``."""

    name: str = Field(examples=["scsi0"])
    size_bytes: int = Field(examples=[34359738368])
    root: str = Field(examples=["a7" * 32])
    role: str = Field(description="`vmstate` for a VM's memory, else empty.", examples=[""])


class Config(BaseModel):
    name: str = Field(examples=["qemu-server.conf"])
    size_bytes: int = Field(examples=[612])


class SnapshotInfo(BaseModel):
    """All about a snapshot. Of one that is ``sealed``, the server knows neither content, nor what `host`, `notes` and
    the names of configs are.
    """

    model_config = ConfigDict(title="Snapshot")

    id: str = Field(examples=["3f" * 32])
    namespace: str = Field(examples=["default"])
    vm: str = Field(examples=["vm/100"])
    time: str = Field(examples=["2026-11-22T20:00:00.123Z"])
    sequence: int = Field(examples=[31])
    parent: str | None = Field(examples=["1c" * 32])
    host: str = Field(examples=["pve1"])
    pinned: bool
    labels: list[str] = Field(examples=[["before-upgrade"]])
    notes: str
    sealed: bool = Field(description="Only a client with the key can restore it.", examples=[False])
    disks: list[Disk]
    configs: list[Config]


class Snapshots(BaseModel):
    """``total`` counts all that match; ``snapshots`` are those of this page."""

    total: int = Field(examples=[31])
    snapshots: list[SnapshotInfo]


@router.get("/namespaces", responses=responses(404))
async def namespaces(context: BrowsingCtx) -> Namespaces:
    """The namespaces that have snapshots."""
    found = await _seen(context, None, None)
    return Namespaces(
        namespaces=[
            Namespace(name=name, vms=len({s.manifest.vm for s in members}), snapshots=len(members))
            for name, group in groupby(found, lambda s: s.manifest.namespace)
            if (members := list(group))
        ]
    )


@router.get("/vms", responses=responses(404))
async def vms(context: BrowsingCtx, namespace: NamespaceQuery = None) -> Vms:
    """The VMs that have snapshots."""
    found = await _seen(context, namespace, None)
    groups = [list(group) for _, group in groupby(found, lambda s: (s.manifest.namespace, s.manifest.vm))]
    return Vms(vms=[_vm(group) for group in groups])


@router.get("/snapshots", responses=responses(404))
async def snapshots(
    context: BrowsingCtx,
    namespace: NamespaceQuery = None,
    vm: VmQuery = None,
    last: Annotated[int | None, Query(ge=1, le=2**31, description="Only the latest so many of each VM.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED_SNAPSHOTS, description="How many to list.")] = 1000,
    offset: Annotated[int, Query(ge=0, le=2**31, description="How many to pass over.")] = 0,
) -> Snapshots:
    """Snapshots, in order of namespace, VM and number."""
    found = await _seen(context, namespace, vm)
    if last is not None:
        groups = groupby(found, lambda s: (s.manifest.namespace, s.manifest.vm))
        found = [snapshot for _, group in groups for snapshot in list(group)[-last:]]
    return Snapshots(total=len(found), snapshots=[_info(s) for s in found[offset : offset + limit]])


@router.get("/snapshots/{snapshot}", responses=responses(404, 409))
async def snapshot_info(context: BrowsingCtx, snapshot: SnapshotPath) -> SnapshotInfo:
    """All about a snapshot: its disks and configs, too."""
    context.access.require(Right.READ)
    return _info(await context.server.threads.run(partial(found_snapshot, context, snapshot)))


@router.get(
    "/snapshots/{snapshot}/configs/{config}",
    response_class=Binary,
    responses={**responses(404, 409, 500), **giving("The config, as it was backed up.")},
)
async def config_content(context: BrowsingCtx, snapshot: SnapshotPath, config: _ConfigPath) -> Response:
    """A config that was backed up with the VM. Needs the right `restore`."""

    def work() -> bytes:
        found = restorable(context, snapshot)
        record = _config_of(found, config)
        with context.served.peer.reading(found):
            return read_config(context.served.peer, record)

    context.access.require(Right.RESTORE)
    return Binary(await context.server.threads.run(work))


def found_snapshot(context: BrowsingContext, id_text: str) -> Snapshot:
    """The snapshot whose id begins like this.

    :raise SnapshotNotFound: when none does that the request may see. :raise SnapshotAmbiguous: when several do.
    """
    matching = [snapshot for snapshot_id, snapshot in visible(context).items() if snapshot_id.startswith(id_text)]
    if not matching:
        raise SnapshotNotFound(f"there is no snapshot {id_text[:16]}")
    if len(matching) > 1:
        raise SnapshotAmbiguous(f"{len(matching)} snapshots have ids that begin with {id_text}")
    return matching[0]


def restorable(context: BrowsingContext, id_text: str) -> Snapshot:
    """Such a snapshot whose data the request may have. One that is open is found without a look at all others.

    :raise RightMissing: when it may only be seen. :raise DiskSealed: when it is encrypted, and the key is not here.
    """
    snapshot = context.served.reading.known(id_text)
    if snapshot is None or not context.access.sees(snapshot.manifest.namespace, snapshot.manifest.vm):
        snapshot = found_snapshot(context, id_text)
    context.access.require(Right.RESTORE, snapshot.manifest.namespace, snapshot.manifest.vm)
    if context.served.peer.codec.is_blind:
        key = context.served.peer.config.key_fingerprint
        raise DiskSealed(f"{snapshot.reference} is encrypted with key {key}, which this server does not have")
    return snapshot


def visible(context: BrowsingContext) -> dict[SnapshotId, Snapshot]:
    """The snapshots that this request may see."""
    found, _ = context.served.peer.survey()
    return {s.id: s for s in found if context.access.sees(s.manifest.namespace, s.manifest.vm)}


async def _seen(context: BrowsingContext, namespace: str | None, vm: str | None) -> list[Snapshot]:
    """The snapshots that the request may see, in order."""
    context.access.require(Right.READ)
    wanted = owner_of(namespace, vm)
    found, _ = await context.server.threads.run(partial(context.served.peer.survey, *wanted))
    return [s for s in found if context.access.sees(s.manifest.namespace, s.manifest.vm)]


def _vm(group: Sequence[Snapshot]) -> Vm:
    latest = group[-1]
    return Vm(
        namespace=latest.manifest.namespace,
        name=latest.manifest.vm,
        snapshots=len(group),
        latest=latest.id,
        latest_time=format_time(latest.manifest.time_ms),
    )


def _info(snapshot: Snapshot) -> SnapshotInfo:
    manifest = snapshot.manifest
    return SnapshotInfo(
        id=snapshot.id,
        namespace=manifest.namespace,
        vm=manifest.vm,
        time=format_time(manifest.time_ms),
        sequence=manifest.sequence,
        parent=manifest.parent,
        host=manifest.host,
        pinned=snapshot.pinned,
        labels=list(snapshot.labels),
        notes="" if manifest.sealed else snapshot.notes,
        sealed=bool(manifest.sealed),
        disks=[Disk(name=d.name, size_bytes=d.size_bytes, root=d.root.hex(), role=d.role) for d in manifest.disks],
        configs=[Config(name=c.name, size_bytes=c.size_bytes) for c in manifest.configs],
    )


def _config_of(snapshot: Snapshot, name: str) -> ConfigRecord:
    for config in snapshot.manifest.configs:
        if config.name == name:
            return config
    raise SnapshotNotFound(f"{snapshot.reference} has no config {name}")
