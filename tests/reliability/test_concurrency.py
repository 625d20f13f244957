"""Several processes on one repository, many snapshots of one VM, and clocks that jump."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC
from pathlib import Path

import pytest

from casbackup.fs import RealFileSystem, write_durably
from casbackup.ids import VmName
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.repository import Repository
from casbackup.repository.retention import KeepPolicy, plan_forget
from casbackup.spec.config import encode_config
from casbackup.testing.world import VM, Content, World, changed, contents, disk_bytes

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

import driver  # noqa: E402

TEN_YEARS_S = 10 * 365 * 24 * 3600
VMS = (VmName("vm/100"), VmName("vm/200"))


def create(root: str) -> None:
    """A repository whose packs are small, so that there are many."""
    with Repository.create(root) as made:
        small = encode_config(replace(made.config, pack_bytes=2**20))
        for path in (made.layout.config_backup, made.layout.config):
            write_durably(RealFileSystem(), path, small, replace=True)


def start(root: str, *arguments: object) -> subprocess.Popen[str]:
    """A driver in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(FOLDER / "driver.py"), root, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def end(process: subprocess.Popen[str]) -> None:
    """Tell it to stop if it is a loop, and wait for its regular end."""
    with process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        assert process.stdout.read() == "ready\ndone\n", process.args
    assert process.returncode == 0


def verify(root: str) -> list[str]:
    """Everything is clean and what was backed up; gives the notes of all snapshots."""
    with Repository.open(root) as repository:
        report = check(repository, CheckOptions(read_data=True))
        assert not report.damaged, report.findings
        snapshots = repository.catalog.all()
        for snapshot in snapshots:
            driver.verify_snapshot(repository, snapshot)
        assert not repository.sessions.all(), "a session was left"
        return [snapshot.notes for snapshot in snapshots]


def two_writers_and_gc(root: str, rounds: int, backups: int) -> None:
    create(root)
    for seed in range(1, rounds + 1):
        gc = start(root, "gc-loop")
        writers = [start(root, "backups", vm, seed, backups) for vm in VMS]
        for writer in writers:
            end(writer)
        end(gc)
        notes = verify(root)
        for vm in VMS:
            assert f"{vm} {seed} {backups}" in notes, "the last one of each VM is never forgotten"
    with Repository.open(root) as repository:
        driver.forget(repository)
    driver.collect(root)
    assert len(verify(root)) == len(VMS) * driver.KEEP


def test_two_writers_and_a_gc(tmp_path: Path) -> None:
    two_writers_and_gc(str(tmp_path / "repository"), rounds=1, backups=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_writers_and_a_gc_for_long(tmp_path: Path) -> None:
    two_writers_and_gc(str(tmp_path / "repository"), rounds=15, backups=6)


def test_two_readers_while_gc_rewrites_packs(tmp_path: Path) -> None:
    """Each round replaces a sixth of the disk and forgets what was before: packs get full of garbage."""
    root = str(tmp_path / "repository")
    create(root)
    with Repository.open(root) as repository:
        for number in (1, 2, 3):
            driver.back_up(repository, driver.VM, 5, number)
    readers = [start(root, "read-loop") for _ in range(2)]
    rewritten = dropped = 0
    for number in (4, 5, 6):
        with Repository.open(root) as repository:
            driver.back_up(repository, driver.VM, 5, number)
            driver.forget(repository)
        report = driver.collect(root)
        rewritten += report.rewritten_packs
        dropped += report.dropped_packs
    for reader in readers:
        end(reader)
    driver.collect(root)
    assert len(verify(root)) == driver.KEEP
    assert rewritten + dropped > 0


def test_300_snapshots_of_one_vm(world: World) -> None:
    repository = world.create()
    content: Content = {"scsi0": disk_bytes(1, 64)}
    made = []
    for number in range(300):
        content = {"scsi0": changed(content["scsi0"], number, 2)}
        made.append(world.backup(repository, content))
        world.clock.pass_time(3600)
    started_s = time.monotonic()
    assert [s.id for s in repository.catalog.all(vm=VM)] == [s.id for s in made]
    assert repository.catalog.find(VM).id == made[-1].id
    assert repository.catalog.find(made[150].id[:12]).id == made[150].id
    assert repository.catalog.find(made[150].reference).id == made[150].id
    listing_s = time.monotonic() - started_s
    policy = KeepPolicy(last=5, daily=3, weekly=1)
    decisions = plan_forget(repository.catalog.all(), policy, UTC, now_ms=world.clock.now_ms())
    leaving = [decision.snapshot for decision in decisions if not decision.keep]
    assert len(leaving) > 280
    started_s = time.monotonic()
    world.forget(repository, *leaving)
    report = world.gc(repository)
    assert report.removed_blobs > 280
    assert listing_s < 5
    assert time.monotonic() - started_s < 20
    world.verify(repository)
    assert repository.catalog.find(VM).id == made[-1].id


@pytest.mark.parametrize("jumps", [(TEN_YEARS_S,), (-TEN_YEARS_S,), (TEN_YEARS_S, -2 * TEN_YEARS_S, TEN_YEARS_S)])
def test_clocks_that_jump(world: World, jumps: tuple[int, ...]) -> None:
    """The latest snapshot is the one that was made last; no rule and no gc costs it or a running backup."""
    repository = world.create()
    content: Content = {"scsi0": disk_bytes(1, 200)}
    newest = world.backup(repository, content)
    for number, jump in enumerate(jumps):
        content = {"scsi0": changed(content["scsi0"], number, 10)}
        running = repository.sessions.open(newest.manifest.namespace, VM)
        world.clock.jump(jump)
        world.gc(repository)
        assert [active for _, active in repository.sessions.all()] == [True], "a running one is not given up"
        running.abort()
        newest = world.backup(repository, content)
        assert newest.manifest.sequence == number + 2
        assert repository.catalog.find(VM).id == newest.id
        assert repository.catalog.find(f"{VM}@latest").id == newest.id
        assert contents(repository, repository.catalog.find(VM)) == content
    for policy in (KeepPolicy(last=1), KeepPolicy(daily=1), KeepPolicy(yearly=2)):
        decisions = plan_forget(repository.catalog.all(), policy, UTC, now_ms=world.clock.now_ms())
        assert {d.snapshot.id: d.keep for d in decisions}[newest.id]
        world.forget(repository, *[d.snapshot for d in decisions if not d.keep])
        world.gc(repository)
        world.verify(repository)
        assert repository.catalog.find(VM).id == newest.id


def test_a_snapshot_from_the_future_counts_once_its_time_has_come(world: World) -> None:
    repository = world.create()
    world.clock.jump(TEN_YEARS_S)
    future = world.backup(repository, {"scsi0": disk_bytes(1, 20)})
    world.clock.jump(-TEN_YEARS_S)
    now = [world.backup(repository, {"scsi0": disk_bytes(2 + n, 20)}) for n in range(3)]
    decisions = plan_forget(repository.catalog.all(), KeepPolicy(last=2), UTC, now_ms=world.clock.now_ms())
    assert {d.snapshot.id for d in decisions if d.keep} == {future.id, now[1].id, now[2].id}
    world.clock.jump(TEN_YEARS_S)
    decisions = plan_forget(repository.catalog.all(), KeepPolicy(last=2), UTC, now_ms=world.clock.now_ms())
    assert {d.snapshot.id for d in decisions if d.keep} == {future.id, now[2].id}
