"""Doing a migration. Interrupted at any point, it is brought to its end by starting it again.

Write order. The commit point of a step is the number in config.json.

    0. ``locks/repository`` locked exclusively; temporary files of an earlier crash removed
    for each step:
    1. migration.json written: from here on the folder is of no use but to be migrated further
    2. the step's changes, each durable
    3. config.json replaced: the repository has the new format
    4. config.json.backup replaced
    at the end:
    5. migration.json removed

    A crash after    leaves                                 and the next run
    0                the repository as it was               begins
    1                the same, with migration.json          does the step
    2, or within it  some of the step's changes             does the step again, which does the rest
    3                an old config.json.backup              copies config.json, then does the next step
    4                a finished step                        does the next step
    4 of the last    a finished repository with             copies config.json, removes migration.json
                     migration.json
    5                a finished repository                  finds nothing to do
"""

from __future__ import annotations

from dataclasses import dataclass

from casbackup.clock import Clock, format_time
from casbackup.fs import FileSystem, translated
from casbackup.progress import NoProgress, Progress
from casbackup_migrations.folder import RepositoryFolder
from casbackup_migrations.plan import MigrationPlan, plan_migration
from casbackup_migrations.registry import Registry
from casbackup_migrations.state import MigrationState
from casbackup_migrations.steps.step import Step, StepContext


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What was done: the titles of the steps, and whether that ended a migration begun before."""

    from_format: int
    to_format: int
    steps: tuple[str, ...] = ()
    resumed: bool = False
    duration_s: float = 0.0


def execute_migration(
    path: str,
    fs: FileSystem,
    clock: Clock,
    progress: Progress | None = None,
    *,
    registry: Registry | None = None,
) -> MigrationReport:
    """Bring the repository at ``path`` to the format of this casbackup, or finish that.

    Where nothing is to do nothing is locked, so that it does not matter who else uses the repository.

    :raise RepositoryBusy: when somebody uses it.
    :raise RepositoryFull: / :raise RepositoryReadOnly: when it cannot be written to. Start it again later.
    :raise RepositoryError: as ``plan_migration`` does; nothing was changed then.
    """
    started_s = clock.monotonic_s()
    plan = plan_migration(path, fs, registry=registry)
    if plan.nothing_to_do:
        return MigrationReport(plan.from_format, plan.to_format)
    folder = RepositoryFolder(path, fs)
    lock = folder.lock()
    try:
        plan = plan_migration(path, fs, registry=registry)
        _Migration(folder, fs, clock, progress or NoProgress()).run(plan)
    finally:
        lock.release()
    return MigrationReport(
        plan.from_format,
        plan.to_format,
        plan.titles,
        resumed=plan.interrupted is not None,
        duration_s=clock.monotonic_s() - started_s,
    )


class _Migration:
    def __init__(self, folder: RepositoryFolder, fs: FileSystem, clock: Clock, progress: Progress) -> None:
        self._folder = folder
        self._fs = fs
        self._clock = clock
        self._progress = progress

    def run(self, plan: MigrationPlan) -> None:
        self._folder.remove_leftovers()
        first, started = plan.from_format, format_time(self._clock.now_ms())
        if plan.interrupted is not None:
            first, started = plan.interrupted.from_format, plan.interrupted.started
            self._folder.copy_config()
        for step in plan.steps:
            self._folder.write_state(MigrationState(first, plan.to_format, step.from_format, started))
            self._do(step)
        self._folder.remove_state()

    def _do(self, step: Step) -> None:
        self._progress.start(step.title, None)
        with translated(f"cannot migrate {self._folder.root}"):
            step.change(StepContext(self._folder.root, self._fs, self._clock, self._advance))
        self._folder.commit(step)
        self._folder.copy_config()
        self._progress.finish()

    def _advance(self, done: int) -> None:
        self._progress.advance(done=done)
