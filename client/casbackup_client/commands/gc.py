"""``casbackup gc``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup.units import parse_percentage
from casbackup_client.app import App
from casbackup_client.options import command, dry_run_option, pass_app
from casbackup_client.views import counted

if TYPE_CHECKING:
    from casbackup.repository.repository import Repository
    from casbackup_client.documents import GcDocument


@command("gc")
@dry_run_option("gc")
@click.option(
    "--repack-garbage",
    metavar="PERCENT",
    type=parse_percentage,
    help="Rewrite packs of which at least so much is garbage; default: 25%.",
)
@pass_app
def gc(app: App, dry_run: bool, repack_garbage: float | None) -> None:
    """Free the space that no snapshot needs.

    Backups and restores may go on meanwhile. What a running backup might refer to stays until the next gc
    after it; that and garbage spread too thinly over packs to be worth rewriting is counted as pending.
    """
    with app.repository() as repository:
        document = run_gc(app, repository, dry_run=dry_run, repack_percent=repack_garbage)
    app.output.result(document, lambda: describe_gc(document), essential=dry_run)


def run_gc(app: App, repository: Repository, *, dry_run: bool, repack_percent: float | None = None) -> GcDocument:
    """Plan, and unless ``dry_run`` execute.

    :raise RepositoryBusy: when another gc, check or repair runs.
    """
    from casbackup.repository.gc import REPACK_GARBAGE, execute_gc, plan_gc
    from casbackup_client.documenting import gc_document, planned_gc_document

    threshold = REPACK_GARBAGE if repack_percent is None else repack_percent / 100
    if dry_run:
        with app.progress() as progress:
            return planned_gc_document(plan_gc(repository, repack_garbage=threshold, progress=progress))
    with repository.maintenance(), app.progress() as progress:
        plan = plan_gc(repository, repack_garbage=threshold, progress=progress)
        return gc_document(execute_gc(repository, plan, progress))


def describe_gc(document: GcDocument) -> list[str]:
    """One line, and the notes."""
    from casbackup.units import format_size as size

    verb = "would free" if document["dry_run"] else "freed"
    counts = [
        f"{counted(document['removed_blobs'], 'blob')} removed",
        f"{counted(document['dropped_packs'], 'pack')} dropped",
        f"{document['rewritten_packs']} rewritten",
    ]
    if document["removed_orphans"]:
        counts.append(f"{counted(document['removed_orphans'], 'leftover pack')} removed")
    if document["expired_sessions"]:
        counts.append(f"{counted(document['expired_sessions'], 'expired session')} dropped")
    pending = f"; {size(document['pending_bytes'])} of garbage pending" if document["pending_bytes"] else ""
    return [f"{verb} {size(document['freed_bytes'])}: {', '.join(counts)}{pending}", *document["notes"]]
