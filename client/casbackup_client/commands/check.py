"""``casbackup check``."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import click

from casbackup.errors import DamageFound
from casbackup.units import parse_duration, parse_percentage
from casbackup_client.app import App
from casbackup_client.options import command, pass_app
from casbackup_client.views import counted

if TYPE_CHECKING:
    from casbackup.repository.check import CheckReport
    from casbackup.repository.repository import Repository
    from casbackup_client.documents import AffectedDocument, CheckDocument
    from casbackup_client.views import View

_MOST_LINES = 20
_HOW = {"key": ", seals and ids verified with the key", "checksums": ", checksums only, for the key is not at hand"}
"""Said of an encrypted repository."""


@command("check")
@click.option("--read-data", is_flag=True, help="Read and verify all stored data.")
@click.option(
    "--read-data-subset",
    "subset",
    metavar="PERCENT",
    type=parse_percentage,
    help="Only so much, what was verified longest ago.",
)
@click.option(
    "--older-than",
    metavar="AGE",
    type=parse_duration,
    help="Only what was not verified for so long, such as 7d.",
)
@click.option("--time-budget", metavar="TIME", type=parse_duration, help="Stop reading after so long, such as 10m.")
@pass_app
def check(app: App, read_data: bool, subset: float | None, older_than: float | None, time_budget: float | None) -> None:
    """Verify the repository: manifests, disk trees, index and packs; and with --read-data every stored byte.

    --read-data-subset, --older-than and --time-budget imply --read-data and may be combined; what was
    verified longest ago comes first, so that `check --time-budget 1h` every night gets round in the end.

    If the repository is encrypted and its key is at hand, manifests and what is sealed are verified with it,
    too: then what somebody without the key has put there is found. Otherwise checksums are verified.

    Damage is reported with the VM, snapshot, disk and byte ranges that it affects, remembered so that the
    next backup can heal it, and makes the exit status 4.
    """
    from casbackup.repository.check import CheckOptions
    from casbackup.repository.check import check as run_check
    from casbackup_client.keys import unlock_if_at_hand

    reads = read_data or any(value is not None for value in (subset, older_than, time_budget))
    options = CheckOptions(reads, subset, older_than, time_budget)
    began_s = time.monotonic()
    with app.repository() as repository:
        unlock_if_at_hand(repository, app.keys)
        alone = contextlib.nullcontext() if repository.read_only else repository.maintenance()
        with alone, app.progress() as progress:
            report = run_check(repository, options, progress)
        verified_by = _verified_by(repository)
    document = _document(report, verified_by, round((time.monotonic() - began_s) * 1000))
    app.output.result(document, lambda: _view(document, everything=app.verbose), essential=report.damaged)
    if report.damaged:
        raise DamageFound(f"damage was found; it affects {_affected(document['affected'])}")


def _verified_by(repository: Repository) -> str:
    if not repository.config.encrypted:
        return "ids"
    return "checksums" if repository.codec.is_blind else "key"


def _document(report: CheckReport, verified_by: str, duration_ms: int) -> CheckDocument:
    from casbackup_client.documenting import affected_documents

    return {
        "damaged": report.damaged,
        "verified_by": verified_by,
        "findings": [
            {"severity": item.severity, "object": item.object, "message": item.message} for item in report.findings
        ],
        "affected": affected_documents(report.affected),
        "snapshots": report.snapshots,
        "nodes": report.nodes,
        "blobs": report.blobs,
        "packs": report.packs,
        "verified_blobs": report.verified_blobs,
        "verified_bytes": report.verified_bytes,
        "unverified_blobs": report.unverified_blobs,
        "healed_blobs": report.healed_blobs,
        "duration_ms": duration_ms,
    }


def _affected(affected: list[AffectedDocument]) -> str:
    snapshots = len({item["id"] for item in affected})
    return counted(snapshots, "snapshot") if snapshots else "no snapshot"


def _view(document: CheckDocument, *, everything: bool) -> View:
    from casbackup.units import format_duration, format_size

    findings = [f"{item['severity']}: {item['object']}: {item['message']}" for item in document["findings"]]
    lines = [
        *shortened(findings, everything=everything),
        *affected_lines(document["affected"], everything=everything),
    ]
    read = (
        f", verified {document['verified_blobs']} of them ({format_size(document['verified_bytes'])})"
        if document["verified_blobs"] or document["unverified_blobs"]
        else ""
    )
    healed = f", {document['healed_blobs']} formerly damaged are sound" if document["healed_blobs"] else ""
    things = ", ".join(
        counted(document[key], thing)  # type: ignore[literal-required]
        for key, thing in (
            ("snapshots", "snapshot"),
            ("nodes", "tree node"),
            ("blobs", "blob"),
            ("packs", "pack"),
        )
    )
    how = _HOW.get(document["verified_by"], "")
    verdict = "DAMAGED" if document["damaged"] else "no damage"
    took = format_duration(document["duration_ms"] / 1000)
    return [*lines, f"checked {things}{read}{healed}{how}: {verdict}; {took}"]


def affected_lines(affected: list[AffectedDocument], *, everything: bool) -> list[str]:
    """What cannot be restored, a line for each range."""
    lines: list[str] = []
    for item in affected:
        if item["disk"] is None:
            lines.append(f"lost: {item['snapshot']} config {item['config']}")
        where = f"lost: {item['snapshot']} {item['disk']}"
        lines += [f"{where}, {r['length_bytes']} bytes from byte {r['offset_bytes']} on" for r in item["ranges"]]
    return shortened(lines, everything=everything)


def shortened(lines: list[str], *, everything: bool) -> list[str]:
    if everything or len(lines) <= _MOST_LINES:
        return lines
    return [*lines[:_MOST_LINES], f"... and {len(lines) - _MOST_LINES} more; -v and --json list all"]
