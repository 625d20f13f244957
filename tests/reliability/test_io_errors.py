"""One operation fails with an I/O error; the process goes on, or the power goes off, or both."""

from __future__ import annotations

import errno

import pytest

from casbackup.testing.simdisk import LOSE_ALL, LOSE_NOTHING
from casbackup.testing.world import Content, World, changed, disk_bytes

FIRST: Content = {"scsi0": disk_bytes(1, 300), "vm.conf": b"1"}
SECOND: Content = {"scsi0": changed(FIRST["scsi0"], 2, 60), "vm.conf": b"2"}


def life_with_a_failure(world: World, number: int) -> bool:
    """A backup, a forget and a gc, one operation of which fails; False when there were fewer operations."""
    repository = world.open()
    last = len(world.machine.log)
    world.machine.fail_at(last + number, errno.EIO)
    for step in ("backup", "forget", "gc"):
        try:
            if step == "backup":
                world.backup(repository, SECOND)
            elif step == "forget":
                world.forget(repository, repository.catalog.all()[0])
            else:
                world.gc(repository)
        except OSError as error:
            assert error.errno == errno.EIO
    done = len(world.machine.log) - last
    world.machine.fail_at(last + number, 0)
    return done >= number


def fail_in_turn(world: World, crash: int | None, *, start: int, step: int) -> None:
    repository = world.create()
    world.backup(repository, FIRST)
    world.backup(repository, {"scsi0": changed(FIRST["scsi0"], 3, 100)})
    before = world.photo("before")
    number, more = start, True
    while more:
        world.return_to(before, LOSE_NOTHING)
        more = life_with_a_failure(world, number)
        if crash is not None:
            world.crash(crash)
        repository = world.open()
        try:
            world.verify(repository)
            world.settle(repository)
            world.backup(repository, SECOND)
            world.gc(repository)
            world.verify(repository)
        except BaseException as error:
            error.add_note(f"operation {number} had failed")
            raise
        number += step
    assert number > 50


@pytest.mark.parametrize(("crash", "start"), [(None, 1), (LOSE_ALL, 2), (2, 3)])
def test_an_operation_fails_once(world: World, crash: int | None, start: int) -> None:
    fail_in_turn(world, crash, start=start, step=4)


@pytest.mark.slow
@pytest.mark.parametrize("crash", [None, LOSE_ALL, 2, 3, 4])
def test_each_operation_fails_once(world: World, crash: int | None) -> None:
    fail_in_turn(world, crash, start=1, step=1)
