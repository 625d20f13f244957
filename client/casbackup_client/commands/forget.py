"""``casbackup forget``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from casbackup.errors import DataDamage, ManifestDamaged, RightMissing, SnapshotNotFound, SnapshotPinned, UsageError
from casbackup_client.app import App, KeyUse
from casbackup_client.options import command, dry_run_option, pass_app
from casbackup_client.views import counted

if TYPE_CHECKING:
    from casbackup.peer.api import Peer
    from casbackup.repository.catalog import Snapshot
    from casbackup.repository.retention import Decision, KeepPolicy
    from casbackup_client.documents import ForgetDocument
    from casbackup_client.views import View

F = TypeVar("F", bound=Callable[..., Any])

_RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def _keep_options(function: F) -> F:
    for rule in reversed(_RULES):
        what = "snapshots" if rule == "last" else f"{rule} ones"
        option = click.option(
            f"--keep-{rule}",
            metavar="N",
            type=int,
            default=0,
            help=f"Keep the newest N {what}.",
        )
        function = option(function)
    return function


@command("forget")
@click.argument("what", metavar="[VM|REF]...", nargs=-1)
@_keep_options
@click.option("--all", "everything", is_flag=True, help="Remove all snapshots of the named VMs, but for pinned ones.")
@dry_run_option("forget")
@click.option("--gc", "with_gc", is_flag=True, help="Free the space, too.")
@pass_app
def forget(app: App, /, what: tuple[str, ...], everything: bool, dry_run: bool, with_gc: bool, **keep: int) -> None:
    """Remove snapshots: those that no rule keeps, or the ones named.

    \b
    casbackup forget vm/100 --keep-daily 7 --keep-weekly 4   by rules, of a VM
    casbackup forget --keep-last 3 --keep-monthly 12         the same, of each VM
    casbackup forget vm/100@2026-11-22T20:00 1f3a9c2e        these snapshots
    casbackup forget vm/100 --all                            a VM that is no more

    The rules are those of Proxmox Backup Server: each keeps the newest snapshot of a period, for the newest
    N periods that have one and that no earlier rule covers. Days are those of local time (TZ). Pinned
    snapshots and a VM's latest one are always kept. The space is freed by `gc`, or at once with --gc.
    """
    policy = _policy(keep)
    if with_gc:
        app.require_folder("forget --gc")
    with app.peer(KeyUse.IF_AT_HAND) as peer:
        decisions = _decide(app, peer, what, policy, everything=everything)
        removed = [decision.snapshot for decision in decisions if not decision.keep]
        freed_bytes = _freed(peer, removed)
        document = _document(decisions, freed_bytes, dry_run=dry_run)
        if not dry_run:
            peer.remove(removed)
    if with_gc and not dry_run:
        from casbackup_client.commands.gc import run_gc

        with app.repository() as repository:
            document["gc"] = run_gc(app, repository, dry_run=False)
    app.output.result(document, lambda: _view(document, with_kept=dry_run or app.verbose), essential=dry_run)


def _policy(keep: dict[str, int]) -> KeepPolicy | None:
    from casbackup.repository.retention import KeepPolicy

    return KeepPolicy(**{rule: keep[f"keep_{rule}"] for rule in _RULES}) if any(keep.values()) else None


def _decide(
    app: App, peer: Peer, what: Sequence[str], policy: KeepPolicy | None, *, everything: bool
) -> list[Decision]:
    """What becomes of the snapshots in question.

    :raise UsageError: when it is not clear which are meant.
    """
    if policy is not None and everything:
        raise UsageError("--all does not go with rules: it keeps nothing")
    if policy is not None:
        from casbackup.clock import SystemClock
        from casbackup.repository.retention import plan_forget
        from casbackup_client.localtime import LocalZone

        snapshots = _of_vms(app, peer, what)
        return plan_forget(snapshots, policy, LocalZone(), now_ms=SystemClock().now_ms())
    if everything:
        return _all_of(app, peer, what)
    return _named(app, peer, what)


def _of_vms(app: App, peer: Peer, names: Sequence[str]) -> list[Snapshot]:
    """All snapshots of these VMs of the namespace; without names, of all.

    :raise SnapshotNotFound: when one of them has none, for that is probably a slip of the pen.
    """
    from casbackup.ids import parse_vm

    for name in names:
        if not _is_vm(name):
            raise UsageError(f"{name!r} is a snapshot: rules and --all are about whole VMs, such as vm/100")
    vms = [parse_vm(name) for name in dict.fromkeys(names)]
    if not vms:
        return peer.snapshots(app.namespace)
    found = {vm: peer.snapshots(app.namespace, vm) for vm in vms}
    for vm, snapshots in found.items():
        if not snapshots:
            raise SnapshotNotFound(f"there is no snapshot of {vm} in namespace {app.namespace}")
    return [snapshot for snapshots in found.values() for snapshot in snapshots]


def _all_of(app: App, peer: Peer, names: Sequence[str]) -> list[Decision]:
    from casbackup.repository.retention import PINNED, Decision

    if not names:
        raise UsageError("--all needs the names of the VMs whose snapshots shall go")
    snapshots = _of_vms(app, peer, names)
    return [Decision(s, s.pinned, PINNED if s.pinned else "all of the VM's") for s in snapshots]


def _named(app: App, peer: Peer, references: Sequence[str]) -> list[Decision]:
    """:raise SnapshotPinned: when one of them is pinned; nothing is removed then."""
    from casbackup.repository.retention import Decision

    if not references:
        raise UsageError("what to forget? Give --keep-... rules, or name snapshots")
    for reference in references:
        if _is_vm(reference):
            raise UsageError(
                f"what of {reference}? Give --keep-... rules, --all, or a snapshot such as {reference}@latest"
            )
    found = {s.id: s for s in (peer.find(reference, app.namespace) for reference in references)}
    for snapshot in found.values():
        if snapshot.pinned:
            raise SnapshotPinned(f"{snapshot.reference} is pinned")
    return [Decision(snapshot, False, "named") for snapshot in found.values()]


def _is_vm(text: str) -> bool:
    return "@" not in text and (text.startswith("vm/") or ":vm/" in text)


def _freed(peer: Peer, removed: list[Snapshot]) -> int | None:
    """What removing them frees; None when damage, or a missing right, keeps that from being known, which must not
    keep them from being removed.
    """
    if not removed:
        return 0
    try:
        return peer.usage([removed]).groups[0].unique_bytes
    except (DataDamage, ManifestDamaged, RightMissing):
        return None


def _document(decisions: list[Decision], freed_bytes: int | None, *, dry_run: bool) -> ForgetDocument:
    return {
        "dry_run": dry_run,
        "decisions": [
            {"snapshot": d.snapshot.reference, "id": d.snapshot.id, "keep": d.keep, "reason": d.reason}
            for d in decisions
        ],
        "removed": sum(not d.keep for d in decisions),
        "freed_bytes": freed_bytes,
        "gc": None,
    }


def _view(document: ForgetDocument, *, with_kept: bool) -> View:
    from casbackup.units import format_size
    from casbackup_client.commands.gc import describe_gc
    from casbackup_client.views import Table

    dry_run, decisions = document["dry_run"], document["decisions"]
    rows = [
        ("keep" if d["keep"] else "remove", d["id"][:8], d["snapshot"], d["reason"])
        for d in decisions
        if with_kept or not d["keep"]
    ]
    freed = "an unknown amount" if document["freed_bytes"] is None else format_size(document["freed_bytes"])
    verb, frees = ("would remove", "gc would free") if dry_run else ("removed", "gc can free")
    summary = f"{verb} {document['removed']} of {counted(len(decisions), 'snapshot')}"
    if document["gc"] is not None:
        return [
            *([Table(("", "id", "snapshot", "why"), rows)] if rows else []),
            summary,
            *describe_gc(document["gc"]),
        ]
    if document["removed"]:
        summary += f"; {frees} {freed}"
    return [*([Table(("", "id", "snapshot", "why"), rows)] if rows else []), summary]
