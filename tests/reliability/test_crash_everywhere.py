"""A crash before every single operation of a repository's life, and before those of the recovery.

One life is photographed step by step: creation, two backups, a forget, a gc that drops and rewrites packs.
Each photo is then a machine that lost its power at that moment; a seed decides what of the unsynced writes
survives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from casbackup.errors import NotARepository, RepositoryNotFound
from casbackup.repository.repository import Repository
from casbackup.testing.simdisk import LOSE_ALL, LOSE_NOTHING
from casbackup.testing.world import Content, Photo, World, changed, disk_bytes, temporary_world

FIRST: Content = {"scsi0": disk_bytes(1, 400, zero_every=3, tail=100), "vm.conf": b"memory: 512\n"}
SECOND: Content = {"scsi0": changed(FIRST["scsi0"], 2, 20), "vm.conf": b"memory: 1024\n", "virtio1": b""}
LATER: Content = {"scsi0": changed(SECOND["scsi0"], 3, 20)}


class Life(NamedTuple):
    world: World
    photos: list[Photo]
    created: int
    """Before the photo with this number there may be no repository."""


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    with temporary_world() as world:
        with world.photographed() as photos:
            repository = world.create()
            created = len(photos)
            first = world.backup(repository, FIRST)
            world.backup(repository, SECOND)
            world.forget(repository, first)
            report = world.gc(repository)
        assert (report.dropped_packs, report.rewritten_packs) == (1, 1), "the life shows all that gc does"
        world.verify(repository)
        yield Life(world, photos, created)


def reopened(life: Life, number: int) -> Repository:
    try:
        return life.world.open()
    except (NotARepository, RepositoryNotFound):
        assert number < life.created
        return life.world.create()


def go_on(world: World, repository: Repository, *, look_first: bool) -> None:
    """What a user does after a crash, who may or may not look at what is there before going on."""
    if look_first:
        world.verify(repository)
        world.settle(repository)
    world.backup(repository, LATER)
    world.backup(repository, FIRST)
    world.gc(repository)
    world.verify(repository)
    left = world.gc(repository)
    assert (left.removed_blobs, left.removed_orphans) == (0, 0), "one gc is enough"


def crash_everywhere(life: Life, seeds: range, *, start: int = 0, step: int = 1) -> None:
    for number in range(start, len(life.photos), step):
        for seed in seeds:
            try:
                life.world.return_to(life.photos[number], seed)
                go_on(life.world, reopened(life, number), look_first=seed % 2 == 0)
            except BaseException as error:
                error.add_note(f"after a crash (seed {seed}) before step {number}, {life.photos[number].step}")
                raise


@pytest.mark.parametrize("seed", [LOSE_ALL, LOSE_NOTHING, 2])
def test_crash_before_every_operation(life: Life, seed: int) -> None:
    # Half of the photos with each seed; the slow run takes all of them with many.
    crash_everywhere(life, range(seed, seed + 1), start=seed % 2, step=2 if seed < 2 else 3)


@pytest.mark.slow
def test_crash_before_every_operation_with_many_seeds(life: Life) -> None:
    crash_everywhere(life, range(20))


def crash_during_recovery(life: Life, number: int, seed: int, every: int) -> None:
    world = life.world
    world.return_to(life.photos[number], seed)
    with world.photographed() as photos:
        repository = reopened(life, number)
        world.backup(repository, LATER)
        world.gc(repository)
    for again in range(number % every, len(photos), every):
        try:
            world.return_to(photos[again], seed + again)
            repository = reopened(life, number)
            world.verify(repository)
            world.settle(repository)
            world.gc(repository)
            world.verify(repository)
        except BaseException as error:
            error.add_note(f"after crashes before step {number} and, going on, before {again}, {photos[again].step}")
            raise


def test_crash_during_the_recovery(life: Life) -> None:
    for number in range(life.created, len(life.photos), 12):
        crash_during_recovery(life, number, seed=number, every=9)


@pytest.mark.slow
def test_crash_during_the_recovery_everywhere(life: Life) -> None:
    for number in range(len(life.photos)):
        crash_during_recovery(life, number, seed=number, every=2)
