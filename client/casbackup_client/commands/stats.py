"""``casbackup stats``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup.errors import SnapshotNotFound
from casbackup_client.app import App, KeyUse
from casbackup_client.options import command, pass_app, vm_argument

if TYPE_CHECKING:
    from casbackup.ids import Namespace, VmName
    from casbackup.peer.api import Peer
    from casbackup.repository.catalog import Snapshot
    from casbackup_client.documents import StatsDocument, UsageDocument
    from casbackup_client.views import View


@command("stats")
@vm_argument("vms", metavar="[VM]...", nargs=-1)
@click.option("--all-namespaces", is_flag=True, help="Those of all namespaces.")
@pass_app
def stats(app: App, vms: tuple[str, ...], all_namespaces: bool) -> None:
    """Show what snapshots and VMs cost, exactly.

    stored is what all that a snapshot needs takes in the repository; unique what of that nothing else
    needs, so that forgetting it frees so much. Snapshots are listed one by one with -v, --json, or when VMs
    are named. The totals are always those of the whole repository.
    """
    from casbackup.ids import parse_vm

    wanted = {parse_vm(name) for name in vms}
    with app.peer(KeyUse.NONE) as peer:
        chosen = _chosen(peer.snapshots(None if all_namespaces else app.namespace), wanted)
        document = _document(peer, chosen)
    app.output.result(document, lambda: _view(document, with_snapshots=bool(wanted) or app.verbose))


def _chosen(snapshots: list[Snapshot], vms: set[VmName]) -> list[Snapshot]:
    """:raise SnapshotNotFound: when a VM that was named has none."""
    chosen = [s for s in snapshots if not vms or s.manifest.vm in vms]
    for vm in sorted(vms - {s.manifest.vm for s in chosen}):
        raise SnapshotNotFound(f"there is no snapshot of {vm}")
    return chosen


def _document(peer: Peer, chosen: list[Snapshot]) -> StatsDocument:
    from casbackup_client.documenting import usage_document

    groups: dict[tuple[Namespace, VmName], list[Snapshot]] = {}
    for snapshot in chosen:
        groups.setdefault((snapshot.manifest.namespace, snapshot.manifest.vm), []).append(snapshot)
    report = peer.usage([*([snapshot] for snapshot in chosen), *groups.values()])
    of_snapshots, of_vms = report.groups[: len(chosen)], report.groups[len(chosen) :]
    return {
        "snapshots": [
            {"snapshot": s.reference, "id": s.id, **usage_document(usage)}
            for s, usage in zip(chosen, of_snapshots, strict=True)
        ],
        "vms": [
            {"namespace": namespace, "vm": vm, "snapshots": len(group), **usage_document(usage)}
            for ((namespace, vm), group), usage in zip(groups.items(), of_vms, strict=True)
        ],
        "total": usage_document(report.total),
        "dedup_factor": round(report.dedup_factor, 3),
        "compression_factor": round(report.compression_factor, 3),
        "packs_bytes": report.packs_bytes,
        "index_bytes": report.index_bytes,
    }


_COLUMNS = (">logical", ">stored", ">unique", ">shared")


def _view(document: StatsDocument, *, with_snapshots: bool) -> View:
    from casbackup.units import format_size as size
    from casbackup_client.views import Fields, Table

    single = len({item["namespace"] for item in document["vms"]}) < 2
    vms = [
        (item["vm"] if single else f"{item['namespace']}:{item['vm']}", str(item["snapshots"]), *_sizes(item))
        for item in document["vms"]
    ]
    total = document["total"]
    view: list[str | Fields | Table] = [Table(("vm", ">snapshots", *_COLUMNS), vms), ""] if vms else []
    if with_snapshots and document["snapshots"]:
        rows = [(item["id"][:8], item["snapshot"], *_sizes(item)) for item in document["snapshots"]]
        view += [Table(("id", "snapshot", *_COLUMNS), rows), ""]
    totals = Fields(
        [
            ("logical", f"{size(total['logical_bytes'])} in all snapshots of the repository"),
            (
                "distinct",
                f"{size(total['plain_bytes'])}, dedup factor {document['dedup_factor']:.2f} without zeros",
            ),
            (
                "stored",
                f"{size(total['stored_bytes'])}, compression factor {document['compression_factor']:.2f}",
            ),
            (
                "on disk",
                f"{size(document['packs_bytes'])} of packs, {size(document['index_bytes'])} of index",
            ),
        ]
    )
    return [*view, totals]


def _sizes(usage: UsageDocument) -> tuple[str, ...]:
    from casbackup.units import format_size as size

    return tuple(
        size(value)
        for value in (
            usage["logical_bytes"],
            usage["stored_bytes"],
            usage["unique_bytes"],
            usage["shared_bytes"],
        )
    )
