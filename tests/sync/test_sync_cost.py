"""What a sync costs in round trips and bytes, counted: a slow link changes the time, but not these."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from casbackup.ids import ZERO_ID, BlobId, DiskName
from casbackup.jobs.sync import SyncRequest, sync
from casbackup.jobs.sync_report import SyncReport
from casbackup.limits import BLOCK_BYTES, FANOUT, SEGMENT_BLOCKS, SEGMENT_BYTES
from casbackup.peer.api import PeerSession
from casbackup.spec.manifest import DiskRecord, Manifest, encode_manifest
from casbackup.spec.record import Record
from casbackup.testing.peer import TIME_MS, chunk, full_leaf, inner
from casbackup.testing.world import VM, changed, disk_bytes
from casbackup.tree.builder import level_of
from casbackup.units import GiB, TiB
from tests.sync.conftest import ACME, Pair
from tests.sync.peers import Cost, WatchedPeer


class LargeDisk:
    """A disk whose segments hold a chunk each, one of a few; only what is changed is all its own."""

    def __init__(self, session: PeerSession, size_bytes: int, kinds: int = 64) -> None:
        self._session = session
        self.size_bytes = size_bytes
        chunks = [chunk(b"kind %d" % number * 600) for number in range(kinds)]
        self._session.send(chunks)
        common = [self._leaf(record) for record in chunks]
        self.leaves = [common[number % kinds] for number in range(size_bytes // SEGMENT_BYTES)]

    def change(self, segments: Sequence[int]) -> None:
        """New content for some segments."""
        for number in segments:
            record = chunk(b"changed %d" % number * 400)
            self._session.send([record])
            self.leaves[number] = self._leaf(record)

    def snapshot(self, sequence: int) -> None:
        """Make a snapshot of it."""
        nodes = self.leaves
        for level in range(1, level_of(self.size_bytes) + 1):
            groups = [nodes[start : start + FANOUT] for start in range(0, len(nodes), FANOUT)]
            records = {record.id: record for record in (inner(level, group) for group in groups)}
            self._session.send(list(records.values()))
            nodes = [inner(level, group).id for group in groups]
        disk = DiskRecord(DiskName("scsi0"), self.size_bytes, nodes[0])
        manifest = Manifest(ACME, VM, TIME_MS + sequence, sequence, (disk,))
        self._session.adopt(encode_manifest(manifest)[0])

    def _leaf(self, record: Record) -> BlobId:
        leaf = full_leaf(record)
        self._session.send([leaf])
        return leaf.id


def measured(pair: Pair, round_trip_s: float = 0) -> tuple[SyncReport, Cost, Cost]:
    def wait(_operation: str) -> None:
        time.sleep(round_trip_s)

    here, there = WatchedPeer(pair.here.peer, wait), WatchedPeer(pair.there.peer, wait)
    report = sync(here, there, SyncRequest())
    assert report.is_complete
    return report, here.cost, there.cost


@pytest.fixture
def session(pair: Pair) -> PeerSession:
    return pair.here.peer.open_session(ACME, VM)


def test_a_tebibyte_with_nothing_to_do(pair: Pair, session: PeerSession) -> None:
    disk = LargeDisk(session, TiB)
    disk.snapshot(1)
    measured(pair)
    _, here, there = measured(pair)
    assert here.round_trips + there.round_trips <= 4
    # Another snapshot of the same disk: there is nothing to send but its manifest.
    disk.snapshot(2)
    report, here, there = measured(pair)
    assert report.total.blobs == 0
    assert here.round_trips + there.round_trips <= 10
    assert there.sent_bytes < 2000
    session.finish()


def test_a_change_of_one_percent_sends_little_more_than_it_took(pair: Pair) -> None:
    """Questions included; scattered, which is the worst case."""
    disk = disk_bytes(1, 16 * SEGMENT_BLOCKS)
    pair.here.backup({"scsi0": disk})
    measured(pair)
    for day in range(2):
        disk = changed(disk, day, len(disk) // BLOCK_BYTES // 100)
        added = pair.here.backup({"scsi0": disk}).manifest.stats.new_stored_bytes
        report, _, there = measured(pair)
        assert report.total.stored_bytes == added
        assert there.sent_bytes <= 1.1 * added


def test_only_the_way_down_to_a_change_is_walked(pair: Pair, session: PeerSession) -> None:
    disk = LargeDisk(session, TiB)
    disk.snapshot(1)
    measured(pair)
    disk.change([5, 6, 100_000])
    disk.snapshot(2)
    report, here, there = measured(pair)
    assert (report.total.chunks, report.total.nodes) == (3, 3 + 2 + 2 + 1)
    assert sum(here.fetched.values()) == report.total.blobs
    assert here.round_trips + there.round_trips < 40
    session.finish()


def test_a_first_copy_asks_about_many_at_once(pair: Pair, session: PeerSession) -> None:
    disk = LargeDisk(session, 16 * GiB, kinds=4096)
    disk.snapshot(1)
    # What comes in meanwhile is asked about together, so the line has to be slower than the threads.
    report, here, there = measured(pair, round_trip_s=0.05)
    assert report.total.chunks == 4096
    assert here.round_trips + there.round_trips < 8192 // 16
    session.finish()


def test_zero_is_never_asked_about(pair: Pair, session: PeerSession) -> None:
    disk = DiskRecord(DiskName("scsi0"), TiB, ZERO_ID)
    session.adopt(encode_manifest(Manifest(ACME, VM, TIME_MS, 1, (disk,)))[0])
    session.finish()
    _, here, there = measured(pair)
    assert (here.requests["fetch"], there.requests["missing"]) == (0, 0)
    assert pair.here.ids == pair.there.ids
