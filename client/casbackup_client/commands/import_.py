"""``casbackup import``."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import click

from casbackup.errors import ArchiveLosses, UsageError
from casbackup_client.app import App
from casbackup_client.archives import PIPE, Input
from casbackup_client.options import command, pass_app

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from casbackup.formats.port import ArchiveConfig
    from casbackup.ids import VmName
    from casbackup.jobs.import_ import ImportReport
    from casbackup_client.views import View

_STREAM = "stream"


@command("import")
@click.argument("arguments", metavar="[VM] FILE", nargs=-1)
@click.option("--format", "format_name", metavar="FORMAT", help="Of the archive; default: told by its first bytes.")
@click.option("--allow-incomplete", is_flag=True, help="Take what is there; the rest becomes zeros.")
@click.option("--exec", "archiver", metavar="CMD", help="Take the data from this program instead of a FILE.")
@click.option("--label", "labels", metavar="LABEL", multiple=True, help="Give the snapshot a label. Repeatable.")
@click.option("--notes", metavar="TEXT", default="", help="Give the snapshot notes.")
@click.option("--resume", metavar="SESSION", help="Go on with an import that was interrupted.")
@pass_app
def import_(
    app: App,
    arguments: tuple[str, ...],
    format_name: str | None,
    allow_incomplete: bool,
    archiver: str | None,
    labels: tuple[str, ...],
    notes: str,
    resume: str | None,
) -> None:
    """Import an archive of another format as a snapshot, at the time that the archive names.

    FILE may be compressed (zstd, gzip, lzop, bzip2, xz); - is standard input. Without VM it is told from the file's
    name (vzdump-qemu-100-...) or the configuration in the archive.

    \b
    casbackup import vzdump-qemu-100-2026_11_22-20_00_00.vma.zst
    casbackup import vm/web web.qcow2
    ssh pve cat /var/lib/vz/dump/vzdump-qemu-100-...vma.zst | casbackup import vm/100 -
    casbackup import vm/100 --exec 'my-archiver --fetch web'

    There is a snapshot only if everything was there; what is stored already is not stored again. After
    --allow-incomplete with losses the exit status is 3.
    """
    from casbackup.ids import parse_label, parse_session, parse_vm
    from casbackup.jobs.import_ import ImportRequest, import_archive
    from casbackup_client.commands.backup import host, program

    vm, path = _parsed(arguments, archiver)
    name = None if vm is None else parse_vm(vm)
    session = None if resume is None else parse_session(resume)
    checked_labels = tuple(dict.fromkeys(parse_label(label) for label in labels))
    with _opened(path, archiver, format_name) as (given, source), app.peer() as peer:
        archive, _ = given.open()
        request = ImportRequest(
            namespace=app.namespace,
            vm=name or _vm_of(path, archive.head.configs),
            format_name=given.format.name,
            source=source,
            labels=checked_labels,
            notes=notes,
            host=host(),
            program=program(),
            allow_incomplete=allow_incomplete,
            resume=session,
        )
        with app.progress() as progress:
            report = import_archive(peer, archive, request, progress)
    _show(app, report, given.format.name)


def _parsed(arguments: tuple[str, ...], archiver: str | None) -> tuple[str | None, str]:
    """The VM, if it is named, and the path."""
    if archiver is not None and not archiver.strip():
        raise UsageError("--exec names no program")
    given = [*arguments, PIPE] if archiver is not None else list(arguments)
    if not 1 <= len(given) <= 2:
        raise UsageError("what to import? Give a FILE, or - for standard input, perhaps with a VM before it; or --exec")
    return (given[0] if len(given) == 2 else None), given[-1]


@contextlib.contextmanager
def _opened(path: str, archiver: str | None, format_name: str | None) -> Iterator[tuple[Input, str]]:
    """The archive, and where it comes from, for people."""
    from casbackup.formats.archiver import archiver_source
    from casbackup_client.archives import find_format, opened_input

    if archiver is None:
        with opened_input(path, format_name) as given:
            yield given, "stdin" if path == PIPE else os.path.abspath(path)
        return
    if format_name is not None:
        raise UsageError("--exec has a format of its own; leave out --format")
    with archiver_source(archiver) as source:
        yield Input(find_format(_STREAM), source), f"program {archiver.split(maxsplit=1)[0]}"


def _vm_of(path: str, configs: tuple[ArchiveConfig, ...]) -> VmName:
    from casbackup.formats.proxmox import vm_of
    from casbackup.ids import parse_vm

    found = vm_of(os.path.basename(path), configs)
    if found is None:
        raise UsageError("neither the file's name nor its content tells which VM it is of: give one, such as vm/100")
    return parse_vm(found)


def _show(app: App, report: ImportReport, format_name: str) -> None:
    from casbackup_client.documenting import missing_documents, snapshot_document

    names = [disk.name for disk in report.snapshot.manifest.disks]
    missing_bytes = sum(gap.length for gap in report.missing)
    app.output.result(
        {
            "snapshot": snapshot_document(report.snapshot),
            "format": format_name,
            "missing_bytes": missing_bytes,
            "missing": missing_documents(report.missing, names),
            "damage": None if report.damage is None else str(report.damage),
        },
        lambda: _view(app, report, names),
        essential=False,
    )
    if report.missing or report.damage:
        raise ArchiveLosses(
            f"{missing_bytes} bytes were missing in {report.snapshot.reference} and are zeros"
            + (f"; the archive was not read to its end: {report.damage}" if report.damage else "")
        )


def _view(app: App, report: ImportReport, names: Sequence[str]) -> View:
    from casbackup_client.commands.backup import summary
    from casbackup_client.commands.check import shortened

    lost = [f"missing: {names[m.disk]}, {m.length} bytes from byte {m.offset} on" for m in report.missing]
    return [*summary(report.snapshot), *shortened(lost, everything=app.verbose)]
