"""Copying snapshots between two repositories in folders."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.errors import DataDamage, ServerUnreachable, SnapshotConflict, SnapshotNotFound, UsageError
from casbackup.ids import DiskName
from casbackup.jobs.ratelimit import BytesPerSecond
from casbackup.jobs.sync import SyncRequest, sync
from casbackup.jobs.sync_report import SyncReport
from casbackup.limits import SEGMENT_BYTES
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import DiskRecord, Manifest, encode_manifest
from casbackup.spec.record import HEADER_BYTES
from casbackup.testing.peer import chunk, full_leaf, inner
from casbackup.testing.world import VM, changed, disk_bytes, inline
from tests.sync.conftest import ACME, DISK, OTHER_VM, Pair, Site
from tests.sync.peers import WatchedPeer, breaking_after


def outcomes(report: SyncReport) -> list[str]:
    return [result.outcome.value for result in report.results]


def history(place: Site, days: int, **fields: object) -> list[Snapshot]:
    """Snapshots of a disk of which a little changes each day, and of a config that stays."""
    disk, made = DISK, []
    for day in range(days):
        made.append(place.backup({"scsi0": disk, "vm.conf": b"name: web\n"}, **fields))  # type: ignore[arg-type]
        disk = changed(disk, day, 10)
    return made


# --- copies


def test_a_copy_is_the_same_snapshot(pair: Pair) -> None:
    made = history(pair.here, 3)
    report = pair.sync()
    assert outcomes(report) == ["copied"] * 3
    assert report.is_complete
    assert report.proof is not None
    assert report.proof.equal
    assert pair.there.repository.catalog.all() == made
    pair.require_equal()
    assert pair.there.repository.sessions.all() == []


def test_a_second_sync_does_nothing(pair: Pair) -> None:
    history(pair.here, 2)
    pair.sync()
    before = [info.size_bytes for info in pair.there.repository.store.storage.list()]
    report = pair.sync()
    assert outcomes(report) == ["present"] * 2
    assert report.total.stored_bytes == 0
    assert [info.size_bytes for info in pair.there.repository.store.storage.list()] == before


def test_only_what_is_missing_is_sent(pair: Pair) -> None:
    first, second = history(pair.here, 2)
    pair.sync(last=None, since_ms=None, vms=("vm/100",))
    third = pair.here.backup({"scsi0": changed(DISK, 99, 5), "vm.conf": b"name: web\n"})
    report = pair.sync()
    assert outcomes(report) == ["present", "present", "copied"]
    assert 0 < report.total.stored_bytes <= third.manifest.stats.new_stored_bytes
    assert first.id != second.id
    pair.require_equal()


def test_nothing_is_sent_twice(pair: Pair) -> None:
    """Chunks that occur many times, in several leaves, disks and snapshots that are copied at once."""
    disk = disk_bytes(5, 600) * 4
    for vm in (VM, OTHER_VM):
        pair.here.backup({"scsi0": disk, "scsi1": disk[: 4096 * 1024], "a.conf": b"x", "b.conf": b"x"}, vm)
    there = WatchedPeer(pair.there.peer)
    here = WatchedPeer(pair.here.peer)
    report = sync(here, there, SyncRequest())
    assert max(there.cost.sent.values()) == 1
    assert max(here.cost.fetched.values()) == 1
    assert report.total.blobs == len(there.cost.sent)
    pair.require_equal()


@pytest.mark.parametrize(
    "content",
    [
        {"scsi0": bytes(5000)},
        {"scsi0": b""},
        {"scsi0": b"x"},
        {"vm.conf": b"only a config"},
        {"scsi0": disk_bytes(1, 1024)},
        {"scsi0": disk_bytes(1, 1025), "scsi1": disk_bytes(1, 1025)},
    ],
    ids=["zeros", "empty", "one byte", "config", "one segment", "twice the same"],
)
def test_odd_snapshots(pair: Pair, content: dict[str, bytes]) -> None:
    pair.here.backup(content)
    assert outcomes(pair.sync()) == ["copied"]
    pair.require_equal()


def test_both_directions_make_both_the_same(pair: Pair) -> None:
    pair.there.clock.pass_time(30)
    history(pair.here, 2)
    history(pair.there, 3, vm=OTHER_VM)
    pair.there.backup({"scsi0": changed(DISK, 5, 5)})
    assert pair.sync().is_complete
    assert pair.sync(back=True).is_complete
    pair.require_equal()
    assert len(pair.here.ids) == 6


def test_older_snapshots_are_copied_later(pair: Pair) -> None:
    made = history(pair.here, 5)
    pair.sync(last=2)
    assert pair.there.ids == [s.id for s in made[3:]]
    pair.sync()
    assert pair.there.ids == [s.id for s in made]
    pair.require_equal()


def test_copies_among_own_newer_snapshots(pair: Pair) -> None:
    """The other site went on by itself: numbers of copies are as they were, own ones go on after the highest."""
    old = history(pair.here, 3)
    pair.sync(last=1)
    pair.there.clock.pass_time(3600)
    own = pair.there.backup({"scsi0": changed(DISK, 7, 3)})
    assert (own.manifest.sequence, own.manifest.parent) == (4, old[2].id)
    pair.sync()
    assert pair.there.ids == [s.id for s in [*old, own]]
    assert pair.there.peer.find("vm/100", own.manifest.namespace).id == own.id
    pair.sync(back=True)
    pair.require_equal()


def test_another_way_of_cutting_does_not_matter(pair: Pair, other_chunks: Site) -> None:
    history(other_chunks, 2)
    pair = Pair(other_chunks, pair.there)
    assert pair.sync().is_complete
    pair.require_equal()
    pair.there.clock.jump(7200)
    pair.there.backup({"scsi0": DISK})
    pair.sync(back=True)
    pair.require_equal()


def test_three_hundred_snapshots(pair: Pair) -> None:
    """A long history, of which each day changes one of a hundred segments."""
    source = pair.here.peer
    session = source.open_session(ACME, VM)
    records = [chunk(b"%d" % number * 4096) for number in range(400)]
    leaves = [full_leaf(record) for record in records]
    session.send([*records, *leaves])
    for day in range(300):
        root = inner(1, [leaf.id for leaf in leaves[day : day + 100]])
        session.send([root])
        disk = DiskRecord(DiskName("scsi0"), 100 * SEGMENT_BYTES, root.id)
        vm = (VM, OTHER_VM)[day % 2]
        session.adopt(encode_manifest(Manifest(ACME, vm, day, day + 1, (disk,)))[0])
    session.finish()
    report = pair.sync()
    assert outcomes(report) == ["copied"] * 300
    assert report.proof is not None
    assert report.proof.equal
    assert report.total.nodes == 399 + 300
    assert pair.here.ids == pair.there.ids
    pair.there.require_sound()


def test_a_manifest_with_keys_of_a_newer_version_stays_as_it_is(pair: Pair) -> None:
    """Unknown keys are ignored, but they are part of the id."""
    snapshot = pair.here.backup({"scsi0": DISK})
    data, _ = encode_manifest(snapshot.manifest)
    import msgpack
    from blake3 import blake3

    body = msgpack.unpackb(data[16:-32])
    body["from_the_future"] = [1, 2, 3]
    packed = msgpack.packb(body)
    head = data[:12] + len(packed).to_bytes(4, "little") + packed
    newer = head + blake3(head).digest()
    session = pair.here.peer.open_session(snapshot.manifest.namespace, VM)
    pair.here.peer.remove([snapshot])
    foreign = session.adopt(newer)
    session.finish()
    assert foreign.id == blake3(newer).hexdigest() != snapshot.id
    pair.sync()
    (copy,) = pair.there.repository.catalog.all()
    assert copy.id == foreign.id
    assert pair.there.peer.manifest(copy) == newer


# --- pins, labels, notes


def test_pins_labels_and_notes_come_along(pair: Pair) -> None:
    (made,) = history(pair.here, 1)
    made = pair.here.peer.annotate(made, pinned=True, labels=("keep", "x:y"), notes="before the upgrade")
    pair.sync()
    assert pair.there.repository.catalog.all() == [made]
    report = pair.sync()
    assert report.changed == ()


def test_later_changes_follow(pair: Pair) -> None:
    first, second = history(pair.here, 2)
    pair.sync()
    first = pair.here.peer.annotate(first, pinned=True, notes="now pinned")
    report = pair.sync()
    assert [s.id for s in report.changed] == [first.id]
    copies = {s.id: s for s in pair.there.repository.catalog.all()}
    assert (copies[first.id].pinned, copies[first.id].notes) == (True, "now pinned")
    assert not copies[second.id].pinned


def test_a_pin_is_only_taken_away_by_a_mirroring(pair: Pair) -> None:
    history(pair.here, 1)
    pair.sync()
    (copy,) = pair.there.repository.catalog.all()
    pair.there.peer.annotate(copy, pinned=True)
    pair.sync()
    assert pair.there.repository.catalog.all()[0].pinned
    pair.sync(mirror=True)
    assert not pair.there.repository.catalog.all()[0].pinned


# --- which ones


@pytest.fixture
def varied(pair: Pair) -> Pair:
    for day, (vm, namespace) in enumerate([(VM, None), (OTHER_VM, None), (VM, ACME), (VM, None), (OTHER_VM, ACME)]):
        fields: dict[str, object] = {"labels": ("odd",)} if day % 2 else {}
        if namespace:
            fields["namespace"] = namespace
        pair.here.backup({"scsi0": changed(DISK, day, 5)}, vm, **fields)
    return pair


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, 5),
        ({"namespaces": ("acme/*",)}, 2),
        ({"namespaces": ("default",)}, 3),
        ({"vms": ("vm/1*",)}, 3),
        ({"vms": ("vm/100", "vm/web01")}, 5),
        ({"namespaces": ("default",), "vms": ("vm/100",)}, 2),
        ({"labels": ("odd",)}, 2),
        ({"last": 1}, 4),
        ({"last": 1, "labels": ("odd",)}, 2),
        ({"vms": ("vm/none",)}, 0),
    ],
)
def test_filters(varied: Pair, chosen: dict[str, object], expected: int) -> None:
    report = varied.sync(**chosen)
    assert len(report.results) == len(varied.there.ids) == expected
    assert report.proof is not None
    assert report.proof.equal
    varied.there.require_sound()


def test_since(varied: Pair) -> None:
    times = sorted(s.manifest.time_ms for s in varied.here.repository.catalog.all())
    assert len(varied.sync(since_ms=times[2]).results) == 3


# --- mirror


def test_nothing_is_removed_without_being_asked(pair: Pair) -> None:
    made = history(pair.here, 3)
    pair.sync()
    pair.here.peer.remove(made[:2])
    pair.sync()
    assert len(pair.there.ids) == 3


def test_a_mirror_loses_what_the_source_lost(pair: Pair) -> None:
    made = history(pair.here, 4)
    pair.sync()
    pinned = next(s for s in pair.there.repository.catalog.all() if s.id == made[1].id)
    pair.there.peer.annotate(pinned, pinned=True)
    other = pair.there.backup({"scsi0": DISK}, OTHER_VM)
    pair.here.peer.remove(made[:3])
    planned = pair.sync(mirror=True, dry_run=True, vms=("vm/100",))
    assert len(pair.there.ids) == 5
    report = pair.sync(mirror=True, vms=("vm/100",))
    assert planned.removed == report.removed
    assert {s.id for s in report.removed} == {made[0].id, made[2].id}
    assert [s.id for s in report.spared] == [made[1].id]
    assert set(pair.there.ids) == {made[1].id, made[3].id, other.id}


def test_a_mirror_of_the_last_ones_keeps_what_the_source_still_has(pair: Pair) -> None:
    history(pair.here, 4)
    pair.sync()
    assert pair.sync(mirror=True, last=1).removed == ()


def test_nothing_is_never_mirrored(pair: Pair) -> None:
    made = history(pair.here, 1)
    pair.sync()
    pair.here.peer.remove(made)
    with pytest.raises(UsageError, match="mirroring"):
        pair.sync(mirror=True)
    assert len(pair.there.ids) == 1


def test_a_mirroring_that_fails_removes_nothing(pair: Pair) -> None:
    made = history(pair.here, 2)
    pair.sync()
    pair.here.peer.remove(made[:1])
    lost = pair.here.backup({"scsi0": disk_bytes(77, 50)})
    damage(pair.here, lost)
    report = pair.sync(mirror=True)
    assert not report.is_complete
    assert report.removed == ()
    assert len(pair.there.ids) == 2


# --- dry run


def test_a_dry_run_says_what_would_be_sent(pair: Pair) -> None:
    history(pair.here, 3)
    report = pair.sync(dry_run=True)
    assert pair.there.ids == []
    assert pair.there.repository.sessions.all() == []
    assert list(pair.there.repository.store.storage.list()) == []
    assert outcomes(report) == ["planned"] * 3
    done = pair.sync()
    assert (report.total.chunks, report.total.nodes) == (done.total.chunks, done.total.nodes)
    # Random data does not compress; each chunk has a header besides.
    headers = HEADER_BYTES * done.total.chunks
    assert 0.99 < (report.total.stored_bytes + headers) / done.total.stored_bytes < 1.01


def test_a_dry_run_fetches_no_chunks(pair: Pair) -> None:
    history(pair.here, 3)
    here = WatchedPeer(pair.here.peer)
    report = sync(here, pair.there.peer, SyncRequest(dry_run=True))
    assert len(here.cost.fetched) == report.total.nodes


# --- what goes wrong


def damage(place: Site, snapshot: Snapshot, *, what: str = "chunk") -> None:
    """Flip a byte of a blob that only this snapshot needs."""
    repository = place.repository
    others = {b for s in repository.catalog.all() if s.id != snapshot.id for b in blobs_of(place, s)}
    kinds = {"chunk": 1, "node": 2, "config": 3}
    own = [b for b in blobs_of(place, snapshot) if b not in others]
    entries = repository.store.entries(own)
    entry = next(entry for entry in entries.values() if entry.kind == kinds[what])
    pack = repository.store.pack_rows()[entry.pack].pack
    path = next(Path(repository.layout.packs).rglob(f"{pack}.pack"))
    content = bytearray(path.read_bytes())
    content[entry.offset + HEADER_BYTES + entry.stored_length // 2] ^= 1
    path.write_bytes(content)
    repository.store.storage.close()


def blobs_of(place: Site, snapshot: Snapshot) -> set[bytes]:
    from casbackup.repository.damage import DamageMap

    return set(DamageMap(place.repository, ()).named([snapshot]))


@pytest.mark.parametrize("what", ["chunk", "node", "config"])
def test_damage_is_not_spread_and_only_its_snapshot_fails(pair: Pair, what: str) -> None:
    disk = DISK
    for day in range(3):
        pair.here.backup({"scsi0": disk, "vm.conf": b"day %d" % day})
        disk = changed(disk, day, 10)
    made = pair.here.repository.catalog.all()
    damage(pair.here, made[1], what=what)
    report = pair.sync()
    assert outcomes(report) == ["copied", "failed", "copied"]
    (failed,) = report.failed
    assert isinstance(failed.error, DataDamage)
    assert not report.is_complete
    assert report.proof is not None
    assert not report.proof.equal
    assert pair.there.ids == [made[0].id, made[2].id]
    pair.there.require_sound()
    if what != "config":
        assert outcomes(pair.sync()) == ["present", "failed", "present"]


def test_damage_in_what_is_not_sent_does_not_matter(pair: Pair) -> None:
    made = history(pair.here, 2)
    pair.sync(last=1)
    (chunk_id,) = list(blobs_of(pair.there, made[1]) & blobs_of(pair.here, made[0]))[:1]
    entry = pair.here.repository.store.entries([chunk_id])[chunk_id]  # type: ignore[list-item, index]
    pack = pair.here.repository.store.pack_rows()[entry.pack].pack
    path = next(Path(pair.here.repository.layout.packs).rglob(f"{pack}.pack"))
    content = bytearray(path.read_bytes())
    content[entry.offset + HEADER_BYTES] ^= 1
    path.write_bytes(content)
    pair.here.repository.store.storage.close()
    assert pair.sync().is_complete
    pair.there.require_sound()


def test_a_record_with_a_wrong_header_is_damage(pair: Pair) -> None:
    """Its content is right, but what is copied as it is must pass the destination's check as well."""
    (made,) = history(pair.here, 1)
    entries = pair.here.repository.store.entries(blobs_of(pair.here, made))  # type: ignore[arg-type]
    entry = next(entry for entry in entries.values() if entry.kind == 1)
    pack = pair.here.repository.store.pack_rows()[entry.pack].pack
    path = next(Path(pair.here.repository.layout.packs).rglob(f"{pack}.pack"))
    content = bytearray(path.read_bytes())
    content[entry.offset + HEADER_BYTES - 1] ^= 1  # the checksum's last byte
    path.write_bytes(content)
    pair.here.repository.store.storage.close()
    assert outcomes(pair.sync()) == ["failed"]
    assert pair.there.ids == []
    pair.there.require_sound()


def test_a_damaged_manifest_is_reported(pair: Pair) -> None:
    made = history(pair.here, 2)
    path = Path(pair.here.repository.layout.manifest(made[0].key))
    path.write_bytes(b"?" + path.read_bytes()[1:])
    forget_copies(pair.here)
    report = pair.sync()
    assert [str(damage) for damage in report.unreadable] != []
    assert not report.is_complete
    assert pair.there.ids == [made[1].id]
    with pytest.raises(UsageError, match="cannot be read"):
        pair.sync(mirror=True)


def forget_copies(place: Site) -> None:
    """The index's copies of manifests, as after a rebuild."""
    index = place.repository.index
    index.write(lambda txn: txn.drop(index.snapshots, delete=False))


def test_another_snapshot_of_the_same_time(pair: Pair) -> None:
    mine, theirs = pair.here.backup({"scsi0": DISK}), pair.there.backup({"scsi0": disk_bytes(8, 20)})
    assert mine.key == theirs.key
    also = pair.here.backup({"scsi0": changed(DISK, 1, 2)})
    for dry_run in (True, False):
        report = pair.sync(dry_run=dry_run)
        assert outcomes(report) == ["failed", "planned" if dry_run else "copied"]
        assert isinstance(report.failed[0].error, SnapshotConflict)
    assert set(pair.there.ids) == {theirs.id, also.id}
    pair.there.require_sound()


def test_a_snapshot_that_is_forgotten_meanwhile(pair: Pair) -> None:
    first, second = history(pair.here, 2)
    here = WatchedPeer(pair.here.peer)

    def forget(what: str) -> None:
        if what == "reading" and first.id in pair.here.ids:
            pair.here.peer.remove([first])
            pair.here.gc()

    here.before = forget
    with inline():
        report = sync(here, pair.there.peer, SyncRequest())
    assert isinstance(report.failed[0].error, SnapshotNotFound)
    assert pair.there.ids == [second.id]
    pair.there.require_sound()


def test_a_snapshot_that_is_being_copied_stays(pair: Pair) -> None:
    """It is forgotten and a gc runs at the source in the middle of it."""
    (made,) = history(pair.here, 1)
    here = WatchedPeer(pair.here.peer)

    def forget(what: str) -> None:
        if what == "fetch" and made.id in pair.here.ids:
            pair.here.peer.remove([made])
            pair.here.gc()

    here.before = forget
    with inline():
        assert outcomes(sync(here, pair.there.peer, SyncRequest())) == ["copied"]
    pair.there.require_sound()
    pair.here.gc()
    assert list(pair.here.repository.store.storage.list()) == []


# --- interruptions


@pytest.mark.parametrize("which", ["here", "there"])
def test_what_was_acknowledged_is_not_sent_again(pair: Pair, which: str) -> None:
    """The link breaks again and again, later each time. In between there is a gc at the destination."""
    for day in range(3):
        pair.here.backup({"scsi0": disk_bytes(day, 2500)})
    needed = set[bytes]().union(*(blobs_of(pair.here, s) for s in pair.here.repository.catalog.all()))
    sent = breaks = 0
    while True:
        before = breaking_after(4 + breaks)
        here = WatchedPeer(pair.here.peer, before if which == "here" else lambda _: None)
        there = WatchedPeer(pair.there.peer, before if which == "there" else lambda _: None)
        try:
            sync(here, there, SyncRequest())
            break
        except ServerUnreachable:
            breaks += 1
            pair.there.require_sound()
            pair.there.gc()
        finally:
            sent += sum(there.cost.sent.values())
    assert breaks > 2
    assert sent == len(needed)
    pair.require_equal()


def test_a_broken_sync_holds_what_it_stored_for_a_day(pair: Pair) -> None:
    pair.here.backup({"scsi0": disk_bytes(1, 6000)})
    with pytest.raises(ServerUnreachable):
        sync(WatchedPeer(pair.here.peer, breaking_after(6)), pair.there.peer, SyncRequest())
    assert [active for _, active in pair.there.repository.sessions.all()] == [False]
    assert list(pair.there.repository.store.storage.list())
    pair.there.clock.pass_time(25 * 3600)
    pair.there.gc()
    assert list(pair.there.repository.store.storage.list()) == []
    pair.sync()
    pair.require_equal()


# --- others at work


def test_two_syncs_at_once(pair: Pair) -> None:
    """The second runs from beginning to end in the middle of the first, wherever that is."""
    for position in (0, 3, 6, 9, 12, 30):
        pair.here.backup({"scsi0": disk_bytes(position, 2500)})
        happened: list[str] = []

        def before(what: str, position: int = position, happened: list[str] = happened) -> None:
            happened.append(what)
            if len(happened) == position + 1:
                assert pair.sync().is_complete

        report = sync(pair.here.peer, WatchedPeer(pair.there.peer, before), SyncRequest())
        assert report.is_complete
        pair.require_equal()


def test_gc_at_the_destination_whenever_it_may_be(pair: Pair) -> None:
    """What the destination has of the snapshots is garbage there when the sync begins, and a gc runs beside it."""
    with inline():
        for begins in range(8):
            first = history(pair.here, 1)
            pair.sync()
            pair.there.peer.remove(pair.there.repository.catalog.all())
            second = pair.here.backup({"scsi0": changed(DISK, 50 + begins, 4), "vm.conf": b"name: web\n"})
            calls = itertools.count()

            def before(_what: str, begins: int = begins, calls: Iterator[int] = calls) -> None:
                if next(calls) % 8 == begins:
                    pair.there.gc()

            assert sync(pair.here.peer, WatchedPeer(pair.there.peer, before), SyncRequest()).is_complete
            assert {first[0].id, second.id} <= set(pair.there.ids)
            pair.there.gc()
            pair.there.require_sound()
    pair.require_equal()


def test_gc_goes_on_and_on_at_the_destination(pair: Pair) -> None:
    """In a thread of its own, while syncs come and go and what they copied is forgotten again."""
    over = threading.Event()

    def collect() -> None:
        while not over.is_set():
            pair.there.gc()

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for day in range(12):
            pair.here.backup({"scsi0": changed(DISK, day, 20), "scsi1": changed(DISK, day // 2, 5)})
            assert pair.sync().is_complete
            if day % 3 == 1:
                pair.there.peer.remove(pair.there.repository.catalog.all())
    finally:
        over.set()
        collector.join()
    assert pair.sync().is_complete
    pair.require_equal()


@pytest.mark.parametrize("moment", ["send", "adopt"])
def test_a_destination_that_forgot_what_it_vouched_for_is_asked_anew(pair: Pair, moment: str) -> None:
    """As after the restart of a server: the session is resumed, and a gc came in between."""
    history(pair.here, 1)
    pair.sync()
    pair.there.peer.remove(pair.there.repository.catalog.all())
    pair.here.backup({"scsi0": changed(DISK, 50, 4), "vm.conf": b"name: web\n"})
    there = WatchedPeer(pair.there.peer)
    restarts: list[str] = []
    opened = there.open_session

    def open_session(*owner: object) -> object:
        session = opened(*owner)  # type: ignore[arg-type]

        def before(what: str) -> None:
            if what == moment and not restarts:
                restarts.append(what)
                session._session.park()
                pair.there.gc()
                session._session = pair.there.repository.sessions.resume(session.id)

        there.before = before
        return session

    there.open_session = open_session  # type: ignore[method-assign, assignment]
    with inline():
        report = sync(pair.here.peer, there, SyncRequest())
    assert restarts
    assert report.is_complete
    pair.require_equal()


# --- cost


def test_nothing_to_do_costs_two_listings(pair: Pair) -> None:
    history(pair.here, 3)
    pair.sync()
    here, there = WatchedPeer(pair.here.peer), WatchedPeer(pair.there.peer)
    sync(here, there, SyncRequest())
    assert here.cost.round_trips + there.cost.round_trips == 2


def test_progress_ends_at_its_end(pair: Pair) -> None:
    class Recorded:
        def __init__(self) -> None:
            self.total = self.done = self.new = 0

        def start(self, title: str, total_bytes: int | None) -> None:
            self.total = total_bytes or 0

        def advance(self, **counters: int) -> None:
            self.done += counters.get("done", 0)
            self.new += counters.get("new", 0)

        def finish(self) -> None: ...

    disk = disk_bytes(9, 1024) * 5 + bytes(2**23) + disk_bytes(10, 1500, tail=17)
    for day in range(3):
        pair.here.backup({"scsi0": disk, "scsi1": disk, "scsi2": bytes(2**25), "vm.conf": b"x"})
        disk = changed(disk, day, 3)
    progress = Recorded()
    report = sync(pair.here.peer, pair.there.peer, SyncRequest(), progress=progress)
    assert progress.done == progress.total == sum(s.manifest.size_bytes - 1 for s in pair.here.repository.catalog.all())
    assert progress.new == report.total.stored_bytes


def test_a_limit_is_kept(pair: Pair) -> None:
    class FakeStop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            clock[0] += timeout or 0.0
            return False

    waits: list[float] = []
    clock = [0.0]
    limit = BytesPerSecond(1000, monotonic_s=lambda: clock[0])
    stop = FakeStop()
    for _ in range(10):
        limit.pass_on(500, stop)
    assert clock[0] == pytest.approx(5.0)
    clock[0] += 60
    limit.pass_on(500, stop)
    limit.pass_on(1000, stop)
    assert waits[-1] == pytest.approx(1.0), "no more than half a second is made up"


def test_a_limited_sync_takes_its_time(pair: Pair) -> None:
    pair.here.backup({"scsi0": disk_bytes(1, 256)})
    began_s = time.monotonic()
    report = sync(pair.here.peer, pair.there.peer, SyncRequest(), limit=BytesPerSecond(1_000_000))
    assert time.monotonic() - began_s > report.total.stored_bytes / 1_000_000 - 0.6
    pair.require_equal()
