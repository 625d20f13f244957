"""No room: at every operation, in every phase, on the file system and in the index.

The error says so, nothing that was promised is lost, and once there is room everything works again.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest

from casbackup.errors import CasbackupError, IndexFull, RepositoryFull
from casbackup.repository.repository import Repository
from casbackup.testing.simdisk import LOSE_NOTHING
from casbackup.testing.simfs import Operation
from casbackup.testing.world import Content, World, changed, disk_bytes

FIRST: Content = {"scsi0": disk_bytes(1, 400), "vm.conf": b"1"}
SECOND: Content = {"scsi0": changed(FIRST["scsi0"], 2, 60), "vm.conf": b"2"}

Work = Callable[[World, Repository], object]


def back_up(world: World, repository: Repository) -> None:
    world.backup(repository, SECOND)


def annotate(world: World, repository: Repository) -> None:
    repository.catalog.annotate(repository.catalog.all()[0], notes="a note")


def forget_and_collect(world: World, repository: Repository) -> None:
    world.forget(repository, repository.catalog.all()[0])
    world.gc(repository)


WORK: dict[str, Work] = {"backup": back_up, "annotate": annotate, "forget and gc": forget_and_collect}


def prepared(world: World) -> Repository:
    """A repository in which each kind of work has something to do, a gc even two packs to rewrite."""
    repository = world.create()
    world.backup(repository, FIRST)
    world.backup(repository, {"scsi0": changed(FIRST["scsi0"], 3, 150)})
    return repository


@pytest.mark.parametrize("work", WORK)
def test_the_disk_is_full_from_some_operation_on(world: World, work: str) -> None:
    prepared(world)
    before = world.photo("before")
    failures = 0
    for number in range(1, 200):
        world.return_to(before, LOSE_NOTHING)
        repository = world.open()
        last = len(world.machine.log)
        world.machine.fill_at(last + number)
        try:
            WORK[work](world, repository)
            done = True
        except RepositoryFull as error:
            done = False
            failures += 1
            assert "cannot" in str(error) and "No space left" in str(error)
        steps = len(world.machine.log) - last
        world.machine.fill_at(0)
        note = f"full from {world.machine.log[last + number - 1]} on" if number <= steps else "never full"
        try:
            world.verify(repository)
            world.settle(repository)
            world.backup(repository, SECOND)
            world.gc(repository)
            world.verify(repository)
        except BaseException as error:
            error.add_note(note)
            raise
        if done and number > steps:
            break
    assert failures > 0


@pytest.mark.parametrize("work", ["backup", "forget and gc"])
@pytest.mark.parametrize("error", [RepositoryFull, IndexFull])
def test_the_index_is_full_in_some_transaction(world: World, work: str, error: type[CasbackupError]) -> None:
    """LMDB has no room for a commit, or its map cannot grow."""
    prepared(world)
    before = world.photo("before")
    for number in range(1, 100):
        world.return_to(before, LOSE_NOTHING)
        repository = world.open()
        commits: list[Operation] = []

        def refuse(operation: Operation, commits: list[Operation] = commits, number: int = number) -> None:
            if operation.name == "committing":
                commits.append(operation)
                if len(commits) >= number:
                    raise error("cannot write to the index: no room")

        world.machine.before = refuse
        failed = False
        try:
            WORK[work](world, repository)
        except error:
            failed = True
        world.machine.before = None
        world.verify(repository)
        world.settle(repository)
        world.backup(repository, SECOND)
        world.gc(repository)
        world.verify(repository)
        if len(commits) < number:
            assert not failed
            break
    assert number > 1


@pytest.mark.parametrize("room", [0, 1, 5000, 300_000, 1_000_000, 1_100_000, 1_300_000])
def test_the_disk_fills_up_in_the_middle_of_a_write(world: World, room: int) -> None:
    repository = prepared(world)
    world.machine.capacity_bytes = world.machine.used_bytes() + room
    with pytest.raises(RepositoryFull):
        world.backup(repository, {"scsi0": disk_bytes(4, 400)})
    world.verify(repository)
    world.machine.capacity_bytes = None
    world.backup(repository, {"scsi0": disk_bytes(4, 400)})
    world.gc(repository)
    world.verify(repository)


def test_forget_and_gc_make_room_on_a_full_disk(world: World) -> None:
    """What the error advises must work without any room at all, where a whole pack is garbage."""
    repository = world.create()
    old = world.backup(repository, {"scsi0": disk_bytes(1, 200)})
    world.backup(repository, {"scsi0": disk_bytes(2, 200)})
    world.machine.capacity_bytes = world.machine.used_bytes()
    with pytest.raises(RepositoryFull):
        world.backup(repository, {"scsi0": disk_bytes(3, 150)})
    world.forget(repository, old)
    assert world.gc(repository).freed_bytes > 200 * 4096
    world.backup(repository, {"scsi0": disk_bytes(3, 150)})
    world.verify(repository)


def test_an_index_that_must_not_grow(world: World) -> None:
    world.create()
    before = world.photo("before")
    world.return_to(before, LOSE_NOTHING)
    with mock.patch("casbackup.store.index.INITIAL_INDEX_MAP_BYTES", 96 * 1024):
        repository = world.open()
    repository.index._max_bytes = 96 * 1024
    done = 0
    with pytest.raises(IndexFull, match="would exceed"):
        for number in range(200):
            world.backup(repository, {"scsi0": disk_bytes(number, 120)})
            done += 1
    assert len(repository.catalog.all()) == done
    world.promises.attempts.clear()
    world.verify(repository)
    repository.index._max_bytes = 2**30
    world.backup(repository, {"scsi0": disk_bytes(1000, 120)})
    world.gc(repository)
    world.verify(repository)
