"""``casbackup init``."""

from __future__ import annotations

import click

from casbackup_client.app import App
from casbackup_client.options import command, pass_app


@command("init")
@click.option(
    "--compression-level",
    type=click.IntRange(-7, 19),
    metavar="N",
    help="zstd level of new data, from -7 (fastest) to 19 (smallest); default: 2.",
)
@pass_app
def init(app: App, compression_level: int | None) -> None:
    """Create a repository.

    It becomes a new or empty folder: `casbackup -r /backup/vms init`. The folder must be on a local file
    system.
    """
    from casbackup.repository.repository import Repository
    from casbackup_client.documenting import repository_document

    with Repository.create(app.folder_path, compression_level=compression_level) as repository:
        document = repository_document(repository)
    app.output.result(
        {"repository": document},
        lambda: [f"created repository {document['id'][:8]} in {document['path']}"],
        essential=False,
    )
