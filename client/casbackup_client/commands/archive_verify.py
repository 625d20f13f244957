"""``casbackup archive verify``, and findings for people."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from casbackup.errors import ArchiveError, ArchiveUnreadable, ArchiveUnsound, SourceError
from casbackup_client.app import App
from casbackup_client.archives import CountedSource, file_argument, format_option, opened_input
from casbackup_client.options import command, pass_app
from casbackup_client.views import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from casbackup.formats.findings import Finding
    from casbackup.formats.port import ArchiveFormat
    from casbackup_client.documents import ArchiveVerifyDocument
    from casbackup_client.views import View


@command("verify")
@file_argument
@format_option
@click.option("--quick", is_flag=True, help="Check the archive's own structures only, and skip its data.")
@click.option("--strict", is_flag=True, help="Take warnings for errors.")
@pass_app
def verify(app: App, path: str, format_name: str | None, quick: bool, strict: bool) -> None:
    """Verify an archive: find everything that is wrong with it, and whether all of every disk is there.

    The exit status is 0 if the archive is sound, 1 if there are errors, and 2 if the file cannot be read as an
    archive. Warnings, about what is readable but not as it should be, do not count without --strict.

    VMA has checksums for its headers and none for data: a flipped bit within the data is not found by anybody.
    """
    from casbackup.formats.verify import verify as run_verify

    began_s = time.monotonic()
    try:
        with opened_input(path, format_name) as given, app.progress() as progress:
            findings = list(run_verify(given.format, CountedSource(given.source, progress), quick=quick))
    except (ArchiveError, SourceError) as error:
        raise ArchiveUnreadable(str(error)) from error
    document = _verify_document(path, given.format, findings, quick, strict)
    document["duration_ms"] = round((time.monotonic() - began_s) * 1000)
    app.output.result(document, lambda: _verify_view(document, findings), essential=bool(findings))
    if not document["sound"]:
        raise ArchiveUnsound(f"{path}: {_counts(document)}")


def _verify_document(
    path: str, archive_format: ArchiveFormat, findings: Sequence[Finding], quick: bool, strict: bool
) -> ArchiveVerifyDocument:
    from casbackup_client.documenting import finding_documents

    errors = sum(finding.is_error for finding in findings)
    return {
        "archive": path,
        "format": archive_format.name,
        "quick": quick,
        "sound": not (findings if strict else errors),
        "errors": errors,
        "warnings": len(findings) - errors,
        "findings": finding_documents(findings),
        "duration_ms": 0,
    }


def _verify_view(document: ArchiveVerifyDocument, findings: Sequence[Finding]) -> View:
    from casbackup.units import format_duration

    verdict = "sound" if document["sound"] else "NOT SOUND"
    took = format_duration(document["duration_ms"] / 1000)
    return [*map(finding_line, findings), f"{document['archive']}: {verdict}, {_counts(document)}; {took}"]


def _counts(document: ArchiveVerifyDocument) -> str:
    return f"{counted(document['errors'], 'error')}, {counted(document['warnings'], 'warning')}"


def finding_line(finding: Finding) -> str:
    """All that is known of where it is."""
    where = [f"byte {finding.archive_offset}"] if finding.archive_offset is not None else []
    if finding.disk is not None or finding.device_id is not None:
        device = f" (device {finding.device_id})" if finding.device_id is not None else ""
        where.append(f"disk {finding.disk or '?'}{device}")
    if finding.cluster is not None:
        where.append(f"cluster {finding.cluster}")
    if finding.disk_offset is not None:
        length = f"{finding.length} bytes from " if finding.length is not None else ""
        where.append(f"{length}disk byte {finding.disk_offset}")
    elif finding.length is not None:
        where.append(f"{finding.length} bytes")
    place = f" [{', '.join(where)}]" if where else ""
    return f"{finding.severity.value}: {finding.code}: {finding.text}{place}"
