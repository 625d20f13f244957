"""Copying to a repository with another key, or from or to one that is not encrypted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from casbackup.codec.master_key import MasterKey
from casbackup.errors import KeyMissing, ManifestForged, SnapshotConflict, UsageError
from casbackup.ids import ZERO_ID, Namespace, SnapshotId
from casbackup.jobs import rekey as module
from casbackup.jobs.rekey import RekeyCost, RekeyReport, rekey
from casbackup.jobs.sync import SyncRequest
from casbackup.jobs.sync_plan import SnapshotFilter
from casbackup.jobs.sync_report import Outcome
from casbackup.peer.api import Peer
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import (
    ArchivedDisk,
    ArchiveOrigin,
    LiveOrigin,
    Manifest,
    MissingRange,
    encode_manifest,
)
from casbackup.testing.world import changed, restored

from .conftest import DISK, OTHER_VM, SealedSite, Site, sealed_site, site
from .peers import WatchedPeer, breaking_after

KEY, OTHER_KEY = MasterKey(bytes(range(32))), MasterKey(bytes(32))
CONTENT = {"scsi0": DISK, "scsi1": bytes(9 * 2**20) + b"x" * 512, "vm.conf": b"memory: 512\n"}


@dataclass
class Ends:
    here: Site
    there: Site

    @property
    def source(self) -> Peer:
        return _opened(self.here)

    @property
    def destination(self) -> Peer:
        return _opened(self.there)

    def rekey(self, *, mirror: bool = False, dry_run: bool = False, **chosen: object) -> RekeyReport:
        request = SyncRequest(SnapshotFilter(**chosen), mirror, dry_run)  # type: ignore[arg-type]
        return rekey(self.source, self.destination, request)

    def require_copies(self) -> None:
        """All snapshots are at both ends, with the same content and facts."""
        ours, theirs = self.source.snapshots(), self.destination.snapshots()
        assert [_facts(s.manifest) for s in ours] == [_facts(s.manifest) for s in theirs]
        ids = {s.id: copy.id for s, copy in zip(ours, theirs, strict=True)}
        for snapshot, copy in zip(ours, theirs, strict=True):
            assert (copy.labels, copy.notes, copy.pinned) == (snapshot.labels, snapshot.notes, snapshot.pinned)
            assert copy.manifest.copy_of == snapshot.id
            parent = snapshot.manifest.parent
            assert copy.manifest.parent == (ids.get(parent) if parent else None)
            assert restored(self.destination, copy) == restored(self.source, snapshot)
        self.there.require_sound()


def _opened(end: Site) -> Peer:
    return end.opened if isinstance(end, SealedSite) else end.peer


def _facts(manifest: Manifest) -> Manifest:
    """What does not depend on the key."""
    disks = tuple(replace(disk, root=ZERO_ID) for disk in manifest.disks)
    configs = tuple(replace(config, id=ZERO_ID) for config in manifest.configs)
    return replace(manifest, disks=disks, configs=configs, parent=None, copy_of=None)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[MasterKey | None], Site]]:
    made: list[Site] = []

    def one(key: MasterKey | None) -> Site:
        folder = tmp_path / str(len(made))
        made.append(site(folder) if key is None else sealed_site(folder, key))
        return made[-1]

    yield one
    for end in made:
        end.repository.close()


@pytest.fixture
def ends(make: Callable[[MasterKey | None], Site]) -> Ends:
    return Ends(make(KEY), make(OTHER_KEY))


@pytest.mark.parametrize("keys", [(KEY, OTHER_KEY), (None, KEY), (KEY, None)])
def test_everything_is_kept(
    make: Callable[[MasterKey | None], Site], keys: tuple[MasterKey | None, MasterKey | None]
) -> None:
    ends = Ends(*map(make, keys))
    ends.here.backup(CONTENT, labels=("weekly",), notes="before the upgrade", host="pve1", program="casbackup 1")
    second = ends.here.backup({**CONTENT, "scsi0": changed(DISK, 2, 3)})
    ends.source.annotate(second, pinned=True, labels=("other",), notes="annotated")
    ends.here.backup(CONTENT, OTHER_VM)
    report = ends.rekey()
    assert [r.outcome for r in report.sync.results] == [Outcome.COPIED] * 3
    assert report.sync.is_complete and report.sync.proof is None
    ends.require_copies()


def test_where_it_came_from_is_kept(ends: Ends) -> None:
    origin = ArchiveOrigin("vma", bytes(16), 5, (ArchivedDisk("drive-scsi0", 1),), (), (MissingRange(0, 4096, 512),))
    live = LiveOrigin("push", "7.2", True, bitmap="0123456789abcdef")
    namespace = Namespace("acme/prod")
    made = ends.here.backup({"scsi0": DISK})
    for times, change in enumerate(({"archive": origin}, {"live": live}, {"namespace": namespace}), 1):
        manifest = replace(made.manifest, time_ms=made.manifest.time_ms + times, sequence=times + 1, **change)
        _adopt(ends.here, manifest)
    ends.rekey()
    ends.require_copies()
    assert [s.manifest.archive for s in ends.destination.snapshots()].count(origin) == 1
    assert [s.manifest.live for s in ends.destination.snapshots()].count(live) == 1


def test_a_second_run_copies_what_is_new_and_reads_what_changed(ends: Ends) -> None:
    ends.here.backup({"scsi0": DISK})
    ends.rekey()
    again = ends.rekey()
    assert [r.outcome for r in again.sync.results] == [Outcome.PRESENT]
    assert (again.read_bytes, again.sync.total.blobs, again.expected.content_bytes) == (0, 0, 0)
    ends.here.backup({"scsi0": DISK[:-1] + b"x"})
    third = ends.rekey()
    assert [r.outcome for r in third.sync.results] == [Outcome.PRESENT, Outcome.COPIED]
    assert 0 < third.read_bytes <= 4 * 2**20  # its last segment
    assert third.sync.total.chunks == 1
    ends.require_copies()


def test_what_vms_share_is_read_once(ends: Ends) -> None:
    ends.here.backup({"scsi0": DISK})
    ends.here.backup({"scsi0": DISK}, OTHER_VM)
    report = ends.rekey()
    data = sum(len(block) for block in _blocks(DISK) if any(block))
    assert report.read_bytes == data
    assert report.expected.content_bytes == data
    ends.require_copies()


def test_what_is_gone_at_the_destination_is_read_again(ends: Ends) -> None:
    ends.here.backup({"scsi0": DISK})
    ends.rekey()
    ends.destination.remove(ends.destination.snapshots())
    ends.there.gc()
    assert [r.outcome for r in ends.rekey().sync.results] == [Outcome.COPIED]
    ends.require_copies()


def test_labels_notes_pins_follow_and_a_mirror_removes(ends: Ends) -> None:
    first, second = ends.here.backup({"scsi0": DISK}), ends.here.backup({"scsi0": changed(DISK, 2, 3)})
    ends.rekey()
    ends.source.annotate(second, pinned=True, notes="later")
    assert len(ends.rekey().sync.changed) == 1
    ends.require_copies()
    own = ends.there.backup({"scsi0": DISK}, OTHER_VM)
    ends.source.remove([first])
    removed = ends.rekey(mirror=True).sync.removed
    assert {s.manifest.copy_of for s in removed} == {first.id, None}
    assert own.id in {s.id for s in removed}
    assert [s.manifest.copy_of for s in ends.destination.snapshots()] == [second.id]


def test_a_dry_run_tells_the_cost_and_does_nothing(ends: Ends) -> None:
    ends.here.backup({"scsi0": DISK})
    told: list[tuple[RekeyCost, int]] = []
    request = SyncRequest(dry_run=True)
    report = rekey(ends.source, ends.destination, request, lambda cost, count: told.append((cost, count)))
    assert [r.outcome for r in report.sync.results] == [Outcome.PLANNED]
    assert (ends.there.ids, report.read_bytes) == ([], 0)
    assert told == [(report.expected, 1)]
    done = ends.rekey()
    assert done.expected == report.expected
    assert done.read_bytes == report.expected.content_bytes
    assert done.sync.total.stored_bytes == pytest.approx(report.expected.stored_bytes, rel=0.02)


def test_it_goes_on_after_a_break_and_sends_nothing_twice(ends: Ends) -> None:
    ends.here.backup({"scsi0": DISK})
    ends.here.backup({"scsi0": changed(DISK, 2, 300)})
    whole = 0
    for operations in range(1, 60, 3):
        watched = WatchedPeer(ends.source, breaking_after(operations))
        try:
            rekey(watched, ends.destination, SyncRequest())
        except Exception as error:
            assert "the link is down" in str(error)
            assert set(ends.there.ids) == {s.id for s in ends.destination.snapshots()}
            continue
        whole += 1
        break
    assert whole == 1
    ends.require_copies()


def test_back_to_where_it_came_from_copies_nothing(ends: Ends) -> None:
    ends.here.backup({"scsi0": DISK})
    ends.rekey()
    assert [r.outcome for r in Ends(ends.there, ends.here).rekey().sync.results] == [Outcome.PRESENT]


def test_another_snapshot_of_that_time_is_a_conflict(ends: Ends) -> None:
    ends.here.backup({"scsi0": DISK})
    ends.there.backup({"scsi0": DISK})
    report = ends.rekey()
    assert [r.outcome for r in report.sync.results] == [Outcome.FAILED]
    assert isinstance(report.sync.results[0].error, SnapshotConflict)


def test_the_clear_part_makes_no_copy(ends: Ends) -> None:
    """Somebody without the key puts a manifest in place that calls itself a copy: it does not count as one."""
    snapshot = ends.here.backup({"scsi0": DISK})
    ends.rekey()
    (copy,) = ends.there.peer.snapshots()
    ends.there.peer.remove([copy])
    forged = replace(copy.manifest, copy_of=snapshot.id, sealed=copy.manifest.sealed[:-1] + b"x")
    session = ends.there.peer.open_session(forged.namespace, forged.vm)
    session.adopt(encode_manifest(forged)[0])
    session.finish()
    found, damaged = ends.destination.survey()
    assert (found, [type(error) for error in damaged]) == ([], [ManifestForged])
    report = ends.rekey()
    assert [r.outcome for r in report.sync.results] == [Outcome.FAILED]  # the place is taken
    assert isinstance(report.sync.results[0].error, SnapshotConflict)


def test_what_is_damaged_is_not_copied_and_the_others_are(ends: Ends) -> None:
    ends.here.backup({"scsi0": DISK})
    good = ends.here.backup({"scsi0": b"y" * 8192}, OTHER_VM)
    pack = max(Path(ends.here.repository.layout.packs).rglob("*.pack"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.write_bytes(content)
    report = ends.rekey()
    assert [r.outcome for r in report.sync.results] == [Outcome.FAILED, Outcome.COPIED]
    assert [s.manifest.copy_of for s in ends.destination.snapshots()] == [good.id]
    ends.there.require_sound()


def test_the_same_key_and_no_key_are_refused(make: Callable[[MasterKey | None], Site]) -> None:
    for key in (KEY, None):
        with pytest.raises(UsageError, match="the same key"):
            Ends(make(key), make(key)).rekey()
    with pytest.raises(KeyMissing):
        rekey(make(KEY).peer, make(None).peer, SyncRequest())
    with pytest.raises(KeyMissing):
        rekey(make(None).peer, make(KEY).peer, SyncRequest())


def test_few_leaves_are_remembered(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN_LEAVES", 1)
    ends.here.backup({"scsi0": DISK})
    ends.here.backup({"scsi0": DISK}, OTHER_VM)
    ends.rekey()
    ends.require_copies()


def _blocks(content: bytes) -> list[bytes]:
    return [content[at : at + 4096] for at in range(0, len(content), 4096)]


def _adopt(end: Site, manifest: Manifest) -> SnapshotId:
    assert isinstance(end, SealedSite)
    session = end.opened.open_session(manifest.namespace, manifest.vm)
    snapshot: Snapshot = session.adopt(end.opened.as_stored(manifest))
    session.finish()
    return snapshot.id
