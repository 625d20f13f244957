"""``casbackup repair``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup.errors import DamageFound, UsageError
from casbackup_client.app import App
from casbackup_client.options import command, pass_app
from casbackup_client.views import counted

if TYPE_CHECKING:
    from casbackup.jobs.heal import HealReport
    from casbackup.progress import Progress
    from casbackup.repository.repository import Repository
    from casbackup_client.documents import RebuildDocument, RepairDocument


@command("repair")
@click.option(
    "--rebuild-index",
    is_flag=True,
    help="Make the index anew from packs and snapshots, with nothing but the folder.",
)
@click.option(
    "--from",
    "partner",
    metavar="OTHER",
    help="Fetch what is damaged from this repository first: a folder, an address, or profile:NAME.",
)
@pass_app
def repair(app: App, rebuild_index: bool, partner: str | None) -> None:
    """Repair what `check` found: put back what there is a copy of, and put packs with damage aside.

    Nothing is deleted: packs with damage go to quarantine/ when what is sound has been moved out of them.
    What is lost heals when a later backup has the same data again. While it is lost, the exit status is 4.

    --from takes what is damaged from a copy of the repository, or from any that has the same data: only what
    earlier checks found, and each blob is verified.

    --rebuild-index is for an index that is missing or damaged. Nobody else can use the repository meanwhile.
    """
    if rebuild_index and partner is not None:
        raise UsageError("--rebuild-index and --from are two things: rebuild first, then check, then repair")
    if rebuild_index:
        _rebuild(app)
    else:
        _repair(app, partner)


def _rebuild(app: App) -> None:
    from casbackup.repository.rebuild import rebuild_index

    with app.progress() as progress:
        report = rebuild_index(app.folder_path, progress)
    document: RebuildDocument = {"packs": report.packs, "blobs": report.blobs, "notes": list(report.notes)}
    app.output.result(
        document,
        lambda: [
            f"rebuilt the index: {counted(report.blobs, 'blob')} in {counted(report.packs, 'pack')}",
            *report.notes,
        ],
        essential=False,
    )


def _repair(app: App, partner: str | None) -> None:
    from casbackup.repository.repair import repair
    from casbackup_client.documenting import affected_documents
    from casbackup_client.keys import unlock_if_at_hand

    with app.repository() as repository, app.progress() as progress:
        unlock_if_at_hand(repository, app.keys)
        healed = None if partner is None else _heal(app, repository, partner, progress)
        report = repair(repository, progress)
    document: RepairDocument = {
        "restored_manifests": report.restored_manifests,
        "healed_blobs": report.healed_blobs + (healed.healed_blobs if healed else 0),
        "fetched_blobs": healed.fetched_blobs if healed else 0,
        "fetched_bytes": healed.fetched_bytes if healed else 0,
        "moved_blobs": report.moved_blobs,
        "lost_blobs": report.lost_blobs,
        "quarantined": list(report.quarantined),
        "affected": affected_documents(report.affected),
        "notes": [*report.notes, *(f"the other repository: {loss}" for loss in (healed.losses if healed else ()))],
    }
    app.output.result(document, lambda: _lines(document, everything=app.verbose), essential=bool(report.lost_blobs))
    if report.lost_blobs:
        raise DamageFound(f"lost until a backup has the data again: {counted(report.lost_blobs, 'blob')}")


def _heal(app: App, repository: Repository, partner: str, progress: Progress) -> HealReport:
    from casbackup.jobs.heal import heal
    from casbackup_client.ends import find_ends, opened

    _, other = find_ends(app, app.folder_path, partner)
    with opened(app, other) as peer:
        return heal(repository, peer, progress)


def _lines(document: RepairDocument, *, everything: bool) -> list[str]:
    from casbackup_client.commands.check import affected_lines

    done = [
        f"{counted(document['restored_manifests'], 'manifest')} put back",
        f"{counted(document['healed_blobs'], 'blob')} healed{_fetched(document)}",
        f"{document['moved_blobs']} moved",
        f"{document['lost_blobs']} lost",
        f"{counted(len(document['quarantined']), 'pack')} in quarantine",
    ]
    return [
        *affected_lines(document["affected"], everything=everything),
        *document["notes"],
        f"repair: {', '.join(done)}",
    ]


def _fetched(document: RepairDocument) -> str:
    from casbackup.units import format_size

    if not document["fetched_blobs"]:
        return ""
    return f" ({document['fetched_blobs']} fetched, {format_size(document['fetched_bytes'])})"
