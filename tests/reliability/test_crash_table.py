"""The crash tables of ``docs/architecture.md``, a test a row: what a crash leaves, and what cleans up.

A photo taken before the step that follows is the machine that crashed after the step in question. With
``LOSE_ALL`` only what is durable survives it, with ``LOSE_NOTHING`` everything; other seeds lie in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from casbackup.errors import SessionNotFound
from casbackup.ids import DEFAULT_NAMESPACE, SnapshotId
from casbackup.jobs.backup import backup
from casbackup.peer.local import LocalPeer
from casbackup.repository.check import check
from casbackup.repository.repository import Repository
from casbackup.testing.peer import chunk
from casbackup.testing.simdisk import LOSE_ALL, LOSE_NOTHING
from casbackup.testing.world import VM, Content, Photo, World, changed, disk_bytes, request

CONTENT: Content = {"scsi0": disk_bytes(7, 60, tail=1), "vm.conf": b"name: web01\n"}
CHANGED: Content = {"scsi0": changed(CONTENT["scsi0"], 8, 10)}
SEEDS = (LOSE_ALL, LOSE_NOTHING, *range(2, 5))


def after(world: World, photo: Photo, seed: int) -> Repository:
    world.return_to(photo, seed)
    return world.open()


def only(photos: Sequence[Photo], *beginnings: str) -> Photo:
    """The photo before the first step that begins like the last of these, after steps like the others."""
    position = -1
    for beginning in beginnings:
        position = next(
            number for number in range(position + 1, len(photos)) if photos[number].step.startswith(beginning)
        )
    return photos[position]


def ids(repository: Repository) -> set[SnapshotId]:
    return {snapshot.id for snapshot in repository.catalog.all()}


# --- commit

COMMIT = {
    "1 pack written": ("write packs/", "sync packs/"),
    "2 pack synced": ("sync packs/", "sync_folder packs/"),
    "3 pack's folder synced": ("sync packs/", "committing"),
    "4 index transaction": ("sync packs/", "committed"),
    "5 manifest's temporary file written": ("write snapshots/", "sync snapshots/"),
    "6 manifest's temporary file synced": ("sync snapshots/", "link snapshots/"),
    "7 manifest linked": ("link snapshots/", "unlink snapshots/"),
    "8 temporary name removed": ("unlink snapshots/", "sync_folder snapshots/"),
    "9 snapshot's folder synced": ("unlink snapshots/", "sync_folder snapshots/", "committing"),
    "10 catalog transaction": ("unlink snapshots/", "sync_folder snapshots/", "remove locks/"),
}
STORED_AT, MAYBE_AT, COMMITTED_AT = 4, (7, 8), 9


@pytest.mark.parametrize("row", COMMIT)
def test_crash_while_committing(world: World, row: str) -> None:
    number = int(row.split()[0])
    repository = world.create()
    with world.photographed() as photos:
        world.backup(repository, CONTENT)
    photo = only(photos, *COMMIT[row])
    for seed in SEEDS:
        repository = after(world, photo, seed)
        visible = bool(ids(repository))
        if number < min(MAYBE_AT) or (number in MAYBE_AT and seed == LOSE_ALL):
            assert not visible, "nothing half-written is visible"
        if number >= COMMITTED_AT or (number in MAYBE_AT and seed == LOSE_NOTHING):
            assert visible, "this is the commit point"
        world.verify(repository)
        sessions = repository.sessions.all()
        assert not any(active for _, active in sessions)
        assert len(sessions) == (0 if number == 10 else 1)
        if number >= STORED_AT:
            assert stored_everything(repository), "nothing that was indexed is lost"
        elif seed == LOSE_ALL:
            assert not repository.store.pack_rows()
        world.settle(repository)
        if visible:
            world.forget(repository, *repository.catalog.all())
        world.clock.pass_time(25 * 3600)
        world.gc(repository)
        assert list(repository.store.storage.list()) == [], "gc removes what a crash left"
        assert list(repository.sessions.all()) == []
        world.verify(repository)


def stored_everything(repository: Repository) -> bool:
    """Does a backup of the same content find all of it there?"""
    with repository.index.read() as txn:
        stored = txn.stat(repository.index.blobs)["entries"]
    snapshot = backup(LocalPeer(repository), request(CONTENT), clock=repository.clock)
    repository.catalog.remove([snapshot])
    return bool(stored) and snapshot.manifest.stats.new_chunks == 0


@pytest.mark.parametrize("row", list(COMMIT)[:9])
def test_a_crashed_backup_can_be_resumed(world: World, row: str) -> None:
    repository = world.create()
    with world.photographed() as photos:
        world.backup(repository, CONTENT)
    for seed in SEEDS:
        repository = after(world, only(photos, *COMMIT[row]), seed)
        (parked, _), *others = repository.sessions.all()
        assert not others
        again = backup(LocalPeer(repository), request(CONTENT, resume=parked.id), clock=world.clock)
        world.promises.kept[again.id] = CONTENT
        if int(row.split()[0]) >= STORED_AT:
            assert again.manifest.stats.new_bytes == 0, "what was acknowledged is not sent again"
        world.gc(repository)
        world.verify(repository)
        assert repository.sessions.all() == []


# --- a long backup: packs are sealed on the way


@pytest.mark.parametrize(
    "steps",
    [
        ("sync packs/",),
        ("sync packs/", "committing"),
        ("sync packs/", "committed"),
        ("committed", "create packs/"),
    ],
)
def test_crash_between_packs(world: World, steps: tuple[str, ...]) -> None:
    repository = world.create()
    content = {"scsi0": disk_bytes(9, 700)}
    with world.photographed() as photos:
        world.backup(repository, content)
    first = next(n for n, p in enumerate(photos) if p.step.startswith("create packs/"))
    for seed in SEEDS:
        repository = after(world, only(photos[first + 1 :], *steps), seed)
        assert not ids(repository)
        world.verify(repository)
        world.backup(repository, content)
        world.gc(repository)
        world.verify(repository)


# --- forget

FORGET = {
    "1 manifest removed": ("remove snapshots/", "remove snapshots/"),
    "2 sidecar removed": ("remove snapshots/", "sync_folder snapshots/"),
    "3 folder synced": ("sync_folder snapshots/", "committing"),
    "4 index transaction": ("sync_folder snapshots/", "committed"),
}


@pytest.mark.parametrize("row", FORGET)
def test_crash_while_forgetting(world: World, row: str) -> None:
    number = int(row.split()[0])
    repository = world.create()
    snapshot = world.backup(repository, CONTENT)
    kept = world.backup(repository, CHANGED)
    snapshot = repository.catalog.annotate(snapshot, notes="old", labels=["precious"])
    with world.photographed() as photos:
        world.forget(repository, snapshot)
    for seed in SEEDS:
        repository = after(world, only(photos, *FORGET[row]), seed)
        world.verify(repository)
        found = {s.id: s for s in repository.catalog.all()}
        assert kept.id in found
        if number >= 3 or seed == LOSE_NOTHING:
            assert snapshot.id not in found
        elif seed == LOSE_ALL:
            assert snapshot.id in found
        if snapshot.id in found:
            assert found[snapshot.id] == snapshot, "whole or not at all"
        world.settle(repository)
        world.gc(repository)
        world.verify(repository)
        assert {s.id for s in repository.catalog.all()} == set(found)


def test_a_snapshot_may_take_the_time_of_one_whose_removal_was_cut_short(world: World) -> None:
    """The index still has a copy of the old manifest; it must not be taken for the new one's."""
    repository = world.create()
    old = world.backup(repository, CONTENT)
    with world.photographed() as photos:
        world.forget(repository, old)
    repository = after(world, only(photos, *FORGET["3 folder synced"]), LOSE_ALL)
    world.settle(repository)
    world.clock.jump((old.manifest.time_ms - world.clock.now_ms()) / 1000)
    with world.photographed() as photos:
        world.backup(repository, CHANGED)
    repository = after(world, only(photos, *COMMIT["9 snapshot's folder synced"]), LOSE_ALL)
    world.verify(repository)
    assert ids(repository)


# --- pins, labels, notes

ANNOTATE = {
    "1 temporary file written": ("write snapshots/", "sync snapshots/"),
    "2 temporary file synced": ("sync snapshots/", "rename snapshots/"),
    "3 renamed": ("rename snapshots/", "sync_folder snapshots/"),
    "4 folder synced": ("sync_folder snapshots/", "the end"),
}


@pytest.mark.parametrize("row", ANNOTATE)
def test_crash_while_changing_a_sidecar(world: World, row: str) -> None:
    number = int(row.split()[0])
    repository = world.create()
    snapshot = world.backup(repository, CONTENT)
    before = repository.catalog.annotate(snapshot, pinned=True, notes="before")
    with world.photographed() as photos:
        repository.catalog.annotate(before, notes="after", labels=["new"])
    for seed in SEEDS:
        repository = after(world, only(photos, *ANNOTATE[row]), seed)
        (found,) = repository.catalog.all()
        assert found.pinned
        assert (found.notes, found.labels) in (
            [("before", ())] if number < 3 else [("before", ()), ("after", ("new",))]
        )
        if number == 4 or (number == 3 and seed == LOSE_NOTHING):
            assert found.notes == "after"
        world.verify(repository)


# --- gc

GC = {
    "1 garbage marked": ("committing", "committed"),
    "2 entries removed": ("committed", "committing", "committed"),
    "3 pack out of the index": ("committed", "committed", "committing", "committed"),
    "4 pack deleted": ("remove packs/", "sync_folder packs/"),
    "5 its folder synced": ("sync_folder packs/", "the end"),
}


@pytest.mark.parametrize("row", GC)
def test_crash_while_collecting(world: World, row: str) -> None:
    number = int(row.split()[0])
    repository = world.create()
    old = world.backup(repository, {"scsi0": disk_bytes(1, 50)})
    world.backup(repository, {"scsi0": disk_bytes(2, 50)})
    world.forget(repository, old)
    with world.photographed() as photos:
        report = world.gc(repository)
    assert (report.dropped_packs, report.rewritten_packs) == (1, 0)
    for seed in SEEDS:
        repository = after(world, only(photos, *GC[row]), seed)
        assert len(repository.store.pack_rows()) == (2 if number < 3 else 1)
        if seed == LOSE_ALL:
            assert len(list(repository.store.storage.list())) == (1 if number == 5 else 2)
        world.verify(repository)
        world.gc(repository)
        assert len(list(repository.store.storage.list())) == len(repository.store.pack_rows()) == 1
        world.verify(repository)


REPACK = {
    "1 blobs copied": ("write packs/", "sync packs/"),
    "2 new pack synced": ("sync packs/", "sync_folder packs/"),
    "3 new pack's folder synced": ("sync packs/", "committing"),
    "4 entries moved": ("sync packs/", "committed"),
    "5 session dropped": ("sync packs/", "remove locks/session"),
    "6 old pack out of the index": ("remove locks/session", "remove packs/"),
    "7 old pack deleted": ("remove locks/session", "sync_folder packs/"),
}


@pytest.mark.parametrize("row", REPACK)
def test_crash_while_rewriting_a_pack(world: World, row: str) -> None:
    repository = world.create()
    disk = disk_bytes(1, 120)
    old = world.backup(repository, {"scsi0": disk})
    world.backup(repository, {"scsi0": disk[: 60 * 4096]})
    world.forget(repository, old)
    with world.photographed() as photos:
        report = world.gc(repository)
    assert report.rewritten_packs == 1
    for seed in SEEDS:
        repository = after(world, only(photos, *REPACK[row]), seed)
        world.verify(repository)
        world.gc(repository)
        assert {i.pack for i in repository.store.storage.list()} == {
            r.pack for r in repository.store.pack_rows().values()
        }
        assert repository.sessions.all() == []
        world.verify(repository)


# --- configuration

CONFIG = (
    "remove config.json.backup",
    "write config.json.backup",
    "rename config.json.backup",
    "write config.json",
    "rename config.json",
)


@pytest.mark.parametrize("step", CONFIG)
def test_crash_while_creating(world: World, step: str) -> None:
    """A repository is there once its config.json is; before that, creating it again works."""
    with world.photographed() as photos:
        world.create().close()
    candidates = [photo for photo in photos if photo.step.startswith(step)]
    for seed in SEEDS:
        world.return_to(candidates[0], seed)
        repository = world.create()
        world.backup(repository, CONTENT)
        world.verify(repository)


# --- sessions


def test_what_a_session_flushed_survives_and_what_it_did_not_is_told_missing(world: World) -> None:
    repository = world.create()
    session = repository.sessions.open(DEFAULT_NAMESPACE, VM)
    flushed, unflushed = chunk(b"flushed" * 100), chunk(b"unflushed" * 100)
    session.send([flushed])
    session.flush()
    session.send([unflushed])
    world.crash(LOSE_ALL)
    repository = world.open()
    resumed = repository.sessions.resume(session.id)
    assert resumed.missing([flushed.id, unflushed.id]) == {unflushed.id}
    resumed.abort()
    with pytest.raises(SessionNotFound):
        repository.sessions.resume(session.id)
    assert check(repository).findings == []


def test_gc_does_not_trust_a_removal_that_a_crash_may_undo(world: World) -> None:
    """``forget`` is killed before its removal is durable, gc runs, then the power goes off."""
    repository = world.create()
    old = world.backup(repository, CONTENT)
    world.backup(repository, {"scsi0": disk_bytes(2, 50)})
    fs = repository.fs
    fs.remove(repository.layout.manifest(old.key))
    world.promises.leaving.add(old.id)
    world.gc(repository)
    world.crash(LOSE_ALL)
    repository = world.open()
    world.verify(repository)
    world.gc(repository)
