"""Each rule that keeps gc and sessions apart, by the history that breaks a repository without it."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from casbackup.codec.codec import PLAIN
from casbackup.errors import DataDamage, IndexIncomplete
from casbackup.ids import DEFAULT_NAMESPACE, BlobId
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.gc import execute_gc, plan_gc
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import Session, SessionKind, reading
from casbackup.spec.manifest import DiskRecord, Manifest
from casbackup.spec.node import Extent
from casbackup.spec.record import Record
from casbackup.testing.peer import chunk, full_leaf, leaf
from casbackup.testing.world import VM, World, temporary_world


def noise(number: int, length: int = 20_000) -> Record:
    return chunk(random.Random(number).randbytes(length))


def opened(repository: Repository) -> Session:
    return repository.sessions.open(DEFAULT_NAMESPACE, VM)


def commit(session: Session, root: Record, size_bytes: int) -> Snapshot:
    disk = DiskRecord("d", size_bytes, root.id)  # type: ignore[arg-type]
    return session.commit(Manifest(DEFAULT_NAMESPACE, VM, 1_000_000, 0, (disk,)))


def backed_up(repository: Repository, *chunks: Record) -> tuple[Snapshot, Record]:
    """A snapshot of a disk of these chunks; and its leaf, which is its root."""
    session = opened(repository)
    root = leaf([Extent(c.plain_length, 0, c.id) for c in chunks])
    session.send([*chunks, root])
    return commit(session, root, sum(c.plain_length for c in chunks)), root


def sound(repository: Repository, snapshot: Snapshot, *chunks: Record) -> bool:
    """Everything that the snapshot needs is there and is what it should be; nothing is marked."""
    root = snapshot.manifest.disks[0].root
    for blob_id in (root, *(c.id for c in chunks)):
        repository.store.read(blob_id)
    return not check(repository, CheckOptions(read_data=True)).damaged


def meanwhile(world: World, chance: int, action: Callable[[], None]) -> Callable[[], int]:
    """At the ``chance``-th place where others may get their turn, do something. The result tells how many there are."""
    chances = 0

    def turn() -> None:
        nonlocal chances
        chances += 1
        if chances == chance:
            world.machine.meanwhile = None
            try:
                action()
            finally:
                world.machine.meanwhile = turn

    def stop() -> int:
        world.machine.meanwhile = None
        return chances

    world.machine.meanwhile = turn
    return stop


def test_what_an_active_session_was_told_of_stays(world: World) -> None:
    repository = world.create()
    x = noise(1)
    old, root = backed_up(repository, x)
    session = opened(repository)
    assert session.missing([root.id, x.id]) == set()
    repository.catalog.remove([old])
    for _ in range(3):
        world.gc(repository)
    assert sound(repository, commit(session, root, 20_000), x)
    world.gc(repository)
    assert opened(repository).missing([root.id, x.id]) == set(), "what is needed again is alive again"


def test_a_session_that_came_after_the_plan_is_respected(world: World) -> None:
    repository = world.create()
    x = noise(1)
    old, root = backed_up(repository, x)
    repository.catalog.remove([old])
    plan = plan_gc(repository)
    assert plan.removed_blobs == 2
    session = opened(repository)
    assert session.missing([root.id, x.id]) == set()
    assert execute_gc(repository, plan).removed_blobs == 0
    assert sound(repository, commit(session, root, 20_000), x)


def test_what_a_parked_session_stored_stays(world: World) -> None:
    repository = world.create()
    session = opened(repository)
    x = noise(1)
    session.send([x])
    session.flush()
    session.park()
    world.gc(repository)
    again = repository.sessions.resume(session.id)
    assert again.missing([x.id]) == set()
    root = full_leaf(x)
    again.send([root])
    assert sound(repository, commit(again, root, 4 * 2**20), x)


def test_what_the_nodes_of_a_parked_session_name_stays(world: World) -> None:
    repository = world.create()
    x, y = noise(1), noise(2)
    old, _ = backed_up(repository, x)
    session = opened(repository)
    root = leaf([Extent(20_000, 0, x.id), Extent(20_000, 0, y.id)])
    assert session.missing([root.id, x.id, y.id]) == {root.id, y.id}
    session.send([y, root])
    session.flush()
    session.park()
    repository.catalog.remove([old])
    world.gc(repository)
    again = repository.sessions.resume(session.id)
    assert again.missing([root.id]) == set()
    assert sound(repository, commit(again, root, 40_000), x, y)


def test_a_resumed_session_asks_anew(world: World) -> None:
    repository = world.create()
    x = noise(1)
    old, root = backed_up(repository, x)
    session = opened(repository)
    assert session.missing([root.id]) == set()
    session.park()
    repository.catalog.remove([old])
    world.gc(repository)
    again = repository.sessions.resume(session.id)
    assert again.missing([root.id, x.id]) == {root.id, x.id}
    again.send([x, root])
    assert sound(repository, commit(again, root, 20_000), x)


def test_what_was_stored_again_since_the_plan_is_not_removed(world: World) -> None:
    repository = world.create()
    x = noise(1)
    old, root = backed_up(repository, x)
    holder = opened(repository)
    repository.catalog.remove([old])
    world.gc(repository)
    holder.abort()
    plan = plan_gc(repository)
    assert plan.removed_blobs == 2
    session = opened(repository)
    assert session.missing([root.id, x.id]) == {root.id, x.id}
    session.send([x, root])
    new = commit(session, root, 20_000)
    execute_gc(repository, plan)
    assert sound(repository, new, x)
    world.gc(repository)
    assert sound(repository, new, x)


@pytest.mark.parametrize("threshold", [0.25, 0.0])
def test_the_pack_of_a_session_is_left_alone_even_when_nothing_in_it_counts(world: World, threshold: float) -> None:
    """Another session was quicker with the same chunk, so the index names nothing in the pack that is being written."""
    repository = world.create()
    x, y = noise(1), noise(2)
    slow, quick = opened(repository), opened(repository)
    slow.send([x])
    quick.send([x, full_leaf(x)])
    quick.flush()
    slow.flush()
    kept = commit(quick, full_leaf(x), 4 * 2**20)
    execute_gc(repository, plan_gc(repository, repack_garbage=threshold))
    root = leaf([Extent(20_000, 0, y.id), Extent(20_000, 0, x.id)])
    slow.send([y, root])
    new = commit(slow, root, 40_000)
    assert sound(repository, new, x, y)
    assert sound(repository, kept, x)


def at_every_chance(test: Callable[[World, int], int]) -> None:
    """Run ``test`` in a world of its own for each place where others may interfere; it gives how many there are."""
    chance, chances = 0, 1
    while chance < chances:
        chance += 1
        with temporary_world() as world:
            try:
                chances = test(world, chance)
            except BaseException as error:
                error.add_note(f"interfering at chance {chance}")
                raise
    assert chance > 15


def test_a_snapshot_committed_while_gc_is_at_work_is_kept() -> None:
    def test(world: World, chance: int) -> int:
        repository = world.create()
        x, y = noise(1), noise(2)
        old, shared = backed_up(repository, x)
        session = opened(repository)
        assert session.missing([shared.id]) == set()
        repository.catalog.remove([old])
        done: list[Snapshot] = []

        def finish() -> None:
            root = leaf([Extent(20_000, 0, x.id), Extent(20_000, 0, y.id)])
            session.send([y, root])
            done.append(commit(session, root, 40_000))

        count = meanwhile(world, chance, finish)
        world.gc(repository)
        for _ in range(2):
            assert not done or sound(repository, done[0], x, y)
            world.gc(repository)
        return count()

    at_every_chance(test)


def test_what_is_being_read_stays_even_if_it_is_forgotten_while_gc_is_at_work() -> None:
    def test(world: World, chance: int) -> int:
        repository = world.create()
        x = noise(1)
        old, _ = backed_up(repository, x)
        backed_up(repository, noise(2))

        with ExitStack() as stack:

            def begin_reading_and_forget() -> None:
                stack.enter_context(reading(repository, old))
                repository.catalog.remove([old])

            count = meanwhile(world, chance, begin_reading_and_forget)
            world.gc(repository)
            assert readable(repository, old.manifest.disks[0].root, x.id)
            return count()

    at_every_chance(test)


@pytest.mark.parametrize("half", [False, True], ids=["all gone", "half gone"])
def test_a_reader_that_comes_too_late_does_not_stop_gc(world: World, half: bool) -> None:
    """It pins what was forgotten and collected, in part if that gc was cut short, before it notices."""
    repository = world.create()
    x, y = noise(1), noise(2)
    old, _ = backed_up(repository, x)
    new, _ = backed_up(repository, y)
    repository.catalog.remove([old])
    if half:
        repository.index.write(lambda txn: txn.delete(x.id, db=repository.index.blobs))
    else:
        world.gc(repository)
    pins = [old.manifest.disks[0].root]
    late = repository.sessions.open(DEFAULT_NAMESPACE, VM, kind=SessionKind.READER, pins=pins)
    world.gc(repository)
    late.abort()
    world.gc(repository)
    assert sound(repository, new, y)
    with repository.index.read() as txn:
        assert txn.get(pins[0], db=repository.index.blobs) is None


def test_a_snapshot_that_lacks_something_still_stops_gc_beside_readers(world: World) -> None:
    repository = world.create()
    x = noise(1)
    snapshot, _ = backed_up(repository, x)
    repository.index.write(lambda txn: txn.delete(x.id, db=repository.index.blobs))
    with reading(repository, snapshot), pytest.raises(IndexIncomplete):
        plan_gc(repository)


def readable(repository: Repository, *ids: BlobId) -> bool:
    for _, record in LocalPeer(repository).fetch(list(ids)):
        if isinstance(record, DataDamage):
            return False
        PLAIN.decode(record)
    return True


def test_a_reader_meets_a_repack(world: World) -> None:
    """It looked up where a blob is; before it reads, gc moves the blob and deletes the pack."""
    repository = world.create()
    chunks = [noise(n) for n in range(8)]
    old, _ = backed_up(repository, *chunks)
    new, root = backed_up(repository, *chunks[:2])
    repository.catalog.remove([old])
    located = repository.store._locate([c.id for c in chunks[:2]])
    assert world.gc(repository).rewritten_packs > 0
    original = repository.store._locate
    first = True

    def stale(ids: list[BlobId]) -> object:
        nonlocal first
        if first:
            first = False
            return located
        return original(ids)

    repository.store._locate = stale  # type: ignore[assignment,method-assign]
    assert (
        {i: bytes(PLAIN.decode(r)) for i, r in repository.store.fetch([c.id for c in chunks[:2]])}
        == {  # type: ignore[arg-type]
            c.id: bytes(PLAIN.decode(c)) for c in chunks[:2]
        }
    )
    del repository.store._locate
    assert sound(repository, new, *chunks[:2])
    assert root.id


def test_many_small_packs_become_few(world: World) -> None:
    repository = world.create()
    kept = [(backed_up(repository, noise(n))[0], noise(n)) for n in range(12)]
    assert len(repository.store.pack_rows()) == 12
    world.gc(repository)
    assert len(repository.store.pack_rows()) <= 2
    for snapshot, record in kept:
        assert sound(repository, snapshot, record)
    report = world.gc(repository)
    assert (report.rewritten_packs, report.dropped_packs) == (0, 0), "and then there is peace"
