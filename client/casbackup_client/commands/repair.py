"""``casbackup repair``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup.errors import DamageFound
from casbackup_client.app import App
from casbackup_client.options import command, pass_app
from casbackup_client.views import counted

if TYPE_CHECKING:
    from casbackup_client.documents import RebuildDocument, RepairDocument


@command("repair")
@click.option(
    "--rebuild-index",
    is_flag=True,
    help="Make the index anew from packs and snapshots, with nothing but the folder.",
)
@pass_app
def repair(app: App, rebuild_index: bool) -> None:
    """Repair what `check` found: put back what there is a copy of, and put packs with damage aside.

    Nothing is deleted: packs with damage go to quarantine/ when what is sound has been moved out of them.
    What is lost heals when a later backup has the same data again. While it is lost, the exit status is 4.

    --rebuild-index is for an index that is missing or damaged. Nobody else can use the repository meanwhile.
    """
    if rebuild_index:
        _rebuild(app)
    else:
        _repair(app)


def _rebuild(app: App) -> None:
    from casbackup.repository.rebuild import rebuild_index

    with app.progress() as progress:
        report = rebuild_index(app.repository_path, progress)
    document: RebuildDocument = {"packs": report.packs, "blobs": report.blobs, "notes": list(report.notes)}
    app.output.result(
        document,
        lambda: [
            f"rebuilt the index: {counted(report.blobs, 'blob')} in {counted(report.packs, 'pack')}",
            *report.notes,
        ],
        essential=False,
    )


def _repair(app: App) -> None:
    from casbackup.repository.repair import repair
    from casbackup_client.documenting import affected_documents

    with app.repository() as repository, app.progress() as progress:
        report = repair(repository, progress)
    document: RepairDocument = {
        "restored_manifests": report.restored_manifests,
        "healed_blobs": report.healed_blobs,
        "moved_blobs": report.moved_blobs,
        "lost_blobs": report.lost_blobs,
        "quarantined": list(report.quarantined),
        "affected": affected_documents(report.affected),
        "notes": list(report.notes),
    }
    app.output.result(document, lambda: _lines(document, everything=app.verbose), essential=bool(report.lost_blobs))
    if report.lost_blobs:
        raise DamageFound(f"lost until a backup has the data again: {counted(report.lost_blobs, 'blob')}")


def _lines(document: RepairDocument, *, everything: bool) -> list[str]:
    from casbackup_client.commands.check import affected_lines

    done = [
        f"{counted(document['restored_manifests'], 'manifest')} put back",
        f"{counted(document['healed_blobs'], 'blob')} healed",
        f"{document['moved_blobs']} moved",
        f"{document['lost_blobs']} lost",
        f"{counted(len(document['quarantined']), 'pack')} in quarantine",
    ]
    return [
        *affected_lines(document["affected"], everything=everything),
        *document["notes"],
        f"repair: {', '.join(done)}",
    ]
