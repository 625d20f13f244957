"""Disks as they are served: the right bytes, holes, damage, and what is fetched for whom."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from casbackup.block.device import Extent, read_bytes
from casbackup.block.guard import Guarded
from casbackup.errors import BlobDamaged, ServerUnreachable
from casbackup.limits import SEGMENT_BYTES
from casbackup.peer.disk import fetch_nodes
from casbackup.peer.local import LocalPeer
from casbackup.peer.segmentmap import SegmentMap
from casbackup.peer.served import ReadPool, ServedSnapshot
from casbackup.repository.gc import execute_gc, plan_gc
from tests.waiting import wait_until

from .conftest import MiB, Stored


@pytest.fixture
def served(stored: Stored) -> Iterator[ServedSnapshot]:
    with (
        ReadPool(stored.peer, 64 * MiB) as pool,
        ServedSnapshot(pool, stored.snapshot, report=stored.complaints.append) as served,
    ):
        yield served


@pytest.fixture
def disk(served: ServedSnapshot) -> Guarded:
    return Guarded(next(iter(served.disks.values())))


def test_any_range(stored: Stored, disk: Guarded) -> None:
    source, size = random.Random(1), len(stored.content)
    assert disk.size_bytes == size
    for _ in range(300):
        start = source.randrange(size)
        length = min(size - start, source.choice([1, 512, 4096, 70_000, 5 * MiB]))
        assert read_bytes(disk, start, length) == stored.content[start : start + length]
    assert read_bytes(disk, 0, size) == stored.content


def test_many_readers_at_once(stored: Stored, disk: Guarded) -> None:
    """Some in order, as a program that copies with several connections, some at random."""
    wrong: list[int] = []

    def in_order(begin: int) -> None:
        for at in range(begin, min(begin + 12 * MiB, len(stored.content)), 256 * 1024):
            length = min(256 * 1024, len(stored.content) - at)
            if read_bytes(disk, at, length) != stored.content[at : at + length]:
                wrong.append(at)

    def at_random(seed: int) -> None:
        source = random.Random(seed)
        for _ in range(200):
            at = source.randrange(len(stored.content) - 4096)
            if read_bytes(disk, at, 4096) != stored.content[at : at + 4096]:
                wrong.append(at)

    threads = [threading.Thread(target=in_order, args=(begin * 12 * MiB,)) for begin in range(4)]
    threads += [threading.Thread(target=at_random, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not stored.complaints


def test_holes(stored: Stored, disk: Guarded) -> None:
    size = len(stored.content)
    extents = list(disk.extents(0, size))
    assert [(e.offset, e.length) for e in extents if e.zero] == [(9 * MiB, 15 * MiB)]
    assert extents[0] == Extent(0, 9 * MiB, False) and extents[-1].end == size
    assert list(disk.extents(9 * MiB - 10, 20)) == [Extent(9 * MiB - 10, 10, False), Extent(9 * MiB, 10, True)]


def test_who_reads_in_order_waits_for_no_segment_but_the_first(stored: Stored, disk: Guarded) -> None:
    """Nothing is fetched twice, and the next segment is there before it is asked for."""
    read_bytes(disk, 0, 2 * MiB)
    wait_until(lambda: len(fetched_of(stored, 1)) == len(chunks_of(stored, 1)))
    read_bytes(disk, 2 * MiB, len(stored.content) - 2 * MiB)
    assert max(Counter(stored.peer.fetched).values()) == 1


def test_who_reads_at_random_gets_only_that(stored: Stored, disk: Guarded) -> None:
    for segment in (0, 6, 8, 1, 7):
        read_bytes(disk, segment * SEGMENT_BYTES + 2 * MiB, 4096)
        assert len(fetched_of(stored, segment)) == 1


def chunks_of(stored: Stored, segment: int) -> set[bytes]:
    """Told by a peer of its own: what is asked meanwhile in the background must be counted."""
    peer = LocalPeer(stored.peer.repository)
    disk = stored.snapshot.manifest.disks[0]
    return set(SegmentMap(disk, lambda ids: fetch_nodes(peer, ids)).at(segment).chunks())


def fetched_of(stored: Stored, segment: int) -> set[bytes]:
    return chunks_of(stored, segment) & set(stored.peer.fetched)


def test_damage_is_an_error_where_it_is_and_said_once(stored: Stored, disk: Guarded) -> None:
    stored.peer.damaged = {next(iter(chunks_of(stored, 1)))}  # type: ignore[arg-type]
    lost = 0
    for _ in range(2):
        for at in range(0, 9 * MiB, 4096):
            try:
                assert read_bytes(disk, at, 4096) == stored.content[at : at + 4096]
            except BlobDamaged:
                assert 4 * MiB <= at < 8 * MiB
                lost += 1
    assert 0 < lost <= 2 * 256 * 1024 // 4096
    assert len(stored.complaints) == lost // 2
    assert stored.complaints[0].startswith("scsi0: 4096 bytes at ") and stored.complaints[0].endswith("made so")


def test_a_lost_leaf_is_data_that_cannot_be_read_until_it_is_repaired(stored: Stored, disk: Guarded) -> None:
    root = stored.snapshot.manifest.disks[0].root
    stored.peer.damaged = {root}
    assert list(disk.extents(0, disk.size_bytes)) == [Extent(0, disk.size_bytes, False)]
    with pytest.raises(BlobDamaged):
        read_bytes(disk, 0, 1)
    stored.peer.damaged = set()
    assert read_bytes(disk, 0, 1) == stored.content[:1]


def test_a_server_that_is_away_for_a_while(stored: Stored, disk: Guarded) -> None:
    read_bytes(disk, 0, 3 * MiB)
    stored.peer.unreachable = True
    with pytest.raises(ServerUnreachable):
        read_bytes(disk, 20 * MiB, 10 * MiB)
    stored.peer.unreachable = False
    assert read_bytes(disk, 20 * MiB, 10 * MiB) == stored.content[20 * MiB : 30 * MiB]


def test_a_snapshot_that_is_forgotten_meanwhile_stays(stored: Stored, disk: Guarded) -> None:
    repository = stored.peer.repository
    stored.peer.remove([stored.snapshot])
    execute_gc(repository, plan_gc(repository))
    assert read_bytes(disk, 0, len(stored.content)) == stored.content
