"""Sessions: leases, epochs, and what ends them."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any
from unittest import mock

import pytest

from casbackup.errors import ClosureViolation, SessionBusy, SessionNotFound
from casbackup.ids import DEFAULT_NAMESPACE
from casbackup.peer.local import LocalPeer
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import LEASE_S, Session
from casbackup.store.index import Index
from casbackup.testing.peer import chunk, committed, full_leaf, stored_disk
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


def test_a_commit_does_not_wait_for_a_growing_map_that_waits_for_it(repository: Repository) -> None:
    """Another thread found the map full and waits for all transactions to end; a commit reads within its own."""
    index = repository.index
    full, inside = threading.Event(), threading.Event()
    grow, require_roots = Index._grow, Session._require_roots

    def growing(self: Index) -> None:
        full.set()
        assert inside.wait(20)
        grow(self)

    def requiring(self: Session, *arguments: Any) -> None:
        inside.set()
        time.sleep(0.3)  # by then the other thread waits for this transaction
        require_roots(self, *arguments)

    with mock.patch.object(Index, "_grow", growing), mock.patch.object(Session, "_require_roots", requiring):
        session = opened(repository)
        draft = stored_disk(session, b"x" * 5000)
        session.flush()
        index._env.set_mapsize(os.path.getsize(os.path.join(repository.layout.index, "data.mdb")) + 65536)
        filler = threading.Thread(target=lambda: index.write(lambda txn: fill(index, txn)), daemon=True)
        filler.start()
        assert full.wait(20)
        committer = threading.Thread(target=session.commit, args=(draft,), daemon=True)
        committer.start()
        committer.join(20)
        assert not committer.is_alive(), "deadlock"
        filler.join(20)
    assert len(repository.catalog.all()) == 1


def fill(index: Index, txn: Any) -> None:
    for number in range(20_000):
        txn.put(b"filler %d" % number, b"x" * 100, db=index.meta)
