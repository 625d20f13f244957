"""What a migration would do. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from casbackup.errors import ConfigDamaged, UnsupportedFormat
from casbackup.fs import FileSystem
from casbackup_migrations import registry as known
from casbackup_migrations.folder import RepositoryFolder
from casbackup_migrations.registry import Registry
from casbackup_migrations.state import MigrationState
from casbackup_migrations.steps.step import Step


@dataclass(frozen=True, slots=True)
class MigrationPlan:
    """The steps that are left. ``interrupted``: a migration to be brought to its end, if only to tidy up."""

    from_format: int
    to_format: int
    steps: tuple[Step, ...]
    interrupted: MigrationState | None = None

    @property
    def titles(self) -> tuple[str, ...]:
        return tuple(step.title for step in self.steps)

    @property
    def nothing_to_do(self) -> bool:
        return not self.steps and self.interrupted is None


def plan_migration(path: str, fs: FileSystem, *, registry: Registry | None = None) -> MigrationPlan:
    """What ``execute_migration`` would do with the repository at ``path``. Takes no lock.

    :raise RepositoryNotFound: / :raise NotARepository: when there is no repository.
    :raise UnsupportedFormat: when a newer casbackup wrote it or began to migrate it.
    :raise ConfigDamaged: when config.json or migration.json makes no sense.
    """
    registry = registry or known.current()
    folder = RepositoryFolder(path, fs)
    found = folder.format()
    if found > registry.format:
        raise UnsupportedFormat(
            f"{folder.root} has format {found}; this casbackup knows formats up to {registry.format}"
        )
    if found < registry.oldest:
        raise ConfigDamaged(f"config.json of {folder.root} names format {found}, which never was")
    state = folder.state()
    if state is not None:
        _check(state, found, registry, folder.root)
    return MigrationPlan(found, registry.format, registry.steps_from(found), state)


def _check(state: MigrationState, found: int, registry: Registry, root: str) -> None:
    if state.to_format > registry.format:
        raise UnsupportedFormat(
            f"a newer casbackup began to migrate {root} to format {state.to_format}; only it can go on"
        )
    if not state.allows(found):
        raise ConfigDamaged(
            f"config.json of {root} is not the one that was there: it names format {found}, "
            f"but a migration from format {state.step} to {state.step + 1} was interrupted"
        )
