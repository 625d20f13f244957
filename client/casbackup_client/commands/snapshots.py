"""``casbackup snapshots`` and ``casbackup show``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup_client.app import App, KeyUse
from casbackup_client.options import command, pass_app, reference_argument, vm_argument

if TYPE_CHECKING:
    from casbackup.repository.catalog import Snapshot
    from casbackup_client.views import View


@command("snapshots")
@vm_argument("vms", metavar="[VM]...", nargs=-1)
@click.option("--vm", "more_vms", metavar="VM", multiple=True, help="Only those of this VM. Repeatable.")
@click.option(
    "--label",
    "labels",
    metavar="LABEL",
    multiple=True,
    help="Only those with this label. Repeatable: any of them.",
)
@click.option("--all-namespaces", is_flag=True, help="Those of all namespaces.")
@pass_app
def snapshots(
    app: App, vms: tuple[str, ...], more_vms: tuple[str, ...], labels: tuple[str, ...], all_namespaces: bool
) -> None:
    """List snapshots, a VM's oldest first.

    A snapshot is named by VM@TIME, by the first digits of its id, or by VM alone for the VM's latest.
    """
    from casbackup.ids import parse_vm
    from casbackup_client.documenting import snapshot_document

    wanted = {parse_vm(name) for name in (*vms, *more_vms)}
    with app.peer(KeyUse.IF_AT_HAND) as peer:
        found, damaged = peer.survey(None if all_namespaces else app.namespace)
    chosen = [
        snapshot
        for snapshot in found
        if (not wanted or snapshot.manifest.vm in wanted)
        and (not labels or not set(labels).isdisjoint(snapshot.labels))
    ]
    app.output.result({"snapshots": [snapshot_document(s) for s in chosen]}, lambda: _list(chosen))
    if damaged:
        raise damaged[0]


def _list(snapshots: list[Snapshot]) -> View:
    from casbackup.units import format_size
    from casbackup_client.views import Table, one_line

    if not snapshots:
        return ["no snapshots"]
    rows = [
        (
            s.id[:8],
            s.reference,
            format_size(s.manifest.size_bytes),
            format_size(s.manifest.stats.new_stored_bytes),
            ",".join(disk.name for disk in s.manifest.disks),
            "pinned" if s.pinned else "",
            ",".join(s.labels),
            one_line(s.notes),
        )
        for s in snapshots
    ]
    return [Table(("id", "snapshot", ">size", ">added", "disks", "", "labels", "notes"), rows)]


@command("show")
@reference_argument()
@pass_app
def show(app: App, reference: str) -> None:
    """Show all about a snapshot: its disks, configs, labels and notes, and what making it took."""
    from casbackup_client.documenting import snapshot_document

    with app.peer(KeyUse.IF_AT_HAND) as peer:
        snapshot = peer.find(reference, app.namespace)
    app.output.result({"snapshot": snapshot_document(snapshot)}, lambda: _details(snapshot))


def _details(snapshot: Snapshot) -> View:
    from casbackup.units import format_size as size
    from casbackup_client.views import Fields, Table

    manifest = snapshot.manifest
    fields = Fields(
        [
            ("snapshot", snapshot.reference),
            ("id", snapshot.id),
            ("number", str(manifest.sequence)),
            ("parent", manifest.parent or "none"),
            ("size", size(manifest.size_bytes)),
            ("pinned", "yes" if snapshot.pinned else "no"),
            ("labels", ", ".join(snapshot.labels) or "none"),
            ("made by", f"{manifest.program} on {manifest.host}"),
            *_live(snapshot),
            *_stats(snapshot),
            *([("notes", snapshot.notes)] if snapshot.notes else []),
        ]
    )
    disks = Table(
        ("disk", ">bytes", ">size", "source"),
        [(d.name, str(d.size_bytes), size(d.size_bytes), d.source) for d in manifest.disks],
    )
    configs = Table(("config", ">bytes"), [(c.name, str(c.size_bytes)) for c in manifest.configs])
    return [fields, *(part for table in (disks, configs) if table.rows for part in ("", table))]


def _live(snapshot: Snapshot) -> list[tuple[str, str]]:
    live = snapshot.manifest.live
    if live is None:
        return []
    frozen = "file systems frozen" if live.frozen else f"file systems not frozen: {live.note}"
    state = f"with its memory ({live.vmstate}), for which it stood still for {live.pause_ms} ms"
    taken = f"while the VM ran, QEMU {live.qemu} ({live.mode}), {state if live.vmstate else frozen}"
    return [("taken", taken), *([("not pulled", live.mode_note)] if live.mode_note else [])]


def _stats(snapshot: Snapshot) -> list[tuple[str, str]]:
    from casbackup.units import format_duration
    from casbackup.units import format_size as size

    stats = snapshot.manifest.stats
    return [
        ("took", format_duration(stats.duration_ms / 1000)),
        ("read", size(stats.read_bytes)),
        ("new", f"{size(stats.new_bytes)}, stored as {size(stats.new_stored_bytes)}"),
        ("reused", size(stats.reused_bytes)),
        ("zero", size(stats.zero_bytes)),
    ]
