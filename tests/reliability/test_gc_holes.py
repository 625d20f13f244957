"""Interleavings that once lost data: gc between sessions, and a rebuilt index."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest import mock

import pytest

from casbackup.codec.codec import PLAIN
from casbackup.errors import ClosureViolation
from casbackup.ids import DEFAULT_NAMESPACE, VmName, parse_disk
from casbackup.repository import gc
from casbackup.repository.gc import execute_gc, plan_gc
from casbackup.repository.indextable import IndexTable
from casbackup.repository.rebuild import rebuild_index
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import Session
from casbackup.spec.manifest import DiskRecord, Manifest
from casbackup.spec.node import Extent, encode_leaf
from casbackup.spec.record import BlobKind, Record
from casbackup.store.index import Index

VM = VmName("vm/100")


def chunk(size: int = 8192) -> Record:
    return PLAIN.encode_blob(BlobKind.CHUNK, os.urandom(size), 2)


def leaf(*chunks: Record) -> Record:
    return PLAIN.encode_blob(BlobKind.NODE, encode_leaf([Extent(c.plain_length, 0, c.id) for c in chunks]), 2)


def opened(repository: Repository) -> Session:
    return repository.sessions.open(DEFAULT_NAMESPACE, VM)


def collect(repository: Repository) -> None:
    execute_gc(repository, plan_gc(repository))


def commit(session: Session, root: Record, size_bytes: int) -> None:
    disk = DiskRecord(parse_disk("scsi0"), size_bytes, root.id)
    session.commit(Manifest(DEFAULT_NAMESPACE, VM, 1_700_000_000_000, 0, (disk,)))


def leave(repository: Repository, *records: Record) -> None:
    """As garbage."""
    session = opened(repository)
    for record in records:
        session.send([record])
    session.flush()
    session.abort()


def after_reading_the_table(act: Callable[[], None]) -> mock._patch[Callable[[Index], IndexTable]]:
    real = gc.read_index
    done: list[bool] = []

    def read(index: Index) -> IndexTable:
        table = real(index)
        if not done:
            done.append(True)
            act()
        return table

    return mock.patch.object(gc, "read_index", read)


def test_a_node_stored_after_its_chunk_was_marked(repository: Repository) -> None:
    x = chunk()
    node = leaf(x)
    leave(repository, x)
    first = opened(repository)
    assert not first.missing([x.id])
    collect(repository)  # marks x; the session keeps it
    first.send([node])
    first.flush()
    first.abort()
    second = opened(repository)
    assert not second.missing([node.id])
    collect(repository)
    commit(second, node, x.plain_length)
    repository.store.read(x.id)


def test_gc_killed_between_marking_a_chunk_and_its_node(repository: Repository) -> None:
    x = chunk()
    node = leaf(x)
    while x.id > node.id:
        x = chunk()
        node = leaf(x)
    leave(repository, x, node)
    plan = plan_gc(repository)
    with mock.patch.object(gc, "INDEX_BATCH_ENTRIES", 1):
        gc._doom(repository, plan.doom[:1])
    session = opened(repository)
    assert not session.missing([node.id])
    collect(repository)
    commit(session, node, x.plain_length)
    repository.store.read(x.id)


def test_a_session_that_is_parked_while_gc_looks(repository: Repository) -> None:
    x = chunk()
    node = leaf(x)
    leave(repository, x)
    session = opened(repository)
    assert not session.missing([x.id])

    def interrupt() -> None:
        session.send([node])
        session.flush()
        session.park()

    with after_reading_the_table(interrupt):
        collect(repository)
    resumed = repository.sessions.resume(session.id)
    if resumed.missing([node.id]):
        if resumed.missing([x.id]):
            resumed.send([x])
        resumed.send([node])
    commit(resumed, node, x.plain_length)
    repository.store.read(x.id)


def test_a_commit_while_gc_looks_is_no_damage(repository: Repository) -> None:
    x = chunk()
    node = leaf(x)
    session = opened(repository)

    def finish() -> None:
        session.send([x])
        session.send([node])
        commit(session, node, x.plain_length)

    with after_reading_the_table(finish):
        collect(repository)
    repository.store.read(x.id)


def test_a_rebuilt_index_vouches_for_no_node_without_its_chunks(repository: Repository) -> None:
    x, kept = chunk(3_000_000), chunk(3_000_000)
    node, root = leaf(x), leaf(kept)
    session = opened(repository)
    session.send([x])
    session._writer.flush(seal=True)
    for record in (node, kept, root):
        session.send([record])
    commit(session, root, kept.plain_length)
    collect(repository)  # the pack of x goes, that of node stays
    path = repository.layout.root
    repository.close()
    rebuild_index(path)
    with Repository.open(path) as again:
        session = opened(again)
        assert session.missing([x.id]) == {x.id}
        assert session.missing([node.id]) == {node.id}
        with pytest.raises(ClosureViolation):
            commit(session, node, x.plain_length)
        session.abort()
