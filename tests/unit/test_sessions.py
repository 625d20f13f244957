"""Sessions: leases, epochs, and what ends them."""

from __future__ import annotations

import random

import pytest

from casbackup.errors import ClosureViolation, SessionBusy, SessionNotFound
from casbackup.ids import DEFAULT_NAMESPACE
from casbackup.peer.local import LocalPeer
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import LEASE_S, Session
from casbackup.testing.peer import chunk, committed, full_leaf
from casbackup.testing.world import VM, World


def opened(repository: Repository) -> Session:
    return repository.sessions.open(DEFAULT_NAMESPACE, VM)


def test_a_lease_counts_from_the_last_thing_stored(world: World) -> None:
    """A backup may run for longer than the lease and can still be resumed after it died."""
    repository = world.create()
    session = opened(repository)
    for number in range(4):
        world.clock.pass_time(0.8 * LEASE_S)
        session.send([chunk(random.Random(number).randbytes(1000))])
        session.flush()
    session.park()
    world.clock.pass_time(0.8 * LEASE_S)
    world.gc(repository)
    repository.sessions.resume(session.id).park()
    world.clock.pass_time(1.1 * LEASE_S)
    world.gc(repository)
    with pytest.raises(SessionNotFound):
        repository.sessions.resume(session.id)


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps_ends_no_active_session(world: World, years: int) -> None:
    repository = world.create()
    committed(LocalPeer(repository), b"x" * 5000)
    session = opened(repository)
    record = chunk(b"y" * 5000)
    session.send([record])
    session.flush()
    world.clock.jump(years * 365 * 86400)
    world.gc(repository)
    assert session.missing([record.id]) == set()
    session.send([full_leaf(record)])
    session.abort()
    world.gc(repository)
    assert repository.sessions.all() == []


@pytest.mark.parametrize("years", [-10, 10])
def test_nothing_is_pinned_for_years_by_a_wrong_clock(world: World, years: int) -> None:
    repository = world.create()
    session = opened(repository)
    session.send([chunk(b"y" * 5000)])
    session.flush()
    session.park()
    world.clock.jump(years * 365 * 86400)
    world.gc(repository)
    assert repository.sessions.all() == []
    assert list(repository.store.storage.list()) == []


def test_a_session_belongs_to_one_process_until_that_ends(world: World) -> None:
    one, two = world.create(), world.open()
    session = opened(one)
    with pytest.raises(SessionBusy):
        two.sessions.resume(session.id)
    one.fs.kill()  # type: ignore[attr-defined]
    two.sessions.resume(session.id).abort()


def test_garbage_is_missing_to_whoever_asks_after_it_was_marked(world: World) -> None:
    repository = world.create()
    garbage = chunk(b"garbage" * 1000)
    first = opened(repository)
    first.send([garbage])
    first.flush()
    asked_before = opened(repository)
    assert asked_before.missing([garbage.id]) == set()
    first.abort()
    world.gc(repository)
    asked_after = opened(repository)
    assert asked_after.missing([garbage.id]) == {garbage.id}
    with pytest.raises(ClosureViolation):
        asked_after.send([full_leaf(garbage)])
    asked_before.send([full_leaf(garbage)])
    asked_before.flush()
    asked_after.abort()
    asked_before.park()
    world.gc(repository)
    resumed = repository.sessions.resume(asked_before.id)
    assert resumed.missing([garbage.id, full_leaf(garbage).id]) == set(), "a session's own nodes keep what they name"
    resumed.abort()
    world.gc(repository)
    assert list(repository.store.storage.list()) == []


def test_no_lock_files_are_left_behind(world: World) -> None:
    repository = world.create()
    peer = LocalPeer(repository)
    committed(peer, b"x" * 5000)
    opened(repository).abort()
    opened(repository).park()
    with peer.reading(peer.snapshots()[0]):
        pass
    with pytest.raises(SessionNotFound):
        repository.sessions.resume("0" * 32)  # type: ignore[arg-type]
    world.clock.pass_time(2 * LEASE_S)
    world.gc(repository)
    left = {entry.name for entry in repository.fs.list(repository.layout.locks)}
    assert left <= {"repository", "maintenance"}
