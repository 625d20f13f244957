"""``casbackup diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup_client.app import App
from casbackup_client.options import command, pass_app, reference_argument

if TYPE_CHECKING:
    from casbackup.jobs.diff import DiskDifference, SnapshotDifference
    from casbackup_client.views import View


@command("diff")
@reference_argument("old", metavar="OLD")
@reference_argument("new", metavar="NEW")
@click.option("--disk", "disks", metavar="DISK", multiple=True, help="Only this disk. Repeatable.")
@pass_app
def diff(app: App, old: str, new: str, disks: tuple[str, ...]) -> None:
    """Show where two snapshots differ, as byte ranges of their disks.

    Ranges are as fine as chunks (16 to 256 KiB): outside of them the disks are equal, within them they may
    differ. They are listed with -v and --json. No data is read, so this is quick however big the disks are.
    """
    from casbackup.jobs.diff import diff_snapshots
    from casbackup.jobs.restore import find_disk
    from casbackup_client.documenting import difference_document

    with app.peer() as peer:
        before, after = peer.find(old, app.namespace), peer.find(new, app.namespace)
        for name in disks:
            find_disk(after if any(d.name == name for d in after.manifest.disks) else before, name)
        difference = diff_snapshots(peer, before, after, disks)
    app.output.result(
        difference_document(before, after, difference), lambda: _view(difference, with_ranges=app.verbose)
    )


def _view(difference: SnapshotDifference, *, with_ranges: bool) -> View:
    from casbackup.units import format_size as size
    from casbackup_client.views import Table

    rows = [(item.disk, _status(item), size(item.differing_bytes), str(len(item.ranges))) for item in difference.disks]
    view: list[str | Table] = [Table(("disk", "status", ">differing", ">ranges"), rows)] if rows else []
    if difference.configs:
        view.append(f"configs that differ: {', '.join(difference.configs)}")
    if with_ranges:
        ranges = [(d.disk, str(r.offset), str(r.length)) for d in difference.disks for r in d.ranges]
        view += ["", Table(("disk", ">offset", ">length"), ranges)] if ranges else []
    return view or ["the snapshots have no disks"]


def _status(item: DiskDifference) -> str:
    from casbackup.units import format_size as size

    if item.old_size_bytes is None or item.new_size_bytes is None:
        return "added" if item.old_size_bytes is None else "removed"
    if item.old_size_bytes != item.new_size_bytes:
        return f"resized from {size(item.old_size_bytes)} to {size(item.new_size_bytes)}"
    return "changed" if item.ranges else "same"
