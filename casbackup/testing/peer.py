"""Conformance suite of the Peer port.

    for name, check in PeerConformance(opened).checks():
        check()

``opened()`` returns a context manager that gives a peer of an empty repository. No test framework is needed.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

from casbackup.codec.codec import PLAIN, Codec
from casbackup.errors import (
    BlobMissing,
    ClosureViolation,
    DataDamage,
    ManifestDamaged,
    NodeInvalid,
    SessionBusy,
    SessionNotFound,
    SnapshotAmbiguous,
    SnapshotConflict,
    SnapshotNotFound,
    SnapshotPinned,
)
from casbackup.ids import DEFAULT_NAMESPACE, ZERO_ID, BlobId, DiskName, Namespace, SessionId, SnapshotId, VmName
from casbackup.limits import SEGMENT_BYTES
from casbackup.peer.api import Peer, PeerSession
from casbackup.repository.adoption import Copy
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import ConfigRecord, DiskRecord, Manifest, Sidecar, encode_manifest
from casbackup.spec.node import Extent, encode_inner, encode_leaf, zero_extent
from casbackup.spec.record import BlobKind, Record
from casbackup.store.writer import StoredBytes

Opened = Callable[[], AbstractContextManager[Peer]]

VM = VmName("vm/100")
OTHER_VM = VmName("vm/web01")
TIME_MS = 1_795_000_000_000
_LEVEL = 2


class PeerConformance:
    """All the checks of one implementation."""

    def __init__(
        self, opened: Opened, codec: Codec = PLAIN, sealed: Callable[[Manifest], Manifest] = lambda manifest: manifest
    ) -> None:
        """``codec``: how the peer's blobs are made. ``sealed``: what another repository's manifest is made of."""
        self._opened = opened
        self._make = BlobMaker(codec)
        self._sealed = sealed

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name and function of each check."""
        for name in sorted(dir(self)):
            if name.startswith("check_"):
                yield name.removeprefix("check_"), getattr(self, name)

    def run(self) -> None:
        """All checks, one after the other."""
        for _name, check in self.checks():
            check()

    def _copy(self, manifest: Manifest) -> tuple[bytes, SnapshotId]:
        return encode_manifest(self._sealed(manifest))

    # --- storing

    def check_everything_is_missing_at_first(self) -> None:
        with self._opened() as peer:
            ids = [self._make.chunk(b"a").id, self._make.chunk(b"b").id]
            session = _session(peer)
            assert session.missing(ids) == set(ids)
            assert session.missing([]) == set()
            session.abort()

    def check_what_was_sent_is_not_missing(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            a, b, c = (
                self._make.chunk(b"a" * 5000),
                self._make.chunk(random.Random(1).randbytes(5000)),
                self._make.chunk(b"c"),
            )
            session.send([a, b])
            assert session.missing([a.id, b.id, c.id]) == {c.id}
            session.flush()
            assert session.missing([a.id, b.id, c.id]) == {c.id}
            session.abort()

    def check_sending_counts_what_is_new(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            a, b = self._make.chunk(b"a" * 5000), self._make.chunk(random.Random(1).randbytes(5000))
            first = session.send([a, b])
            assert (first.blobs, first.plain_bytes) == (2, 10_000)
            assert first.stored_bytes == a.total_bytes + b.total_bytes
            again = session.send([b, a])
            assert (again.blobs, again.plain_bytes, again.stored_bytes) == (0, 0, 0)
            session.abort()

    def check_flushed_blobs_are_there_for_other_sessions(self) -> None:
        with self._opened() as peer:
            one, two = _session(peer), _session(peer)
            record = self._make.chunk(b"shared")
            one.send([record])
            one.flush()
            assert two.missing([record.id]) == set()
            one.abort()
            two.abort()

    def check_two_sessions_send_the_same(self) -> None:
        with self._opened() as peer:
            one, two = _session(peer), _session(peer)
            records = [self._make.chunk(b"%d" % n * 1000) for n in range(10)]
            records.append(self._make.leaf([Extent(4000, 0, r.id) for r in records[:1]], 1000))
            one.send(records)
            two.send(records)
            assert two.missing([r.id for r in records]) == set()
            one.commit(_manifest([("a", 1000, records[-1].id)]))
            two.commit(_manifest([("a", 1000, records[-1].id)], vm=OTHER_VM))
            assert all(isinstance(r, Record) for _, r in peer.fetch([r.id for r in records]))

    def check_sending_from_several_threads(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            records = [self._make.chunk(random.Random(n).randbytes(3000)) for n in range(200)]
            counts: list[int] = []

            def send(part: Sequence[Record]) -> None:
                counts.append(sum(session.send([record]).blobs for record in part))
                assert session.missing([r.id for r in part]) == set()

            threads = [threading.Thread(target=send, args=(records[n * 30 : n * 30 + 80],)) for n in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            session.flush()
            assert sum(counts) == 200
            assert {blob for blob, record in _fetched(peer, records)} == {r.id for r in records}
            session.abort()

    def check_sending_without_waiting(self) -> None:
        """Counts are exact once settled, children come before nodes, and what is under way is not missing."""
        with self._opened() as peer:
            session = _session(peer)
            records = [self._make.chunk(random.Random(n).randbytes(9000)) for n in range(300)]
            counts: list[StoredBytes] = []
            for start in range(0, 300, 10):
                part = records[start : start + 10]
                session.send_soon(part, counts.append)
                session.send_soon([self._make.leaf([Extent(9000, 0, r.id) for r in part])], counts.append)
                assert session.missing([r.id for r in part]) == set()
            session.send_soon(records[:10], counts.append)
            session.send_soon([], counts.append)
            session.settle()
            assert len(counts) == 62
            assert sum(c.blobs for c in counts) == 330
            assert sum(c.plain_bytes for c in counts if c.blobs == 10) == 300 * 9000
            session.flush()
            assert len(_fetched(peer, records)) == 300
            session.abort()

    def check_a_bad_node_sent_without_waiting_is_told_at_last(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            bad = self._make.leaf([Extent(4096, 0, self._make.chunk(b"never sent").id)])

            def send() -> None:
                session.send_soon([bad], lambda _: None)
                session.flush()

            assert _raises(ClosureViolation, send)
            session.abort()

    def check_a_leaf_is_asked_for_with_its_chunks(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            a, b = self._make.chunk(b"a" * 4096), self._make.chunk(b"b" * 4096)
            node = self._make.leaf([Extent(4096, 0, a.id), Extent(4096, 0, b.id)])
            session.send([a])
            assert session.missing_leaf(node.id, [a.id, b.id]) == {node.id, b.id}
            session.send([b, node])
            assert session.missing_leaf(node.id, [a.id, b.id]) == set()
            session.abort()

    # --- closure

    def check_a_leaf_of_unknown_chunks_is_refused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            known, unknown = self._make.chunk(b"k" * 4096), self._make.chunk(b"u" * 4096)
            session.send([known])
            bad = self._make.leaf([Extent(4096, 0, known.id), Extent(4096, 0, unknown.id)])
            assert _raises(ClosureViolation, lambda: session.send([bad]))
            assert session.missing([bad.id]) == {bad.id}
            session.send([unknown, bad])
            assert session.missing([bad.id]) == set()
            session.abort()

    def check_a_slice_beyond_the_end_of_its_chunk_is_refused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            record = self._make.chunk(b"k" * 4096)
            session.send([record])
            assert _raises(ClosureViolation, lambda: session.send([self._make.leaf([Extent(4096, 1, record.id)])]))
            session.flush()
            assert _raises(ClosureViolation, lambda: session.send([self._make.leaf([Extent(4097, 0, record.id)])]))
            session.send([self._make.leaf([Extent(4095, 1, record.id)])])
            session.abort()

    def check_an_inner_node_of_unknown_children_is_refused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            record = self._make.chunk(b"k" * 4096)
            child = self._make.full_leaf(record)
            bad = self._make.inner(1, [ZERO_ID, child.id])
            session.send([record])
            assert _raises(ClosureViolation, lambda: session.send([bad]))
            session.send([child, bad])
            session.abort()

    def check_kinds_are_not_confused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            record = self._make.chunk(b"k" * 4096)
            child = self._make.full_leaf(record)
            session.send([record, child])
            assert _raises(ClosureViolation, lambda: session.send([self._make.inner(1, [record.id])]))
            assert _raises(ClosureViolation, lambda: session.send([self._make.leaf([Extent(40, 0, child.id)])]))
            session.abort()

    def check_a_node_with_a_wrong_id_is_refused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            record = self._make.chunk(b"k" * 4096)
            session.send([record])
            right, other = self._make.full_leaf(record), self._make.leaf([Extent(4096, 0, record.id)])
            wrong = right._replace(id=other.id)
            assert _raises(DataDamage, lambda: session.send([wrong]))
            assert session.missing([other.id]) == {other.id}
            session.abort()

    def check_a_commit_without_its_root_is_refused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            draft = _manifest([("a", 4096, self._make.chunk(b"never sent").id)])
            assert _raises(ClosureViolation, lambda: session.commit(draft))
            assert peer.snapshots() == []
            session.abort()

    def check_a_commit_without_its_config_is_refused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            config = ConfigRecord("qemu.conf", 3, self._make.codec.encode_blob(BlobKind.CONFIG, b"abc", _LEVEL).id)
            assert _raises(ClosureViolation, lambda: session.commit(_manifest([], configs=(config,))))
            session.abort()

    # --- snapshots

    def check_a_snapshot_is_visible_after_its_commit(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            draft = stored_disk(session, b"x" * 4096, make=self._make)
            assert peer.snapshots() == []
            snapshot = session.commit(draft)
            assert peer.snapshots() == [snapshot]
            assert (snapshot.manifest.sequence, snapshot.manifest.parent) == (1, None)
            assert snapshot.manifest.disks == draft.disks

    def check_sequence_and_parent_are_filled_in(self) -> None:
        with self._opened() as peer:
            first = committed(peer, b"1")
            other = committed(peer, b"1", vm=OTHER_VM)
            second = committed(peer, b"2", time_ms=TIME_MS - 10 * 365 * 86_400_000)
            assert (second.manifest.sequence, second.manifest.parent) == (2, first.id)
            assert (other.manifest.sequence, other.manifest.parent) == (1, None)
            assert [s.id for s in peer.snapshots(vm=VM)] == [first.id, second.id]
            assert peer.find("vm/100", DEFAULT_NAMESPACE).id == second.id

    def check_equal_times_are_moved_on(self) -> None:
        with self._opened() as peer:
            times = [committed(peer, b"%d" % n).manifest.time_ms for n in range(4)]
            assert times == [TIME_MS + n for n in range(4)]

    def check_everything_in_a_manifest_comes_back(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            config = self._make.codec.encode_blob(BlobKind.CONFIG, b"name: \xff\0web\n", _LEVEL)
            session.send([config])
            draft = Manifest(
                Namespace("acme/prod"),
                VM,
                TIME_MS,
                0,
                disks=(DiskRecord(DiskName("scsi0"), 3 * SEGMENT_BYTES + 1, ZERO_ID, "/dev/vg/ä"),),
                configs=(ConfigRecord("qemu.conf", 11, config.id),),
                labels=("daily", "a:b"),
                notes="Grüße\n",
                host="host1",
                program="test",
            )
            snapshot = session.commit(draft)
            found = peer.snapshots(Namespace("acme/prod"))[0]
            assert found == snapshot
            assert found.manifest.disks == draft.disks
            assert found.manifest.configs == draft.configs
            assert (found.labels, found.notes) == (draft.labels, draft.notes)
            assert peer.snapshots(DEFAULT_NAMESPACE) == []
            assert dict(_fetched_plain(peer, [config.id])) == {config.id: b"name: \xff\0web\n"}

    def check_listing_by_namespace_and_vm(self) -> None:
        with self._opened() as peer:
            acme = Namespace("acme/prod")
            for number, (namespace, vm) in enumerate(
                [(DEFAULT_NAMESPACE, OTHER_VM), (acme, VM), (DEFAULT_NAMESPACE, VM), (acme, VM)]
            ):
                committed(peer, b"%d" % number, namespace=namespace, vm=vm, time_ms=TIME_MS + number)
            keys = [(s.manifest.namespace, s.manifest.vm, s.manifest.sequence) for s in peer.snapshots()]
            assert keys == [
                (acme, VM, 1),
                (acme, VM, 2),
                (DEFAULT_NAMESPACE, VM, 1),
                (DEFAULT_NAMESPACE, OTHER_VM, 1),
            ]
            assert len(peer.snapshots(acme)) == 2
            assert len(peer.snapshots(vm=VM)) == 3
            assert len(peer.snapshots(acme, OTHER_VM)) == 0

    def check_finding(self) -> None:
        with self._opened() as peer:
            first, second = committed(peer, b"1"), committed(peer, b"2", time_ms=TIME_MS + 60_000)
            stamp = first.reference.partition("@")[2]
            for reference, expected in (
                ("vm/100", second),
                ("vm/100@latest", second),
                (first.reference, first),
                (f"vm/100@{stamp[:19]}Z", first),
                (first.id, first),
                (second.id[:12], second),
                (f"default:vm/100@{second.id[:12]}", second),
            ):
                assert peer.find(reference, DEFAULT_NAMESPACE).id == expected.id, reference
            for reference in ("vm/101", "vm/100@1999-01-01T00:00:00Z", "0000000000000000", "acme:vm/100"):
                find = partial(peer.find, reference, DEFAULT_NAMESPACE)
                assert _raises(SnapshotNotFound, find), reference
            assert _raises(SnapshotAmbiguous, lambda: peer.find(f"vm/100@{stamp[:4]}", DEFAULT_NAMESPACE))

    # --- copies of another repository's snapshots

    def check_a_copy_is_the_same_snapshot(self) -> None:
        with self._opened() as peer:
            own = committed(peer, b"own")
            session = _session(peer)
            draft = stored_disk(session, b"copied", time_ms=TIME_MS - 1, make=self._make)
            manifest, snapshot_id = self._copy(_foreign(draft))
            sidecar = Sidecar(pinned=True, labels=("offsite",), notes="copied")
            copy = session.adopt(manifest, sidecar)
            assert copy.id == snapshot_id
            assert (copy.manifest.sequence, copy.manifest.parent) == (7, "ab" * 32)
            found = {snapshot.id: snapshot for snapshot in peer.snapshots()}
            assert found == {own.id: own, copy.id: copy}
            assert (copy.pinned, copy.labels, copy.notes) == (True, ("offsite",), "copied")
            assert peer.manifest(found[copy.id]) == manifest
            session.finish()
            assert _raises(SessionNotFound, lambda: peer.resume_session(session.id))
            assert {snapshot.id for snapshot in peer.snapshots()} == {own.id, copy.id}

    def check_a_session_adopts_any_number_of_any_vm(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            drafts = [
                stored_disk(session, b"%d" % n, time_ms=TIME_MS - n, vm=(VM, OTHER_VM)[n % 2], make=self._make)
                for n in range(6)
            ]
            copies = [self._copy(_foreign(draft)) for draft in drafts]
            for manifest, _ in copies:
                session.adopt(manifest)
            session.park()
            assert {snapshot.id for snapshot in peer.snapshots()} == {snapshot_id for _, snapshot_id in copies}
            fetched = peer.fetch([draft.disks[0].root for draft in drafts])
            assert all(isinstance(record, Record) for _, record in fetched)

    def check_adopting_twice_changes_nothing(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            manifest, _ = self._copy(_foreign(stored_disk(session, b"copied", make=self._make)))
            first = session.adopt(manifest)
            changed = peer.annotate(first, notes="changed here")
            assert session.adopt(manifest, Sidecar(notes="changed there")) == changed
            assert peer.snapshots() == [changed]
            session.finish()

    def check_the_next_snapshot_follows_the_copy(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            copy = session.adopt(self._copy(_foreign(stored_disk(session, b"copied", make=self._make)))[0])
            session.finish()
            own = committed(peer, b"own", time_ms=TIME_MS - 1000)
            assert (own.manifest.sequence, own.manifest.parent) == (8, copy.id)
            assert peer.find("vm/100", DEFAULT_NAMESPACE).id == own.id

    def check_a_copy_never_takes_the_place_of_another(self) -> None:
        with self._opened() as peer:
            own = committed(peer, b"own")
            session = _session(peer)
            manifest, _ = self._copy(
                _foreign(stored_disk(session, b"copied", time_ms=own.manifest.time_ms, make=self._make))
            )
            assert _raises(SnapshotConflict, lambda: session.adopt(manifest))
            assert peer.snapshots() == [own]
            session.abort()

    def check_a_copy_without_its_data_is_refused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            draft = _foreign(_manifest([("a", 4096, self._make.chunk(b"never sent").id)]))
            assert _raises(ClosureViolation, lambda: session.adopt(self._copy(draft)[0]))
            config = ConfigRecord("qemu.conf", 3, self._make.codec.encode_blob(BlobKind.CONFIG, b"abc", _LEVEL).id)
            draft = _foreign(_manifest([], configs=(config,)))
            assert _raises(ClosureViolation, lambda: session.adopt(self._copy(draft)[0]))
            assert peer.snapshots() == []
            session.abort()

    def check_a_copy_whose_root_does_not_fit_is_refused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            record = self._make.chunk(b"k" * 4096)
            node = self._make.full_leaf(record)
            session.send([record, node])
            for root in (record.id, node.id):
                draft = _foreign(_manifest([("a", 5 * SEGMENT_BYTES, root)]))
                assert _raises(NodeInvalid, partial(session.adopt, self._copy(draft)[0]))
            assert peer.snapshots() == []
            session.abort()

    def check_a_damaged_manifest_is_no_copy(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            manifest, _ = self._copy(_foreign(stored_disk(session, b"copied", make=self._make)))
            for broken in (manifest[:-1], manifest[:40] + b"?" + manifest[41:], b""):
                assert _raises(ManifestDamaged, partial(session.adopt, broken))
            assert peer.snapshots() == []
            session.abort()

    # --- sessions

    def check_pins_labels_and_notes(self) -> None:
        with self._opened() as peer:
            snapshot = committed(peer, b"x" * 4096)
            changed = peer.annotate(snapshot, pinned=True, labels=["a", "b"], notes="Grüße")
            assert (changed.pinned, changed.labels, changed.notes) == (True, ("a", "b"), "Grüße")
            assert peer.snapshots() == [changed]
            assert peer.survey(vm=VM) == ([changed], [])
            assert _raises(SnapshotPinned, lambda: peer.remove([snapshot]))
            assert peer.annotate(changed, pinned=False).labels == ("a", "b")

    def check_removing(self) -> None:
        with self._opened() as peer:
            first, second = committed(peer, b"1"), committed(peer, b"2", time_ms=TIME_MS + 1000)
            peer.remove([first])
            peer.remove([first])
            peer.remove([])
            assert peer.snapshots() == [second]

    def check_what_snapshots_cost(self) -> None:
        with self._opened() as peer:
            one, two = committed(peer, b"1" * 5000), committed(peer, b"2" * 5000, vm=OTHER_VM)
            report = peer.usage([[one], [one, two], []])
            assert [group.logical_bytes for group in report.groups] == [5000, 10_000, 0]
            assert report.groups[0].unique_bytes == report.groups[0].stored_bytes > 0
            assert report.total.stored_bytes == report.groups[1].stored_bytes
            assert report.packs_bytes > 0 < report.index_bytes

    def check_ended_sessions_have_ended(self) -> None:
        with self._opened() as peer:
            gone, done = _session(peer), _session(peer)
            gone.send([self._make.chunk(b"x")])
            gone.abort()
            gone.abort()
            done.commit(_manifest([]))
            done.park()
            for session in (gone, done):
                assert _raises(SessionNotFound, partial(session.commit, _manifest([])))
                assert _raises(SessionNotFound, partial(peer.resume_session, session.id))
            assert _raises(SessionNotFound, lambda: peer.resume_session(SessionId("0" * 32)))

    def check_several_copies_are_adopted_up_to_the_first_that_is_refused(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            content = stored_disk(session, b"copied" * 1000, make=self._make)
            made = [self._copy(_foreign(replace(content, time_ms=TIME_MS + n))) for n in range(71)]
            *copies, more = [Copy(manifest, Sidecar(pinned=True)) for manifest, _ in made]
            adopted = [item for item in session.adopt_all(copies) if isinstance(item, Snapshot)]
            assert [(item.id, item.pinned) for item in adopted] == [(made_id, True) for _, made_id in made[:70]]
            assert session.adopt_all([]) == []
            bad = _foreign(_manifest([("a", 4096, self._make.chunk(b"never sent").id)]))
            results = session.adopt_all([copies[0], Copy(self._copy(bad)[0]), more])
            assert [type(item) for item in results] == [Snapshot, ClosureViolation]
            assert {item.id for item in peer.snapshots()} == {item.id for item in adopted}
            session.finish()

    def check_a_parked_session_goes_on(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            draft = stored_disk(session, b"resumed" * 1000, make=self._make)
            session.flush()
            session.park()
            again = peer.resume_session(session.id)
            assert again.id == session.id
            assert again.missing([draft.disks[0].root]) == set()
            assert again.commit(draft).manifest.disks == draft.disks

    def check_a_session_has_one_user(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            users = [session]
            with contextlib.suppress(SessionBusy):
                users.append(peer.resume_session(session.id))
            unknown = self._make.chunk(b"unknown").id
            assert [_raises(SessionBusy, partial(user.missing, [unknown])) for user in users] in (
                [False],
                [True, False],
            )
            users[-1].park()
            peer.resume_session(session.id).abort()

    # --- reading

    def check_fetching(self) -> None:
        with self._opened() as peer:
            session = _session(peer)
            plain = {
                self._make.chunk(p).id: p for p in (random.Random(n).randbytes(1 + n * 37 % 9000) for n in range(1500))
            }
            session.send([self._make.chunk(p) for p in plain.values()])
            session.flush()
            unknown = self._make.chunk(b"unknown").id
            found = dict(peer.fetch([*plain, unknown]))
            assert isinstance(found.pop(unknown), BlobMissing)
            assert {i: bytes(self._make.codec.decode(r)) for i, r in found.items() if isinstance(r, Record)} == plain
            assert list(peer.fetch([])) == []
            session.abort()

    def check_reading_keeps_nothing_from_working(self) -> None:
        with self._opened() as peer:
            snapshot = committed(peer, b"x" * 4096)
            with peer.reading(snapshot), peer.reading(snapshot):
                assert _fetched_plain(peer, [snapshot.manifest.disks[0].root])
                committed(peer, b"y" * 4096)
            assert len(peer.snapshots()) == 2


class BlobMaker:
    """Records of small blobs."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def chunk(self, plain: bytes) -> Record:
        return self.codec.encode_blob(BlobKind.CHUNK, plain, _LEVEL)

    def leaf(self, extents: Sequence[Extent], span: int | None = None) -> Record:
        """The leaf of these extents; with ``span``, only of their first bytes."""
        if span is not None:
            extents = [extents[0]._replace(length=span)]
        return self.codec.encode_blob(BlobKind.NODE, encode_leaf(extents), _LEVEL)

    def full_leaf(self, record: Record) -> Record:
        """A leaf of a whole segment: the chunk, and zeros."""
        return self.leaf([Extent(record.plain_length, 0, record.id), zero_extent(SEGMENT_BYTES - record.plain_length)])

    def inner(self, level: int, children: Sequence[BlobId]) -> Record:
        return self.codec.encode_blob(BlobKind.NODE, encode_inner(level, children), _LEVEL)


_PLAIN = BlobMaker(PLAIN)
chunk, leaf, full_leaf, inner = _PLAIN.chunk, _PLAIN.leaf, _PLAIN.full_leaf, _PLAIN.inner


def stored_disk(session: PeerSession, content: bytes, *, make: BlobMaker = _PLAIN, **fields: object) -> Manifest:
    """Send a disk of one chunk, and give the draft of its snapshot."""
    record = make.chunk(content)
    node = make.leaf([Extent(len(content), 0, record.id)])
    session.send([record, node])
    return _manifest([("scsi0", len(content), node.id)], **fields)


def committed(
    peer: Peer,
    content: bytes,
    *,
    vm: VmName = VM,
    namespace: Namespace = DEFAULT_NAMESPACE,
    time_ms: int = TIME_MS,
) -> Snapshot:
    """A snapshot of a disk of one chunk."""
    session = peer.open_session(namespace, vm)
    draft = stored_disk(session, content, make=BlobMaker(peer.codec), vm=vm, namespace=namespace, time_ms=time_ms)
    return session.commit(draft)


def _foreign(draft: Manifest) -> Manifest:
    """The draft as another repository committed it."""
    return replace(draft, sequence=7, parent=SnapshotId("ab" * 32))


def _manifest(disks: Sequence[tuple[str, int, BlobId]], **fields: object) -> Manifest:
    values: dict[str, object] = {
        "namespace": DEFAULT_NAMESPACE,
        "vm": VM,
        "time_ms": TIME_MS,
        "sequence": 0,
        "disks": tuple(DiskRecord(DiskName(name), size, root) for name, size, root in disks),
    }
    return Manifest(**{**values, **fields})  # type: ignore[arg-type]


def _session(peer: Peer) -> PeerSession:
    return peer.open_session(DEFAULT_NAMESPACE, VM)


def _fetched(peer: Peer, records: Sequence[Record]) -> list[tuple[BlobId, Record]]:
    return [(i, r) for i, r in peer.fetch([record.id for record in records]) if isinstance(r, Record)]


def _fetched_plain(peer: Peer, ids: Sequence[BlobId]) -> list[tuple[BlobId, bytes]]:
    return [(i, bytes(peer.codec.decode(r))) for i, r in peer.fetch(ids) if isinstance(r, Record)]


def _raises(kind: type[Exception], action: Callable[[], object]) -> bool:
    try:
        action()
    except kind:
        return True
    return False
