"""``casbackup migrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from casbackup_client.app import App
from casbackup_client.options import command, dry_run_option, pass_app

if TYPE_CHECKING:
    from casbackup_client.documents import MigrateDocument


@command("migrate")
@dry_run_option("migrate")
@pass_app
def migrate(app: App, dry_run: bool) -> None:
    """Bring a repository to the format of this version of casbackup.

    Nobody else can use the repository meanwhile. An interrupted migration goes on where it was when the
    command is run again. There is no way back to an older format.
    """
    document = _plan(app) if dry_run else _execute(app)
    app.output.result(document, lambda: _lines(document), essential=dry_run)


def _plan(app: App) -> MigrateDocument:
    from casbackup.fs import RealFileSystem
    from casbackup_migrations.plan import plan_migration

    plan = plan_migration(app.folder_path, RealFileSystem())
    return {
        "dry_run": True,
        "from_format": plan.from_format,
        "to_format": plan.to_format,
        "steps": list(plan.titles),
        "resumed": plan.interrupted is not None,
    }


def _execute(app: App) -> MigrateDocument:
    from casbackup.clock import SystemClock
    from casbackup.fs import RealFileSystem
    from casbackup_migrations.execute import execute_migration

    with app.progress() as progress:
        report = execute_migration(app.folder_path, RealFileSystem(), SystemClock(), progress)
    return {
        "dry_run": False,
        "from_format": report.from_format,
        "to_format": report.to_format,
        "steps": list(report.steps),
        "resumed": report.resumed,
    }


def _lines(document: MigrateDocument) -> list[str]:
    if document["from_format"] == document["to_format"] and not document["resumed"]:
        return [f"the repository has format {document['to_format']}, the current one; nothing to do"]
    verb = "would migrate" if document["dry_run"] else "migrated"
    resumed = ", ending an interrupted migration" if document["resumed"] else ""
    steps = [f"  {title}" for title in document["steps"]]
    return [f"{verb} from format {document['from_format']} to {document['to_format']}{resumed}", *steps]
