"""``casbackup backup``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from casbackup.errors import UsageError
from casbackup_client.app import App
from casbackup_client.live import LiveFlags, live_backup, live_options
from casbackup_client.options import command, pass_app, vm_argument
from casbackup_client.views import counted

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from casbackup.jobs.backup import BackupRequest, DiskInput
    from casbackup.repository.catalog import Snapshot
    from casbackup_client.views import View


def _complete_source(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


@command("backup")
@vm_argument()
@click.argument("disks", metavar="[DISK=SOURCE]...", nargs=-1, shell_complete=_complete_source)
@click.option(
    "--config",
    "configs",
    metavar="[NAME=]PATH",
    multiple=True,
    help="A file to keep with the disks, such as the VM's configuration. Repeatable.",
)
@click.option("--label", "labels", metavar="LABEL", multiple=True, help="A label for the snapshot. Repeatable.")
@click.option("--notes", metavar="TEXT", default="", help="Notes for the snapshot.")
@click.option("--format", "image_format", metavar="FORMAT", help="The sources' image format, such as raw or qcow2.")
@click.option("--resume", metavar="SESSION", help="Go on with a session that was interrupted.")
@click.option("--time", metavar="TIME", help="The snapshot's time, such as 2026-11-22T20:00:00Z; default: now.")
@live_options
@pass_app
def backup(
    app: App,
    /,
    vm: str,
    disks: tuple[str, ...],
    configs: tuple[str, ...],
    labels: tuple[str, ...],
    notes: str,
    image_format: str | None,
    resume: str | None,
    time: str | None,
    **live: Any,
) -> None:
    """Back up the disks of a VM as one snapshot.

    A SOURCE is a raw file, a block device, an image of any format that qemu-img knows (qcow2, vmdk, vhdx,
    ...), an NBD URI (nbd://host/export, nbd+unix:///export?socket=PATH), or - for a raw disk from standard
    input.

    \b
    casbackup backup vm/100 scsi0=vm.raw
    casbackup backup vm/100 scsi0=root.qcow2 virtio1=/dev/vg0/data --config 100.conf
    zcat vm.raw.gz | casbackup backup vm/100 scsi0=-

    With --qmp the VM is running, and all its disks are backed up as they are at one instant. The guest goes on and
    sees neither an error nor a pause beyond --max-guest-stall because of it. The next such backup reads only what
    the guest has written since.

    \b
    casbackup backup vm/100 --qmp /run/vm100.qmp --config /etc/pve/qemu-server/100.conf

    What is stored already is not stored again. An interrupted backup leaves no snapshot, and what it stored
    is not sent again by the next one.
    """
    from casbackup.clock import parse_time
    from casbackup.ids import parse_label, parse_session, parse_vm
    from casbackup.jobs import backup as job
    from casbackup_client import sources

    name = parse_vm(vm)
    wanted = sources.parse_disks(disks)
    session = None if resume is None else parse_session(resume)
    checked_labels = tuple(dict.fromkeys(parse_label(label) for label in labels))
    time_ms = None if time is None else parse_time(time)
    files = sources.read_configs(configs)
    flags = LiveFlags(**live)
    flags.check()

    def request(inputs: list[DiskInput]) -> BackupRequest:
        return job.BackupRequest(
            app.namespace, name, inputs, files, checked_labels, notes, host(), program(), time_ms, session
        )

    if flags.qmp is not None:
        if wanted or image_format:
            raise UsageError("with --qmp the disks are the VM's own: give neither DISK=SOURCE nor --format")
        report = live_backup(
            app,
            flags,
            namespace=app.namespace,
            vm=name,
            configs=files,
            labels=checked_labels,
            notes=notes,
            host=host(),
            program=program(),
            time_ms=time_ms,
            resume=session,
        )
        _show(app, report.snapshot)
        return
    with app.peer() as peer, sources.opened(wanted, image_format) as inputs, app.progress() as progress:
        snapshot = job.backup(peer, request(inputs), progress)
    _show(app, snapshot)


def host() -> str:
    return os.uname().nodename


def program() -> str:
    from casbackup import __version__

    return f"casbackup {__version__}"


def _show(app: App, snapshot: Snapshot) -> None:
    from casbackup_client.documenting import snapshot_document
    from casbackup_client.output import is_terminal

    app.output.result(
        {"snapshot": snapshot_document(snapshot)},
        lambda: _details(snapshot) if is_terminal(1) or app.verbose else summary(snapshot),
        essential=False,
    )


def _rate(snapshot: Snapshot) -> str:
    from casbackup.units import format_duration, format_size

    stats = snapshot.manifest.stats
    seconds = stats.duration_ms / 1000
    rate = f", {format_size(stats.read_bytes / seconds)}/s" if seconds > 0 and stats.read_bytes else ""
    return f"{format_duration(seconds)}{rate}"


def summary(snapshot: Snapshot) -> View:
    """One line, for a log."""
    from casbackup.units import format_size as size

    stats = snapshot.manifest.stats
    return [
        f"{snapshot.reference} {snapshot.id[:8]}: {_disks(snapshot)}, read {size(stats.read_bytes)}, "
        f"new {size(stats.new_bytes)}, reused {size(stats.reused_bytes)}, zero {size(stats.zero_bytes)}, "
        f"added {size(stats.new_stored_bytes)}, {_rate(snapshot)}"
    ]


def _details(snapshot: Snapshot) -> View:
    """Some lines, for somebody who waited for it."""
    from casbackup.units import format_size as size
    from casbackup_client.views import Fields

    stats = snapshot.manifest.stats
    items = [
        ("snapshot", snapshot.reference),
        ("id", snapshot.id),
        ("disks", _disks(snapshot)),
        ("read", f"{size(stats.read_bytes)} in {_rate(snapshot)}"),
        ("new", f"{size(stats.new_bytes)} in {stats.new_chunks} chunks"),
        ("reused", size(stats.reused_bytes)),
        ("zero", size(stats.zero_bytes)),
        ("added", f"{size(stats.new_stored_bytes)} to the repository"),
    ]
    return [Fields(items)]


def _disks(snapshot: Snapshot) -> str:
    from casbackup.units import format_size

    manifest = snapshot.manifest
    disks = ", ".join(f"{disk.name} {format_size(disk.size_bytes)}" for disk in manifest.disks)
    configs = counted(len(manifest.configs), "config") if manifest.configs else ""
    return ", ".join(part for part in (disks, configs) if part)
