"""The crash table of a copy in ``docs/architecture.md``, a test a row; and crashes everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from casbackup.jobs.sync import SyncRequest, sync
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.testing.simdisk import LOSE_ALL, LOSE_NOTHING
from casbackup.testing.world import Content, Photo, World, changed, disk_bytes
from tests.sync.conftest import Site, site
from tests.sync.peers import WatchedPeer

CONTENT: Content = {"scsi0": disk_bytes(7, 60, tail=1), "vm.conf": b"name: web01\n"}
SEEDS = (LOSE_ALL, LOSE_NOTHING, *range(2, 5))

COPY = {
    "1 pack written": ("write packs/", "sync packs/"),
    "2 pack synced": ("sync packs/", "sync_folder packs/"),
    "3 pack's folder synced": ("sync packs/", "committing"),
    "4 index transaction": ("sync packs/", "committed"),
    "5 sidecar written": ("rename snapshots/", "sync_folder snapshots/", "remove snapshots/"),
    "6 manifest's temporary file written": ("rename snapshots/", "write snapshots/", "sync snapshots/"),
    "7 manifest's temporary file synced": ("rename snapshots/", "sync snapshots/", "link snapshots/"),
    "8 manifest linked": ("link snapshots/", "unlink snapshots/"),
    "9 temporary name removed": ("unlink snapshots/", "sync_folder snapshots/"),
    "10 snapshot's folder synced": ("unlink snapshots/", "sync_folder snapshots/", "committing"),
    "11 index transaction": ("unlink snapshots/", "sync_folder snapshots/", "committed"),
    "12 session ended": ("unlink snapshots/", "committed", "remove locks/"),
}
STORED_AT, MAYBE_AT, COMMITTED_AT, ENDED_AT = 4, (8, 9), 10, 12


@pytest.fixture
def source(tmp_path: Path) -> Site:
    return site(tmp_path / "source")


def only(photos: Sequence[Photo], *beginnings: str) -> Photo:
    """The photo before the first step that begins like the last of these, after steps like the others."""
    position = -1
    for beginning in beginnings:
        position = next(
            number for number in range(position + 1, len(photos)) if photos[number].step.startswith(beginning)
        )
    return photos[position]


def copy(source: Site, destination: Repository) -> list[Snapshot]:
    assert sync(source.peer, LocalPeer(destination), SyncRequest()).is_complete
    return destination.catalog.all()


def prepared(source: Site) -> Snapshot:
    made = source.backup(CONTENT)
    return source.peer.annotate(made, pinned=True, labels=("keep",))


@pytest.mark.parametrize("row", COPY)
def test_crash_while_copying(world: World, source: Site, row: str) -> None:
    number = int(row.split()[0])
    made = prepared(source)
    world.create()
    repository = world.open()
    with world.photographed() as photos:
        assert copy(source, repository) == [made]
    for seed in SEEDS:
        world.return_to(only(photos, *COPY[row]), seed)
        repository = world.open()
        found = repository.catalog.all()
        assert found in ([], [made]), "whole, with its pin, or not at all"
        if number < min(MAYBE_AT) or (number in MAYBE_AT and seed == LOSE_ALL):
            assert not found, "nothing half-written is visible"
        if number >= COMMITTED_AT or (number in MAYBE_AT and seed == LOSE_NOTHING):
            assert found, "this is the commit point"
        sessions = repository.sessions.all()
        assert not any(active for _, active in sessions)
        assert len(sessions) == (0 if number == ENDED_AT else 1)
        world.promises.kept = {snapshot.id: CONTENT for snapshot in found}
        world.verify(repository)
        watched = WatchedPeer(LocalPeer(repository))
        assert sync(source.peer, watched, SyncRequest()).is_complete
        if number >= STORED_AT:
            assert not watched.cost.sent, "what was acknowledged is not sent again"
        assert repository.catalog.all() == [made]
        world.promises.kept = {made.id: CONTENT}
        world.gc(repository)
        world.verify(repository)


def test_a_crash_before_any_operation_loses_no_snapshot(world: World, source: Site) -> None:
    """Two snapshots are copied; after each crash the next sync makes both ends the same."""
    first = prepared(source)
    second = source.backup({**CONTENT, "scsi0": changed(CONTENT["scsi0"], 1, 8)})
    world.create()
    with world.photographed() as photos:
        copy(source, world.open())
    both = {first.id: CONTENT, second.id: source.content(second.id)}
    for number, photo in enumerate(photos):
        world.return_to(photo, number % 5)
        repository = world.open()
        world.promises.kept = {s.id: both[s.id] for s in repository.catalog.all()}
        world.verify(repository)
        world.gc(repository)
        assert copy(source, repository) == [first, second]
        world.promises.kept = dict(both)
        world.verify(repository)


def test_an_orphaned_sidecar_is_nobody_elses(world: World, source: Site) -> None:
    """A crash left the sidecar of a copy whose manifest never came; then a backup is made at that very time."""
    made = prepared(source)
    world.create()
    with world.photographed() as photos:
        copy(source, world.open())
    world.return_to(only(photos, *COPY["5 sidecar written"]), LOSE_NOTHING)
    repository = world.open()
    world.clock.jump((made.manifest.time_ms - world.clock.now_ms()) / 1000)
    own = world.backup(repository, CONTENT)
    assert not own.pinned
    assert own.manifest.time_ms == made.manifest.time_ms + 1
    assert {s.id: s for s in copy(source, repository)} == {made.id: made, own.id: own}


def test_a_copy_takes_the_time_of_one_whose_removal_was_cut_short(world: World, source: Site) -> None:
    """The index still has a copy of the old manifest; it must not be taken for the new one's."""
    made = prepared(source)
    repository = world.create()
    world.clock.jump((made.manifest.time_ms - world.clock.now_ms()) / 1000)
    old = world.backup(repository, {"scsi0": disk_bytes(3, 9)})
    assert old.key == made.key
    with world.photographed() as photos:
        world.forget(repository, old)
    world.return_to(only(photos, "sync_folder snapshots/", "committing"), LOSE_ALL)
    repository = world.open()
    with world.photographed() as photos:
        assert copy(source, repository) == [made]
    world.return_to(only(photos, *COPY["10 snapshot's folder synced"]), LOSE_ALL)
    assert world.open().catalog.all() == [made]
