"""Making copies visible: many at once, in order, each with its own result."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from casbackup.errors import CasbackupError, ClosureViolation, ServerUnreachable, SnapshotConflict
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.jobs.adopting import Adopter
from casbackup.jobs.sync import SyncRequest, sync
from casbackup.limits import MAX_ADOPTED
from casbackup.repository.adoption import Copy
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import Manifest, encode_manifest
from casbackup.testing.peer import TIME_MS
from casbackup.testing.world import disk_bytes
from casbackup.workers import run_workers
from tests.sync.conftest import OTHER_VM, Pair
from tests.sync.peers import WatchedPeer


def snapshot(vm: str, number: int) -> Snapshot:
    manifest = Manifest(DEFAULT_NAMESPACE, VmName(vm), TIME_MS + number, number, ())
    return Snapshot(encode_manifest(manifest)[1], manifest)


def copy_of(item: Snapshot) -> Copy:
    return Copy(item.id.encode())


class Destination:
    """Adopts what it is told to, in a while, but for what it refuses."""

    def __init__(self, snapshots: Sequence[Snapshot], pause_s: float = 0.0) -> None:
        self._by_copy = {copy_of(item): item for item in snapshots}
        self._pause_s = pause_s
        self.refused: dict[Snapshot, CasbackupError] = {}
        self.batches: list[list[Snapshot]] = []
        self._asked = threading.Lock()

    def adopt(self, copies: Sequence[Copy]) -> list[Snapshot | CasbackupError]:
        with self._asked:
            time.sleep(self._pause_s)
            results: list[Snapshot | CasbackupError] = []
            self.batches.append([])
            for copy in copies:
                item = self._by_copy[copy]
                if item in self.refused:
                    return [*results, self.refused[item]]
                self.batches[-1].append(item)
                results.append(item)
            return results

    @property
    def adopted(self) -> list[Snapshot]:
        return [item for batch in self.batches for item in batch]


Settle = Callable[[Snapshot], Callable[[CasbackupError | None], None]]


@pytest.fixture
def results() -> dict[Snapshot, CasbackupError | None]:
    return {}


@pytest.fixture
def settle(results: dict[Snapshot, CasbackupError | None]) -> Settle:
    return lambda item: lambda error: results.__setitem__(item, error)


def test_older_ones_come_first(settle: Settle) -> None:
    one, two, three = (snapshot("vm/1", n) for n in (1, 2, 3))
    other = snapshot("vm/2", 1)
    destination = Destination([one, two, three, other])
    adopter = Adopter([one, two, three, other], destination.adopt)
    adopter.put(three, copy_of(three), settle(three))
    adopter.put(two, copy_of(two), settle(two))
    assert destination.adopted == []
    adopter.put(other, copy_of(other), settle(other))
    assert destination.adopted == [other]
    adopter.put(one, copy_of(one), settle(one))
    assert destination.batches == [[other], [one, two, three]]


def test_one_that_cannot_be_copied_holds_nothing_up(settle: Settle) -> None:
    one, two = snapshot("vm/1", 1), snapshot("vm/1", 2)
    destination = Destination([one, two])
    adopter = Adopter([one, two], destination.adopt)
    adopter.put(two, copy_of(two), settle(two))
    adopter.leave_out(one)
    assert destination.adopted == [two]


def test_a_refusal_is_of_one_snapshot(settle: Settle, results: dict[Snapshot, CasbackupError | None]) -> None:
    made = [snapshot("vm/1", n) for n in range(1, 8)]
    destination = Destination(made)
    refused = {made[2]: SnapshotConflict("there is another"), made[3]: SnapshotConflict("there, too")}
    destination.refused = dict(refused)
    adopter = Adopter(made, destination.adopt)
    for item in reversed(made):
        adopter.put(item, copy_of(item), settle(item))
    assert destination.adopted == [item for item in made if item not in refused]
    assert results == {item: refused.get(item) for item in made}


def test_what_is_not_of_one_snapshot_is_raised(settle: Settle, results: dict[Snapshot, CasbackupError | None]) -> None:
    one, two = snapshot("vm/1", 1), snapshot("vm/1", 2)
    destination = Destination([one, two])
    destination.refused = {two: ClosureViolation("it was collected")}
    adopter = Adopter([one, two], destination.adopt)
    adopter.put(two, copy_of(two), settle(two))
    with pytest.raises(ClosureViolation):
        adopter.put(one, copy_of(one), settle(one))
    assert results == {one: None}


@pytest.mark.parametrize("seed", range(3))
def test_many_threads(seed: int, settle: Settle, results: dict[Snapshot, CasbackupError | None]) -> None:
    """Each snapshot once, in order, and far fewer requests than snapshots."""
    made = [snapshot(f"vm/{n % 3}", n) for n in range(300)]
    destination = Destination(made, pause_s=0.005)
    adopter = Adopter(made, destination.adopt)
    waiting = sorted(made, key=lambda item: item.manifest.sequence + random.Random(item.id + str(seed)).random() * 40)
    lock = threading.Lock()

    def work(stop: threading.Event) -> None:
        while not stop.is_set():
            with lock:
                item = waiting.pop(0) if waiting else None
            if item is None:
                return
            adopter.put(item, copy_of(item), settle(item))

    run_workers(work, 8)
    assert results == dict.fromkeys(made)
    for vm in range(3):
        numbers = [s.manifest.sequence for s in destination.adopted if s.manifest.vm == f"vm/{vm}"]
        assert numbers == sorted(numbers)
        assert len(numbers) == 100
    assert len(destination.batches) < 100
    assert all(len(batch) <= MAX_ADOPTED for batch in destination.batches)


def test_a_sync_of_many_small_snapshots_asks_seldom(pair: Pair) -> None:
    for day in range(60):
        pair.here.backup({"vm.conf": b"day %d" % day}, OTHER_VM if day % 3 else VmName("vm/1"))
    there = WatchedPeer(pair.there.peer, lambda what: time.sleep(0.02 if what == "adopt" else 0))
    assert sync(pair.here.peer, there, SyncRequest()).is_complete
    assert there.cost.requests["adopt"] <= 30
    pair.require_equal()


def test_an_interrupted_sync_has_no_newer_snapshot_without_the_older_ones(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casbackup.jobs.adopting.MAX_ADOPTED", 4)
    made = [pair.here.backup({"scsi0": disk_bytes(day, 300)}).id for day in range(12)]
    adoptions = 0

    def before(what: str) -> None:
        nonlocal adoptions
        adoptions += what == "adopt"
        if adoptions == 3:
            raise ServerUnreachable("the link is down")

    with pytest.raises(ServerUnreachable):
        sync(pair.here.peer, WatchedPeer(pair.there.peer, before), SyncRequest())
    assert 0 < len(pair.there.ids) < 12
    assert pair.there.ids == made[: len(pair.there.ids)]
    assert pair.sync().is_complete
    pair.require_equal()
