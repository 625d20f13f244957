"""Planning and doing a migration; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sample_repository import IDENTITY, build, check_migrated, look, original

from casbackup import errors
from casbackup.fs import RealFileSystem, write_durably
from casbackup.repository.repository import Repository
from casbackup.spec import config as spec
from casbackup.testing.clock import FakeClock
from casbackup.testing.simfs import SimulatedFileSystem, SimulatedMachine
from casbackup_migrations.execute import execute_migration
from casbackup_migrations.plan import plan_migration
from casbackup_migrations.registry import Registry
from casbackup_migrations.state import MigrationState, encode_state
from casbackup_migrations.steps.step import Step, StepContext

ROOT = "/repository"
THINGS = 5


@pytest.fixture
def machine() -> SimulatedMachine:
    machine = SimulatedMachine()
    build(machine.process(), ROOT, THINGS)
    machine.log.clear()
    return machine


@pytest.fixture
def fs(machine: SimulatedMachine) -> SimulatedFileSystem:
    return machine.process()


def put_state(fs: SimulatedFileSystem, from_format: int, to_format: int, step: int) -> None:
    state = MigrationState(from_format, to_format, step, "2026-11-22T20:00:00.000Z")
    write_durably(fs, f"{ROOT}/migration.json", encode_state(state), replace=True)


def put_format(fs: SimulatedFileSystem, number: int) -> None:
    content = json.loads(fs.read(f"{ROOT}/config.json")) | {"format": number}
    write_durably(fs, f"{ROOT}/config.json", json.dumps(content).encode(), replace=True)


class Recorder:
    """Progress as it came."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, title: str, total_bytes: int | None) -> None:
        self.lines.append(title)

    def advance(self, **counters: int) -> None:
        self.lines.append("".join(f"{name}+{number}" for name, number in counters.items()))

    def finish(self) -> None:
        self.lines.append("finished")


class TestPlan:
    def test_says_what_would_be_done_and_changes_nothing(
        self, machine: SimulatedMachine, fs: SimulatedFileSystem, registry: Registry
    ) -> None:
        plan = plan_migration(ROOT, fs, registry=registry)
        assert (plan.from_format, plan.to_format, plan.interrupted) == (1, 3, None)
        assert plan.titles == ("turn the inventory into JSON", "put the inventory onto shelves")
        assert not plan.nothing_to_do
        assert machine.log == []

    def test_of_a_repository_of_this_version_is_empty(self, tmp_path: Path) -> None:
        Repository.create(str(tmp_path)).close()
        plan = plan_migration(str(tmp_path), RealFileSystem())
        assert plan.nothing_to_do
        assert plan.from_format == plan.to_format == spec.FORMAT

    def test_of_an_interrupted_migration_has_the_rest(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        put_state(fs, 1, 3, 1)
        put_format(fs, 2)
        plan = plan_migration(ROOT, fs, registry=registry)
        assert plan.titles == ("put the inventory onto shelves",)
        assert plan.interrupted is not None

    def test_after_the_last_commit_there_is_still_to_tidy_up(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        put_state(fs, 1, 3, 2)
        put_format(fs, 3)
        plan = plan_migration(ROOT, fs, registry=registry)
        assert plan.titles == ()
        assert not plan.nothing_to_do


class TestExecution:
    def test_does_all_steps(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        progress, clock = Recorder(), FakeClock()
        report = execute_migration(ROOT, fs, clock, progress, registry=registry)
        assert (report.from_format, report.to_format, report.resumed) == (1, 3, False)
        assert report.steps == ("turn the inventory into JSON", "put the inventory onto shelves")
        assert progress.lines == [
            "turn the inventory into JSON",
            *["done+1"] * THINGS,
            "finished",
            "put the inventory onto shelves",
            *["done+1"] * THINGS,
            "finished",
        ]
        check_migrated(fs, ROOT, THINGS)

    def test_says_in_the_folder_what_is_going_on(
        self, machine: SimulatedMachine, fs: SimulatedFileSystem, registry: Registry
    ) -> None:
        seen: list[tuple[int, dict[str, object]]] = []

        def spying(step: Step) -> Step:
            def change(context: StepContext) -> None:
                seen.append((look(fs, ROOT).format, json.loads(fs.read(f"{ROOT}/migration.json"))))
                step.change(context)

            return replace(step, change=change)

        spied = replace(registry, steps=tuple(map(spying, registry.steps)))
        execute_migration(ROOT, fs, FakeClock(), registry=spied)
        started = seen[0][1]["started"]
        common = {"casbackup": "migration", "version": 1, "from": 1, "to": 3, "started": started}
        assert seen == [(1, common | {"step": 1}), (2, common | {"step": 2})]

    def test_is_not_needed_twice(self, machine: SimulatedMachine, fs: SimulatedFileSystem, registry: Registry) -> None:
        execute_migration(ROOT, fs, FakeClock(), registry=registry)
        machine.log.clear()
        report = execute_migration(ROOT, fs, FakeClock(), registry=registry)
        assert (report.steps, report.resumed) == ((), False)
        assert machine.log == []

    def test_without_anything_to_do_disturbs_nobody(self, tmp_path: Path) -> None:
        with Repository.create(str(tmp_path)):
            report = execute_migration(str(tmp_path), RealFileSystem(), FakeClock())
        assert report.steps == ()

    def test_resumes(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        put_state(fs, 1, 3, 1)
        report = execute_migration(ROOT, fs, FakeClock(), registry=registry)
        assert report.resumed
        check_migrated(fs, ROOT, THINGS)

    def test_goes_on_to_a_format_that_is_newer_than_the_one_it_was_begun_for(
        self, fs: SimulatedFileSystem, registry: Registry
    ) -> None:
        execute_migration(ROOT, fs, FakeClock(), registry=replace(registry, steps=registry.steps[:1], format=2))
        put_state(fs, 1, 2, 1)
        report = execute_migration(ROOT, fs, FakeClock(), registry=registry)
        assert (report.from_format, report.to_format, report.resumed) == (2, 3, True)
        check_migrated(fs, ROOT, THINGS)

    def test_removes_what_a_crash_left_of_its_own_files(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        for name in (
            "config.json.7.8.tmp",
            "config.json.backup.7.8.tmp",
            "migration.json.7.8.tmp",
            "mine.tmp",
        ):
            fs.create(f"{ROOT}/{name}").close()
        execute_migration(ROOT, fs, FakeClock(), registry=registry)
        assert look(fs, ROOT).leftovers == {"mine.tmp"}

    def test_a_step_cannot_make_another_repository_of_it(self, fs: SimulatedFileSystem) -> None:
        step = Step(1, "steal it", lambda context: None, lambda content: {**content, "repository_id": "other"})
        with pytest.raises(ValueError, match="steal it"):
            execute_migration(ROOT, fs, FakeClock(), registry=Registry((step,), 2))
        content = json.loads(fs.read(f"{ROOT}/config.json"))
        assert (content["format"], content["repository_id"]) == (1, IDENTITY)


class TestRefusals:
    def test_a_newer_format(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        put_format(fs, 4)
        with pytest.raises(errors.UnsupportedFormat, match="has format 4"):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)
        with pytest.raises(errors.UnsupportedFormat):
            plan_migration(ROOT, fs, registry=registry)

    def test_a_format_that_never_was(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        put_format(fs, 0)
        with pytest.raises(errors.ConfigDamaged, match="format 0, which never was"):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)

    def test_a_migration_that_a_newer_casbackup_began(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        put_state(fs, 1, 4, 2)
        put_format(fs, 3)
        with pytest.raises(errors.UnsupportedFormat, match="to format 4"):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)

    def test_a_config_from_before_the_step_that_was_interrupted(
        self, fs: SimulatedFileSystem, registry: Registry
    ) -> None:
        put_state(fs, 1, 3, 2)
        with pytest.raises(errors.ConfigDamaged, match="from format 2 to 3 was interrupted"):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)
        assert look(fs, ROOT).files == original(THINGS).files

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\0" * 100,
            b"[]",
            b'"migration"',
            b'{"casbackup": "repository", "format": 1}',
            b'{"casbackup": "migration", "version": 1}',
            b'{"casbackup": "migration", "version": true, "from": 1, "to": 3, "step": 1, "started": ""}',
            b'{"casbackup": "migration", "version": 1, "from": 1, "to": "3", "step": 1, "started": ""}',
            b'{"casbackup": "migration", "version": 1, "from": 1, "to": 3, "step": 3, "started": ""}',
            b'{"casbackup": "migration", "version": 1, "from": 2, "to": 3, "step": 1, "started": ""}',
            b'{"casbackup": "migration", "version": 1, "from": -1, "to": 3, "step": 1, "started": ""}',
            b"\xff\xfe{}",
        ],
    )
    def test_a_state_that_is_damaged(self, fs: SimulatedFileSystem, registry: Registry, content: bytes) -> None:
        write_durably(fs, f"{ROOT}/migration.json", content, replace=False)
        with pytest.raises(errors.ConfigDamaged, match=r"migration\.json is damaged.*migrate again"):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)
        assert look(fs, ROOT)._replace(in_migration=False) == original(THINGS)

    def test_a_state_of_a_kind_that_is_not_known_yet(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        content = b'{"casbackup": "migration", "version": 2, "plan": {}}'
        write_durably(fs, f"{ROOT}/migration.json", content, replace=False)
        with pytest.raises(errors.UnsupportedFormat, match="newer casbackup"):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)

    @pytest.mark.parametrize("shared", [True, False])
    def test_a_repository_in_use(
        self, machine: SimulatedMachine, fs: SimulatedFileSystem, registry: Registry, shared: bool
    ) -> None:
        other = machine.process()
        other.make_folders(f"{ROOT}/locks")
        lock = other.lock(f"{ROOT}/locks/repository", shared=shared)
        with pytest.raises(errors.RepositoryBusy, match="it is in use"):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)
        assert look(fs, ROOT) == original(THINGS)
        assert lock is not None
        lock.release()
        execute_migration(ROOT, fs, FakeClock(), registry=registry)

    def test_a_folder_that_cannot_be_written_to(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        fs.read_only = True
        with pytest.raises(errors.RepositoryReadOnly):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)
        assert len(plan_migration(ROOT, fs, registry=registry).steps) == 2

    def test_nothing_there(self, fs: SimulatedFileSystem) -> None:
        with pytest.raises(errors.RepositoryNotFound):
            plan_migration("/nowhere", fs)

    def test_no_repository_there(self, fs: SimulatedFileSystem) -> None:
        fs.make_folders("/else")
        with pytest.raises(errors.NotARepository):
            plan_migration("/else", fs)

    def test_a_damaged_config(self, fs: SimulatedFileSystem, registry: Registry) -> None:
        write_durably(fs, f"{ROOT}/config.json", b"{", replace=True)
        with pytest.raises(errors.ConfigDamaged):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)


class Stop(Exception):
    """A step that does not come to its end."""


def stopping_after(change: Callable[[StepContext], None]) -> Callable[[StepContext], None]:
    def stopped(context: StepContext) -> None:
        change(context)
        raise Stop

    return stopped


class TestOpening:
    """What the rest of casbackup does with such a repository."""

    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """A real repository of format 1, for a casbackup of format 3."""
        Repository.create(str(tmp_path)).close()
        monkeypatch.setattr(spec, "FORMAT", 3)
        return str(tmp_path)

    def test_an_old_repository_is_refused_until_it_is_migrated(self, path: str, registry: Registry) -> None:
        with pytest.raises(errors.MigrationNeeded):
            Repository.open(path)
        execute_migration(path, RealFileSystem(), FakeClock(), registry=registry)
        with Repository.open(path) as repository:
            assert repository.config.format == 3
            assert repository.config.compression_level == 5
            assert repository.catalog.all() == []

    def test_a_repository_in_mid_migration_is_refused(self, path: str, registry: Registry) -> None:
        last = replace(registry.steps[1], change=stopping_after(registry.steps[1].change))
        broken = replace(registry, steps=(registry.steps[0], last))
        with pytest.raises(Stop):
            execute_migration(path, RealFileSystem(), FakeClock(), registry=broken)
        with pytest.raises(errors.MigrationNeeded):
            Repository.open(path)
        assert execute_migration(path, RealFileSystem(), FakeClock(), registry=registry).resumed
        Repository.open(path).close()

    def test_an_older_casbackup_refuses_it_in_mid_migration(
        self, path: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The step to format 2 was begun but not committed: its number alone would let format 1 in."""
        first = replace(registry.steps[0], change=stopping_after(registry.steps[0].change))
        with pytest.raises(Stop):
            execute_migration(
                path,
                RealFileSystem(),
                FakeClock(),
                registry=replace(registry, steps=(first, registry.steps[1])),
            )
        monkeypatch.setattr(spec, "FORMAT", 1)
        with pytest.raises(errors.MigrationNeeded):
            Repository.open(path)

    def test_nobody_can_open_it_meanwhile(self, path: str, registry: Registry) -> None:
        tried: list[type[Exception]] = []

        def change(context: StepContext) -> None:
            try:
                Repository.open(path)
            except errors.CasbackupError as error:
                tried.append(type(error))

        trying = tuple(replace(step, change=change) for step in registry.steps)
        execute_migration(path, RealFileSystem(), FakeClock(), registry=replace(registry, steps=trying))
        assert tried == [errors.MigrationNeeded] * 2

    def test_it_waits_for_nobody_who_has_it_open(
        self, path: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(spec, "FORMAT", 1)
        with Repository.open(path), pytest.raises(errors.RepositoryBusy):
            execute_migration(path, RealFileSystem(), FakeClock(), registry=registry)
