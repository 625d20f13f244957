"""Healing a repository from its partner."""

from __future__ import annotations

from pathlib import Path

import pytest

from casbackup.errors import ServerUnreachable
from casbackup.jobs.heal import heal
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.repair import repair
from casbackup.spec.record import HEADER_BYTES
from casbackup.testing.world import changed
from tests.sync.conftest import DISK, OTHER_VM, Pair, Site
from tests.sync.peers import WatchedPeer, breaking_after

NODE, CHUNK, CONFIG = 2, 1, 3


def spoil(place: Site, *kinds: int, most: int = 1) -> int:
    """Flip a byte in some blobs of each kind, and let a check find them; returns how many."""
    repository = place.repository
    done = 0
    with repository.index.read() as txn:
        keys = [bytes(key) for key, _ in txn.cursor(db=repository.index.blobs)]
    entries = repository.store.entries(keys)  # type: ignore[arg-type]
    for kind in kinds:
        for entry in [entry for entry in entries.values() if entry.kind == kind][:most]:
            pack = repository.store.pack_rows()[entry.pack].pack
            path = next(Path(repository.layout.packs).rglob(f"{pack}.pack"))
            content = bytearray(path.read_bytes())
            content[entry.offset + HEADER_BYTES] ^= 0xFF
            path.write_bytes(content)
            done += 1
    repository.store.storage.close()
    assert check(repository, CheckOptions(read_data=True)).damaged
    return done


@pytest.fixture
def twins(pair: Pair) -> Pair:
    for day in range(3):
        pair.here.backup({"scsi0": changed(DISK, day, 5), "vm.conf": b"day %d" % day})
    pair.sync()
    return pair


@pytest.mark.parametrize("kinds", [(CHUNK,), (NODE,), (CONFIG,), (CHUNK, NODE, CONFIG)])
def test_what_is_damaged_is_fetched_and_nothing_else(twins: Pair, kinds: tuple[int, ...]) -> None:
    spoilt = spoil(twins.here, *kinds, most=3)
    partner = WatchedPeer(twins.there.peer)
    report = heal(twins.here.repository, partner)
    assert (report.healed_blobs, report.fetched_blobs, report.losses) == (spoilt, spoilt, [])
    assert len(partner.cost.fetched) == spoilt
    repaired = repair(twins.here.repository)
    assert repaired.lost_blobs == 0
    twins.require_equal()
    twins.here.gc()
    twins.require_equal()
    assert twins.here.repository.sessions.all() == []


def test_the_next_backup_finds_the_healed_data_again(twins: Pair) -> None:
    spoil(twins.here, CHUNK, NODE, most=2)
    heal(twins.here.repository, twins.there.peer)
    again = twins.here.backup({"scsi0": changed(DISK, 2, 5), "vm.conf": b"day 2"})
    assert again.manifest.stats.new_stored_bytes == 0


def test_a_missing_pack_comes_back(twins: Pair) -> None:
    for path in Path(twins.here.repository.layout.packs).rglob("*.pack"):
        path.unlink()
    twins.here.repository.store.storage.close()
    assert check(twins.here.repository).damaged
    report = heal(twins.here.repository, twins.there.peer)
    assert report.losses == []
    assert report.fetched_blobs == report.healed_blobs
    repair(twins.here.repository)
    twins.require_equal()


def test_a_partner_that_lacks_something(twins: Pair) -> None:
    """Another VM's data is damaged, too, and the partner never had it: what it has heals."""
    other = twins.here.backup({"scsi0": changed(DISK, 40, 700)}, OTHER_VM)
    spoil(twins.here, CHUNK, most=1000)
    report = heal(twins.here.repository, twins.there.peer)
    assert report.healed_blobs == report.fetched_blobs > 0
    assert report.losses
    affected = repair(twins.here.repository).affected
    assert {item.snapshot.id for item in affected} == {other.id}


def test_a_damaged_partner_does_no_harm(twins: Pair) -> None:
    spoil(twins.here, CHUNK)
    spoil(twins.there, CHUNK)
    report = heal(twins.here.repository, twins.there.peer)
    assert report.healed_blobs == 0
    assert report.losses
    assert repair(twins.here.repository).lost_blobs == 1


def test_nothing_to_heal_asks_for_nothing(twins: Pair) -> None:
    partner = WatchedPeer(twins.there.peer)
    assert heal(twins.here.repository, partner).healed_blobs == 0
    assert partner.cost.round_trips == 0


def test_a_partner_that_goes_away(twins: Pair) -> None:
    spoil(twins.here, CHUNK, NODE, most=2)
    with pytest.raises(ServerUnreachable):
        heal(twins.here.repository, WatchedPeer(twins.there.peer, breaking_after(0)))
    assert not any(active for _, active in twins.here.repository.sessions.all())
    assert heal(twins.here.repository, twins.there.peer).losses == []
    repair(twins.here.repository)
    twins.require_equal()
