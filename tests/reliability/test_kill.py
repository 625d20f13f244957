"""Backups, removals and gc in processes of their own, killed with SIGKILL at random moments."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from casbackup.fs import RealFileSystem, write_durably
from casbackup.ids import SnapshotId
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.repository import Repository
from casbackup.spec.config import encode_config

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

import driver  # noqa: E402

SMALL_PACK_BYTES = 2**20


def create(root: str) -> None:
    """A repository whose packs are small, so that some get full."""
    with Repository.create(root) as made:
        small = encode_config(replace(made.config, pack_bytes=SMALL_PACK_BYTES))
        for path in (made.layout.config_backup, made.layout.config):
            write_durably(RealFileSystem(), path, small, replace=True)


def start(root: str, *arguments: object) -> subprocess.Popen[str]:
    """A driver that is about to begin."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / "driver.py"), root, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> bool:
    """Wait for it; did it come to its end?"""
    with process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        return process.stdout.read() == "done\n"


@dataclass(slots=True)
class Rounds:
    """One repository that lives through many kills."""

    root: str
    seed: int
    number: int = 0
    killed: int = 0
    whole_s: dict[str, float] = field(default_factory=dict)

    def measure(self) -> None:
        """How long each action takes when nobody disturbs it."""
        create(self.root)
        for _ in range(driver.KEEP + 2):
            self.timed("backup", *self.backup())
        self.timed("forget-gc", "forget-gc")
        self.timed("gc", "gc")

    def timed(self, name: str, *arguments: object) -> None:
        process = start(self.root, *arguments)
        started_s = time.monotonic()  # it is ready now: what Python takes to start is not part of it
        assert end(process)
        self.whole_s[name] = time.monotonic() - started_s

    def backup(self) -> tuple[object, ...]:
        self.number += 1
        return "backup", driver.VM, self.seed, self.number

    def play(self, source: random.Random) -> None:
        """Start one or two processes, kill one or all of them, and look at what they leave."""
        before = self.listing()
        action = source.choice(["backup", "backup", "forget-gc", "forget-gc", "both"])
        runs: list[tuple[object, ...]] = [self.backup()] if action in ("backup", "both") else []
        if action in ("forget-gc", "both"):
            runs.append(("forget-gc",) if action == "forget-gc" else ("gc",))
        processes = [start(self.root, *run) for run in runs]
        victims = processes if action != "both" else source.choice([processes, processes[:1], processes[1:]])
        time.sleep(source.uniform(0, 1.1 * max(self.whole_s[str(run[0])] for run in runs)))
        for victim in victims:
            victim.kill()
        for process in processes:
            finished = end(process)
            self.killed += not finished
            assert finished or process in victims, "the process that was not killed failed"
        self.verify(before if action != "forget-gc" else before[-driver.KEEP :])
        if action == "forget-gc":
            assert set(self.listing()[:-1]) <= set(before)

    def listing(self) -> list[SnapshotId]:
        with Repository.open(self.root) as repository:
            return [snapshot.id for snapshot in repository.catalog.all()]

    def verify(self, promised: list[SnapshotId]) -> None:
        """A full check is clean, everything visible is what was backed up, and the next backup works."""
        with Repository.open(self.root) as repository:
            report = check(repository, CheckOptions(read_data=True))
            assert not report.damaged, report.findings
            snapshots = repository.catalog.all()
            assert set(promised) <= {snapshot.id for snapshot in snapshots}, "a snapshot is lost"
            for snapshot in snapshots:
                driver.verify_snapshot(repository, snapshot)
            self.number += 1
            made = driver.back_up(repository, driver.VM, self.seed, self.number)
            assert repository.catalog.find(driver.VM).id == made.id
            driver.verify_snapshot(repository, made)
            if len(snapshots) > 4:
                driver.forget(repository)


def kill_rounds(folder: Path, rounds: int, seed: int) -> None:
    source = random.Random(seed)
    played = Rounds(str(folder / "repository"), seed)
    played.measure()
    for _ in range(rounds):
        played.play(source)
    assert played.killed >= rounds // 3, "most were quicker than their killer"
    driver.collect(played.root)
    played.verify([])


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 6, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_at_random_moments_many_times(tmp_path: Path, seed: int) -> None:
    kill_rounds(tmp_path, 100, seed)
