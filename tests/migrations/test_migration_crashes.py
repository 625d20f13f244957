"""A migration that is interrupted at any point is brought to its end by starting it again."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sample_repository import build, check_interrupted, check_migrated

from casbackup.errors import CasbackupError
from casbackup.fs import RealFileSystem
from casbackup.testing.clock import FakeClock
from casbackup.testing.simdisk import LOSE_ALL, LOSE_NOTHING
from casbackup.testing.simfs import SimulatedCrash, SimulatedMachine
from casbackup_migrations.execute import execute_migration
from casbackup_migrations.registry import Registry

ROOT = "/repository"
THINGS = 4
SEEDS = (LOSE_ALL, LOSE_NOTHING, 2, 3, 4)


def fresh() -> SimulatedMachine:
    machine = SimulatedMachine()
    build(machine.process(), ROOT, THINGS)
    machine.log.clear()
    return machine


def operations(machine: SimulatedMachine, registry: Registry) -> int:
    """How many operations it takes to migrate what is on the machine, which is not changed."""
    trial = machine.photo()
    execute_migration(ROOT, trial.process(), FakeClock(), registry=registry)
    return len(trial.log)


def crash(machine: SimulatedMachine, number: int, seed: int, registry: Registry) -> None:
    """Migrate, crash at an operation, and come up again."""
    machine.log.clear()
    machine.crash_at(number)
    with pytest.raises(SimulatedCrash):
        execute_migration(ROOT, machine.process(), FakeClock(), registry=registry)
    machine.restart(seed)
    check_interrupted(machine.process(), ROOT, THINGS)


def finish(machine: SimulatedMachine, registry: Registry) -> None:
    fs = machine.process()
    execute_migration(ROOT, fs, FakeClock(), registry=registry)
    check_migrated(fs, ROOT, THINGS)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_at_every_operation(seed: int, registry: Registry) -> None:
    start = fresh()
    count = operations(start, registry)
    assert count > 50
    for number in range(1, count + 1):
        machine = start.photo()
        crash(machine, number, seed, registry)
        finish(machine, registry)


@pytest.mark.parametrize("seed", [LOSE_ALL, LOSE_NOTHING, pytest.param(5, marks=pytest.mark.slow)])
def test_a_second_crash_while_it_resumes(seed: int, registry: Registry) -> None:
    start = fresh()
    for first in range(1, operations(start, registry) + 1, 3):
        crashed = start.photo()
        crash(crashed, first, seed, registry)
        for second in range(1, operations(crashed, registry) + 1, 5 if seed < 2 else 1):
            machine = crashed.photo()
            crash(machine, second, seed, registry)
            finish(machine, registry)


def test_crashes_one_after_another(registry: Registry) -> None:
    """Each run gets a little further; none makes it worse."""
    for seed in range(2, 40):
        source, machine = random.Random(seed), fresh()
        for _ in range(8):
            left = operations(machine, registry)
            if left == 0:
                break
            crash(machine, source.randint(1, left), source.randint(0, 100), registry)
        finish(machine, registry)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_after_the_end(seed: int, registry: Registry) -> None:
    machine = fresh()
    finish(machine, registry)
    machine.power_off()
    machine.restart(seed)
    check_migrated(machine.process(), ROOT, THINGS)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_an_error_at_every_operation(code: int, registry: Registry) -> None:
    start = fresh()
    for number in range(1, operations(start, registry) + 1):
        machine = start.photo()
        machine.fail_at(number, code)
        fs = machine.process()
        with pytest.raises((CasbackupError, OSError)):
            execute_migration(ROOT, fs, FakeClock(), registry=registry)
        check_interrupted(fs, ROOT, THINGS)
        finish(machine, registry)


def test_a_full_disk_from_every_operation_on(registry: Registry) -> None:
    start = fresh()
    for number in range(1, operations(start, registry) + 1):
        machine = start.photo()
        machine.fill_at(number)
        fs = machine.process()
        try:
            execute_migration(ROOT, fs, FakeClock(), registry=registry)
        except CasbackupError as error:
            assert error.code == "repository-full"
        check_interrupted(fs, ROOT, THINGS)
        machine.fill_at(0)
        finish(machine, registry)


MANY = 30
VICTIM = Path(__file__).parent / "victim.py"


def victim(root: Path) -> subprocess.Popen[str]:
    """A process that has been started and is about to migrate."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, str(VICTIM), str(root)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> str:
    """Wait for it; what it has printed since."""
    with process:
        assert process.stdout is not None
        return process.stdout.read()


def kill_rounds(folder: Path, rounds: int, seed: int) -> None:
    """Kill migrations at random moments; each one up to four times before it may come to its end."""
    source, fs = random.Random(seed), RealFileSystem()
    build(fs, str(folder / "measured"), MANY)
    process, started_s = victim(folder / "measured"), time.monotonic()
    assert end(process) == "done\n"
    whole_s = time.monotonic() - started_s
    killed = 0
    for number in range(rounds):
        root = folder / f"{number}"
        build(fs, str(root), MANY)
        for _ in range(4):
            process = victim(root)
            time.sleep(source.uniform(0, whole_s))
            process.kill()
            if end(process) == "done\n":
                break
            killed += 1
            check_interrupted(fs, str(root), MANY)
        assert end(victim(root)) == "done\n"
        check_migrated(fs, str(root), MANY)
    assert killed > rounds // 4


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 3, seed=1)


@pytest.mark.slow
def test_killed_at_random_moments_many_times(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 200, seed=2)
