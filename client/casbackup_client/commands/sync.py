"""``casbackup sync``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from casbackup.errors import InvalidSize, SyncIncomplete, UsageError
from casbackup_client.app import App, KeyUse
from casbackup_client.options import command, dry_run_option, pass_app
from casbackup_client.views import counted

if TYPE_CHECKING:
    from casbackup.jobs.ratelimit import RateLimit
    from casbackup.jobs.rekey import RekeyCost
    from casbackup.jobs.sync import SyncRequest
    from casbackup.jobs.sync_plan import SnapshotFilter
    from casbackup.jobs.sync_report import SnapshotResult, SyncReport
    from casbackup_client.documents import RekeyDocument, SyncDocument, SyncedSnapshotDocument


@command("sync")
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="DEST")
@click.option("--vm", "vms", metavar="PATTERN", multiple=True, help="Only these VMs, such as 'vm/1*'. Repeatable.")
@click.option("--label", "labels", metavar="LABEL", multiple=True, help="Only snapshots with this label. Repeatable.")
@click.option("--last", metavar="N", type=click.IntRange(min=1), help="Only the latest N snapshots of each VM.")
@click.option("--since", metavar="TIME", help="Only snapshots since then: 2026-11-22, or 7d for the last seven days.")
@click.option("--mirror", is_flag=True, help="Also remove at DEST what SOURCE no longer has; never what is pinned.")
@click.option("--rekey", is_flag=True, help="DEST has another key, or only one of both is encrypted: encrypt anew.")
@click.option("--limit-rate", metavar="SIZE", help="Send no more than this in a second, such as 10M.")
@dry_run_option("sync")
@pass_app
def sync(
    app: App,
    source: str,
    destination: str,
    vms: tuple[str, ...],
    labels: tuple[str, ...],
    last: int | None,
    since: str | None,
    mirror: bool,
    rekey: bool,
    limit_rate: str | None,
    dry_run: bool,
) -> None:
    """Copy the snapshots that DEST lacks from SOURCE, moving only data that is missing there.

    SOURCE and DEST are a folder, the address of a repository on a server, or profile:NAME.

    \b
    casbackup sync /backup/vms /mnt/usb/vms
    casbackup sync /backup/vms https://offsite.example.com:8007/vms --limit-rate 10M
    casbackup sync profile:main profile:offsite --vm vm/100 --last 7

    A copy has the same id, which proves that it is the same. Older snapshots can be copied later. Pins are
    set at DEST, labels and notes follow SOURCE. Nothing is removed without --mirror. --namespace may be a
    pattern here; without it, all namespaces are copied. If a snapshot cannot be copied, the others are,
    and the exit status is 3.

    Encrypted repositories are copied as they are stored, which needs no key at hand, but the same key at both
    ends. With --rekey, all is read, decrypted, encrypted with the key of DEST and sent, once; what that costs
    is said first, and by --dry-run. Copies have other ids then. It needs the keys of both ends, here.
    """
    from casbackup.jobs.sync import SyncRequest

    request = SyncRequest(_chosen(app, vms, labels, last, since), mirror, dry_run)
    began_s = time.monotonic()
    report, rekeyed = (_rekey if rekey else _copy)(app, source, destination, request, _limit(limit_rate))
    document = _document(report, rekeyed, round((time.monotonic() - began_s) * 1000), dry_run=dry_run)
    essential = dry_run or not report.is_complete
    left_out = {"copied", "present"} if app.quiet else set() if app.verbose else {"present"}
    app.output.result(document, lambda: _lines(document, left_out), essential=essential)
    if not report.is_complete:
        raise SyncIncomplete(f"not copied: {counted(len(report.failed) + len(report.unreadable), 'snapshot')}")


def _copy(
    app: App, source: str, destination: str, request: SyncRequest, limit: RateLimit
) -> tuple[SyncReport, RekeyDocument | None]:
    from casbackup.jobs.sync import sync as job
    from casbackup_client.ends import find_ends, opened

    here, there = find_ends(app, source, destination)
    with opened(app, here) as first, opened(app, there) as second, app.progress() as progress:
        return job(first, second, request, limit=limit, progress=progress), None


def _rekey(
    app: App, source: str, destination: str, request: SyncRequest, limit: RateLimit
) -> tuple[SyncReport, RekeyDocument | None]:
    from casbackup.jobs.rekey import rekey as job
    from casbackup_client.ends import find_ends, opened

    def announce(cost: RekeyCost, snapshots: int) -> None:
        if snapshots and not (app.quiet or app.json):
            app.output.complain(f"{counted(snapshots, 'snapshot')} to copy: {_cost(cost)}")

    here, there = find_ends(app, source, destination)
    with opened(app, here, KeyUse.NEEDED) as first, opened(app, there, KeyUse.NEEDED) as second:
        if not second.config.encrypted and not request.dry_run:
            app.output.complain("the destination is not encrypted: whoever has it can read what is copied")
        keys = first.config.key_fingerprint or None, second.config.key_fingerprint or None
        with app.progress() as progress:
            report = job(first, second, request, announce, limit=limit, progress=progress)
    document: RekeyDocument = {
        "source_key": keys[0],
        "destination_key": keys[1],
        "expected_read_bytes": report.expected.content_bytes,
        "expected_sent_bytes": report.expected.stored_bytes,
        "read_bytes": report.read_bytes,
    }
    return report.sync, document


def _cost(cost: RekeyCost) -> str:
    from casbackup.units import format_size

    if cost.content_bytes is None or cost.stored_bytes is None:
        return "all of their content is read, decrypted, encrypted and sent once"
    content, stored = format_size(cost.content_bytes), format_size(cost.stored_bytes)
    return f"about {content} of content are read, decrypted and encrypted here, once, and about {stored} are sent"


def _chosen(
    app: App, vms: tuple[str, ...], labels: tuple[str, ...], last: int | None, since: str | None
) -> SnapshotFilter:
    from casbackup.ids import parse_label
    from casbackup.jobs.sync_plan import SnapshotFilter

    for vm in vms:
        if not vm.startswith(("vm/", "*", "?", "[")):
            raise UsageError(f"{vm!r} matches no VM: they look like vm/100")
    namespaces = (app.namespace_option,) if app.namespace_option else ()
    return SnapshotFilter(namespaces, vms, tuple(map(parse_label, labels)), last, _since_ms(since))


def _since_ms(text: str | None) -> int | None:
    from casbackup.clock import SystemClock, parse_time
    from casbackup.units import parse_duration

    if text is None:
        return None
    try:
        return SystemClock().now_ms() - round(parse_duration(text) * 1000)
    except InvalidSize:
        return parse_time(text)


def _limit(text: str | None) -> RateLimit:
    from casbackup.jobs.ratelimit import NO_LIMIT, BytesPerSecond
    from casbackup.units import parse_size

    if text is None:
        return NO_LIMIT
    bytes_per_s = parse_size(text)
    if not bytes_per_s:
        raise UsageError("--limit-rate 0 would never end")
    return BytesPerSecond(bytes_per_s)


def _document(report: SyncReport, rekeyed: RekeyDocument | None, duration_ms: int, *, dry_run: bool) -> SyncDocument:
    total, proof = report.total, report.proof
    return {
        "dry_run": dry_run,
        "snapshots": [_snapshot(result) for result in report.results],
        "changed": [snapshot.reference for snapshot in report.changed],
        "removed": [snapshot.reference for snapshot in report.removed],
        "spared": [snapshot.reference for snapshot in report.spared],
        "unreadable": [str(damage) for damage in report.unreadable],
        "sent_blobs": total.blobs,
        "sent_bytes": total.stored_bytes,
        "source_digest": proof.source if proof else None,
        "destination_digest": proof.destination if proof else None,
        "equal": proof.equal if proof else None,
        "rekey": rekeyed,
        "duration_ms": duration_ms,
    }


def _snapshot(result: SnapshotResult) -> SyncedSnapshotDocument:
    return {
        "snapshot": result.snapshot.reference,
        "id": result.snapshot.id,
        "outcome": result.outcome.value,
        "sent_blobs": result.tally.blobs,
        "sent_bytes": result.tally.stored_bytes,
        "error": None if result.error is None else {"code": result.error.code, "message": str(result.error)},
    }


def _lines(document: SyncDocument, left_out: set[str]) -> list[str]:
    from casbackup.units import format_duration

    dry_run = document["dry_run"]
    lines = [_line(item) for item in document["snapshots"] if item["outcome"] not in left_out]
    lines += document["unreadable"]
    for key, done, planned in (
        ("removed", "removed", "would be removed"),
        ("spared", "stays, for it is pinned", "stays, for it is pinned"),
    ):
        names: list[str] = document[key]  # type: ignore[literal-required]
        lines += [f"{name}: {planned if dry_run else done}" for name in names]
    outcomes = [item["outcome"] for item in document["snapshots"]]
    counts = [
        f"{outcomes.count(name)} {name}" for name in ("planned", "copied", "present", "failed") if name in outcomes
    ]
    if document["changed"]:
        counts.append(f"{len(document['changed'])} {'to be changed' if dry_run else 'changed'}")
    size = _size(document)
    proof = ", both ends have the same" if document["equal"] else ""
    took = "" if dry_run else f", {format_duration(document['duration_ms'] / 1000)}"
    return [*lines, f"sync: {', '.join(counts) or 'no snapshots'}; {size}{took}{proof}"]


def _size(document: SyncDocument) -> str:
    """What was moved, or would be."""
    from casbackup.units import format_size

    rekeyed = document["rekey"]
    sent = f"{format_size(document['sent_bytes'])} in {counted(document['sent_blobs'], 'blob')}"
    if rekeyed is None:
        return f"at most {sent}" if document["dry_run"] else sent
    if document["dry_run"]:
        expected = rekeyed["expected_read_bytes"], rekeyed["expected_sent_bytes"]
        sizes = ["an unknown size" if size is None else format_size(size) for size in expected]
        return f"about {sizes[0]} of content to read and encrypt anew, {sizes[1]} to send"
    return f"read {format_size(rekeyed['read_bytes'])} of content, sent {sent}"


def _line(item: SyncedSnapshotDocument) -> str:
    from casbackup.units import format_size

    error = item["error"]
    if error is not None:
        return f"{item['snapshot']} {item['id'][:8]}: {item['outcome']}: {error['message']}"
    return f"{item['snapshot']} {item['id'][:8]}: {item['outcome']}, {format_size(item['sent_bytes'])}"
