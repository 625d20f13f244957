"""``casbackup archive extract`` and ``salvage``."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click

from casbackup.errors import ArchiveLosses, ArchiveUnsupported
from casbackup_client.app import App
from casbackup_client.archives import file_argument, format_option, opened_input
from casbackup_client.commands.archive_verify import finding_line
from casbackup_client.options import command, pass_app

if TYPE_CHECKING:
    from casbackup.formats.port import Archive, ArchiveFormat, ArchiveHead
    from casbackup.jobs.extract import ExtractReport
    from casbackup_client.documents import ArchiveExtractDocument, ArchiveSalvageDocument
    from casbackup_client.views import View

_SALVAGED_FORMAT = "vma"
_REPORT_NAME = "report.json"


@command("extract")
@file_argument
@click.argument("folder", metavar="FOLDER", type=click.Path())
@format_option
@click.option("--disk", "disks", metavar="DISK", multiple=True, help="Only this disk, and no configs. Repeatable.")
@click.option("--allow-incomplete", is_flag=True, help="Take what is there; what is missing reads as zeros.")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@click.option("--sync", is_flag=True, help="End only when everything has reached the disk.")
@pass_app
def extract(
    app: App,
    path: str,
    folder: str,
    format_name: str | None,
    disks: tuple[str, ...],
    allow_incomplete: bool,
    force: bool,
    sync: bool,
) -> None:
    """Extract an archive's disks, as sparse raw files FOLDER/DISK.raw, and its configs.

    Names are made safe, so nothing leaves the folder whatever the archive says. Files appear when all is complete.
    After --allow-incomplete with losses the exit status is 3.
    """
    from casbackup.jobs.extract import extract as run_extract

    began_s = time.monotonic()
    with opened_input(path, format_name) as given:
        opened, _ = given.open()
        with app.progress() as progress:
            report = run_extract(
                opened, folder, only=disks, force=force, allow_incomplete=allow_incomplete, sync=sync, progress=progress
            )
    document = _extract_document(path, given.format, opened.head, report)
    document["duration_ms"] = round((time.monotonic() - began_s) * 1000)
    app.output.result(document, lambda: _extract_view(document), essential=False)
    if report.missing or report.damage:
        raise ArchiveLosses(
            f"{document['missing_bytes']} bytes were missing and are zeros"
            + (f"; the archive was not read to its end: {report.damage}" if report.damage else "")
        )


def _extract_document(
    path: str, archive_format: ArchiveFormat, head: ArchiveHead, report: ExtractReport
) -> ArchiveExtractDocument:
    from casbackup_client.documenting import missing_documents

    return {
        "archive": path,
        "format": archive_format.name,
        "disks": [
            {
                "name": head.disks[disk.number].name,
                "target": disk.path,
                "size_bytes": head.disks[disk.number].size_bytes,
            }
            for disk in report.disks
        ],
        "configs": report.configs,
        "missing_bytes": sum(gap.length for gap in report.missing),
        "missing": missing_documents(report.missing, [disk.name for disk in head.disks]),
        "damage": None if report.damage is None else str(report.damage),
        "duration_ms": 0,
    }


def _extract_view(document: ArchiveExtractDocument) -> View:
    from casbackup.units import format_duration
    from casbackup.units import format_size as size

    disks = [f"{disk['target']} {size(disk['size_bytes'])}" for disk in document["disks"]]
    lost = [
        f"missing: {gap['disk']}, {gap['length_bytes']} bytes from byte {gap['offset_bytes']} on"
        for gap in document["missing"]
    ]
    took = format_duration(document["duration_ms"] / 1000)
    return [*lost, f"extracted {', '.join([*disks, *document['configs']])}; {took}"]


@command("salvage")
@file_argument
@click.argument("folder", metavar="FOLDER", type=click.Path())
@format_option
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@pass_app
def salvage(app: App, path: str, folder: str, format_name: str | None, force: bool) -> None:
    """Rescue what is intact of a damaged archive: disks and configs as by `extract`, and report.json.

    What is lost reads as zeros and is listed. An archive whose beginning is gone is taken for VMA. If anything was
    lost, the exit status is 3.
    """
    from casbackup_client.documenting import finding_documents

    began_s = time.monotonic()
    with opened_input(path, format_name, fallback=_SALVAGED_FORMAT) as given:
        if given.format.salvager is None:
            raise ArchiveUnsupported(f"nothing can be salvaged of format {given.format.name}; extract what is readable")
        salvaged = given.format.salvager().open(given.source)
        report = _salvaged(app, salvaged, folder, force)
    document: ArchiveSalvageDocument = {
        **_extract_document(path, given.format, salvaged.head, report),
        "findings": finding_documents(salvaged.findings()),
    }
    document["duration_ms"] = round((time.monotonic() - began_s) * 1000)
    _write_report(document, os.path.join(folder, _REPORT_NAME))
    lines = [finding_line(finding) for finding in salvaged.findings()]
    app.output.result(document, lambda: [*lines, *_extract_view(document)], essential=False)
    if report.missing:
        raise ArchiveLosses(f"{document['missing_bytes']} bytes of disks are lost and read as zeros")


def _salvaged(app: App, salvaged: Archive, folder: str, force: bool) -> ExtractReport:
    from casbackup.jobs.extract import extract as run_extract

    with app.progress() as progress:
        return run_extract(salvaged, folder, force=force, allow_incomplete=True, progress=progress)


def _write_report(document: ArchiveSalvageDocument, path: str) -> None:
    import json

    from casbackup_client.targets import write_config

    write_config(path, json.dumps(document, indent=2).encode() + b"\n", sync=False)
