"""The cache that many readers share: nothing twice at a time, no more than its capacity, errors where they are due."""

from __future__ import annotations

import threading

import pytest

from casbackup.errors import BlobDamaged, ServerUnreachable
from casbackup.ids import BlobId
from casbackup.peer.chunkcache import ChunkCache
from casbackup.peer.disk import BlobCache
from casbackup.peer.segmentmap import SegmentMap
from tests.waiting import wait_until

from .conftest import MiB, Stored


@pytest.fixture
def chunks(stored: Stored) -> list[BlobId]:
    """Those of the first segment, which have 4 MiB together."""
    found = SegmentMap(stored.snapshot.manifest.disks[0], ChunkCache(stored.peer, MiB).get).at(0).chunks()
    stored.peer.fetched.clear()
    return found


def test_what_is_kept_is_not_fetched_again(stored: Stored, chunks: list[BlobId]) -> None:
    cache = ChunkCache(stored.peer, 8 * MiB)
    for wanted in (chunks[:5], chunks, chunks[3:] + chunks[:3] + chunks):
        data = cache.get(wanted)
        assert data.keys() == set(wanted)
    assert b"".join(bytes(data[chunk]) for chunk in chunks) == stored.content[: 4 * MiB]  # type: ignore[arg-type]
    assert sorted(stored.peer.fetched) == sorted(chunks)
    assert cache.absent(chunks) == []


def test_the_least_recently_used_is_dropped(stored: Stored, chunks: list[BlobId]) -> None:
    cache = ChunkCache(stored.peer, 2 * MiB)
    assert len(cache.get(chunks)) == len(chunks)
    gone = cache.absent(chunks)
    assert gone == chunks[: len(gone)] and 0.4 < len(gone) / len(chunks) < 0.7


@pytest.mark.parametrize("make", [ChunkCache, BlobCache])
def test_what_is_kept_keeps_nothing_else(
    stored: Stored, chunks: list[BlobId], make: type[ChunkCache | BlobCache]
) -> None:
    """Random data is stored as it is, and comes as a part of what was read together."""
    records = [record.payload for _, record in stored.peer.fetch(chunks) if not isinstance(record, BlobDamaged)]
    assert any(isinstance(payload, memoryview) and len(payload.obj) > 2 * len(payload) for payload in records)
    cache = make(stored.peer, 8 * MiB)
    cache.get(chunks)
    assert all(isinstance(plain, bytes) for plain in cache.get(chunks).values())


def test_readers_wait_for_what_another_is_fetching(stored: Stored, chunks: list[BlobId]) -> None:
    cache = ChunkCache(stored.peer, 8 * MiB)
    stored.peer.may_go_on.clear()
    results: list[bytes] = []

    def read() -> None:
        data = cache.get(chunks)
        results.append(b"".join(bytes(data[chunk]) for chunk in chunks))  # type: ignore[arg-type]

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: sum(len(waiters) for waiters in cache._coming.values()) == 5 * len(chunks))
    stored.peer.may_go_on.set()
    for thread in threads:
        thread.join(20)
    assert results == [stored.content[: 4 * MiB]] * 6
    assert sorted(stored.peer.fetched) == sorted(chunks)


def test_damage_stands_in_the_place_of_data_and_is_not_kept(stored: Stored, chunks: list[BlobId]) -> None:
    cache = ChunkCache(stored.peer, 8 * MiB)
    stored.peer.damaged = {chunks[2]}
    data = cache.get(chunks)
    assert isinstance(data[chunks[2]], BlobDamaged) and cache.absent(chunks) == [chunks[2]]
    stored.peer.damaged = set()
    assert not isinstance(cache.get(chunks)[chunks[2]], BlobDamaged)


def test_an_error_of_the_peer_leaves_nothing_behind(stored: Stored, chunks: list[BlobId]) -> None:
    cache = ChunkCache(stored.peer, 8 * MiB)
    stored.peer.unreachable = True
    with pytest.raises(ServerUnreachable):
        cache.get(chunks)
    stored.peer.unreachable = False
    assert len(cache.get(chunks)) == len(chunks)
