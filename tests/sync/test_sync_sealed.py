"""Copying between encrypted repositories of one key, by somebody who does not have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.codec.master_key import MasterKey
from casbackup.codec.records import make_record
from casbackup.errors import KeyMismatch
from casbackup.jobs.heal import heal
from casbackup.jobs.sync import SyncRequest, sync
from casbackup.jobs.sync_report import Outcome
from casbackup.repository.check import CheckOptions, check
from casbackup.spec.manifest import encode_manifest
from casbackup.testing.world import VM, changed

from .conftest import DISK, Pair, SealedSite, Site, sealed_site, site
from .peers import WatchedPeer, breaking_after

KEY, OTHER_KEY = MasterKey(bytes(range(32))), MasterKey(bytes(32))


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[tuple[SealedSite, SealedSite]]:
    ends = sealed_site(tmp_path / "sealed-here", KEY), sealed_site(tmp_path / "sealed-there", KEY)
    yield ends
    for end in ends:
        end.repository.close()


def test_copies_are_as_they_are_stored(sealed: tuple[SealedSite, SealedSite]) -> None:
    here, there = sealed
    first = here.backup({"scsi0": DISK, "vm.conf": b"memory: 512"}, labels=("weekly",), notes="secret")
    second = here.backup({"scsi0": changed(DISK, 2, 3)})
    here.opened.annotate(second, notes="changed", pinned=True)
    report = sync(here.peer, there.peer, SyncRequest())
    assert report.is_complete and report.proof and report.proof.equal
    assert here.ids == there.ids == [first.id, second.id]
    for snapshot in here.opened.snapshots():
        assert there.restored(snapshot.id) == here.restored(snapshot.id)
    copied = there.opened.snapshots()
    assert [(s.notes, s.labels, s.pinned) for s in copied] == [("secret", ("weekly",), False), ("changed", (), True)]
    there.require_sound()
    again = sync(here.peer, there.peer, SyncRequest())
    assert again.total.blobs == 0


def test_dedup_is_kept_where_the_same_was_backed_up(sealed: tuple[SealedSite, SealedSite]) -> None:
    here, there = sealed
    here.backup({"scsi0": DISK})
    there.clock.pass_time(5)
    there.backup({"scsi0": DISK})
    report = sync(here.peer, there.peer, SyncRequest())
    assert (report.is_complete, report.total.chunks) == (True, 0)


def test_mirror_and_dry_run_need_no_key(sealed: tuple[SealedSite, SealedSite]) -> None:
    here, there = sealed
    first, second = here.backup({"scsi0": DISK}), here.backup({"scsi0": changed(DISK, 2, 3)})
    planned = sync(here.peer, there.peer, SyncRequest(dry_run=True))
    assert [r.outcome for r in planned.results] == [Outcome.PLANNED] * 2
    assert there.ids == []
    sync(here.peer, there.peer, SyncRequest())
    here.opened.remove([first])
    report = sync(here.peer, there.peer, SyncRequest(mirror=True))
    assert [s.id for s in report.removed] == [first.id]
    assert there.ids == [second.id]


def test_it_goes_on_after_a_break(sealed: tuple[SealedSite, SealedSite]) -> None:
    here, there = sealed
    here.backup({"scsi0": DISK})
    with pytest.raises(Exception, match="the link is down"):
        sync(WatchedPeer(here.peer, breaking_after(6)), there.peer, SyncRequest())
    assert sync(here.peer, there.peer, SyncRequest()).is_complete
    there.require_sound()


@pytest.mark.parametrize("encrypted", [(KEY, OTHER_KEY), (KEY, None), (None, KEY)])
def test_other_keys_are_refused(tmp_path: Path, encrypted: tuple[MasterKey | None, MasterKey | None]) -> None:
    ends = [
        site(tmp_path / "plain") if key is None else sealed_site(tmp_path / key.fingerprint, key) for key in encrypted
    ]
    fingerprints = [key.fingerprint if key else "is not encrypted" for key in encrypted]
    try:
        ends[0].backup({"scsi0": DISK})
        for refused in (
            lambda: sync(ends[0].peer, ends[1].peer, SyncRequest()),
            lambda: heal(ends[1].repository, ends[0].peer),
        ):
            with pytest.raises(KeyMismatch) as error:
                refused()
            for text in fingerprints:
                assert text in str(error.value)
            assert "sync --rekey" in error.value.advice
        (snapshot,) = ends[0].peer.snapshots()
        if None in encrypted:  # no honest client would try
            session = ends[1].peer.open_session(snapshot.manifest.namespace, VM)
            with pytest.raises(KeyMismatch):
                session.adopt(encode_manifest(snapshot.manifest)[0])
            session.abort()
        assert ends[1].ids == []
    finally:
        for end in ends:
            end.repository.close()


def test_damage_is_not_copied(sealed: tuple[SealedSite, SealedSite]) -> None:
    here, there = sealed
    here.backup({"scsi0": DISK})
    _damage(here)
    report = sync(here.peer, there.peer, SyncRequest())
    assert [r.outcome for r in report.results] == [Outcome.FAILED]
    assert there.ids == []
    there.require_sound()


def test_a_partner_heals_without_the_key(sealed: tuple[SealedSite, SealedSite]) -> None:
    here, there = sealed
    snapshot = here.backup({"scsi0": DISK})
    sync(here.peer, there.peer, SyncRequest())
    _damage(there)
    assert check(there.repository, CheckOptions(read_data=True)).damaged
    report = heal(there.repository, here.peer)
    assert (report.losses, report.healed_blobs) == ([], 1)
    assert there.restored(snapshot.id) == {"scsi0": DISK}


def test_what_is_not_sealed_is_not_taken(sealed: tuple[SealedSite, SealedSite], pair: Pair) -> None:
    """A blob of a plain repository in the place of a sealed one: its checksum is right."""
    here, there = sealed
    here.backup({"scsi0": DISK})
    report = sync(_Unsealing(here.peer), there.peer, SyncRequest())  # type: ignore[arg-type]
    assert [r.outcome for r in report.results] == [Outcome.FAILED]
    assert "not sealed" in str(report.results[0].error)
    assert there.ids == []


class _Unsealing(WatchedPeer):
    def fetch(self, ids):  # type: ignore[no-untyped-def]
        for blob_id, record in super().fetch(ids):
            flags = record.flags & ~2
            yield blob_id, make_record(blob_id, record.kind, flags, record.plain_length, bytes(record.payload))


def _damage(damaged: Site) -> None:
    """A bit of a chunk."""
    pack = max(Path(damaged.repository.layout.packs).rglob("*.pack"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.write_bytes(content)
