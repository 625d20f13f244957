"""``casbackup export``."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from casbackup.errors import UsageError
from casbackup_client.app import App
from casbackup_client.archives import PIPE
from casbackup_client.options import command, pass_app, reference_argument

if TYPE_CHECKING:
    from casbackup.formats.port import ArchiveFormat, ByteTarget
    from casbackup.jobs.export import ExportPlan, ExportReport
    from casbackup_client.documents import ExportDocument
    from casbackup_client.views import View

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS = ("vma", "tar", "qcow2", "vmdk", "raw")
_STREAM = "stream"


def format_options(function: F) -> F:
    """``--vma`` …, ``--format``, ``--compress``, ``-o`` and ``--force``, for whatever writes an archive."""
    options = [
        *(
            click.option(f"--{name}", "format_name", flag_value=name, help=f"The same as --format {name}.")
            for name in _FLAGS
        ),
        click.option(
            "--format",
            "format_name",
            metavar="FORMAT",
            help="Which format, see `archive formats`; default: that of TARGET's ending, else vma.",
        ),
        click.option(
            "--compress",
            "compression",
            metavar="NAME",
            help="zstd, gzip, lzop or none; default: that of TARGET's ending.",
        ),
        click.option(
            "-o",
            "--option",
            "options",
            metavar="NAME=VALUE",
            multiple=True,
            help="An option of the format, see `archive formats`. Repeatable.",
        ),
        click.option("--force", is_flag=True, help="Overwrite a file that exists."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@command("export")
@reference_argument()
@click.argument("target", metavar="[TARGET]", required=False, type=click.Path())
@format_options
@click.option("--disk", "disks", metavar="DISK", multiple=True, help="Only this disk. Repeatable.")
@click.option("--exec", "archiver", metavar="CMD", help="Pipe all data to this program instead of a TARGET.")
@pass_app
def export(
    app: App,
    reference: str,
    target: str | None,
    format_name: str | None,
    compression: str | None,
    options: tuple[str, ...],
    force: bool,
    disks: tuple[str, ...],
    archiver: str | None,
) -> None:
    """Export a snapshot as an archive of another format, and verify all of it on the way.

    TARGET is a file, - for standard output, or a folder, in which the file gets the name that Proxmox VE wants:
    vzdump-qemu-100-2026_11_22-20_00_00.vma.zst.

    \b
    casbackup export vm/100 /var/lib/vz/dump --compress zstd
    casbackup export vm/100 - --vma | qmrestore - 100
    casbackup export vm/100 web.qcow2 --disk scsi0
    casbackup export vm/100 --exec 'my-archiver --store web'

    The same snapshot always gives the same bytes. A file appears when it is complete; after a failure nothing is
    left of it. What was imported from an archive is exported as that archive was, with its names, uuid and time.
    """
    from casbackup.jobs.export import export as run_export
    from casbackup.jobs.export import plan_export
    from casbackup_client import archives

    if (target is None) == (archiver is None):
        raise UsageError("where to? Give a TARGET or --exec CMD, one of them")
    if target == PIPE and app.json:
        raise UsageError("--json and the archive cannot both go to standard output")
    if archiver is not None:
        if format_name is not None or compression is not None:
            raise UsageError("--exec has a format of its own; leave out --format and --compress")
        format_name = _STREAM
    archive_format = archives.format_to_write(format_name, target)
    used_compression = archives.compression_to_write(compression, target)
    writer = archives.writer_of(archive_format, options)
    began_s = time.monotonic()
    with app.peer() as peer:
        snapshot = peer.find(reference, app.namespace)
        with peer.reading(snapshot), contextlib.ExitStack() as stack:
            plan = plan_export(peer, snapshot, archive_format.name, disks)
            writer.check(plan.head)
            path = _path(target or PIPE, archive_format, used_compression, plan)
            opened = stack.enter_context(
                _archiver(archiver)
                if archiver is not None
                else archives.opened_target(path, used_compression, writer, force=force)
            )
            with app.progress() as progress:
                report = run_export(peer, plan, writer, opened, progress)
    for name in report.left_out:
        app.output.complain(f"config {name} is not in it: format {archive_format.name} holds none")
    if app.json or not (target == PIPE or archiver):
        document = _document(plan, report, round((time.monotonic() - began_s) * 1000))
        document |= {"format": archive_format.name, "compression": used_compression, "target": archiver or path}
        app.output.result(document, lambda: _view(document), essential=False)


def _archiver(command_line: str) -> contextlib.AbstractContextManager[ByteTarget]:
    from casbackup.formats.archiver import archiver_target

    return archiver_target(command_line)


def _path(target: str, archive_format: ArchiveFormat, compression: str, plan: ExportPlan) -> str:
    """Where to: in a folder, a file by a name that tells what it is."""
    from casbackup.jobs.export import archive_name

    if not os.path.isdir(target):
        return target
    return os.path.join(target, archive_name(plan, archive_format, compression))


def _document(plan: ExportPlan, report: ExportReport, duration_ms: int) -> ExportDocument:
    return {
        "snapshot": plan.snapshot.reference,
        "id": plan.snapshot.id,
        "format": "",
        "compression": "",
        "target": "",
        "disks": [
            {"disk": disk.name, "name": archived.name, "size_bytes": disk.size_bytes}
            for disk, archived in zip(plan.disks, plan.head.disks, strict=True)
        ],
        "configs": [config.name for config in plan.head.configs if config.name not in report.left_out],
        "left_out": list(report.left_out),
        "size_bytes": report.size_bytes,
        "zero_bytes": report.zero_bytes,
        "duration_ms": duration_ms,
    }


def _view(document: ExportDocument) -> View:
    from casbackup.units import format_duration
    from casbackup.units import format_size as size

    seconds = document["duration_ms"] / 1000
    rate = f", {size(document['size_bytes'] / seconds)}/s" if seconds and document["size_bytes"] else ""
    disks = ", ".join(f"{disk['disk']} {size(disk['size_bytes'])}" for disk in document["disks"])
    what = ", ".join(part for part in (disks, *document["configs"]) if part)
    return [
        f"exported {document['snapshot']} to {document['target']}: {what}; zero {size(document['zero_bytes'])}; "
        f"{format_duration(seconds)}{rate}"
    ]
