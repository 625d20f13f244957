"""Two sites against a model in plain Python: histories that grow and are forgotten, syncs in both directions of which
any part may happen, gc in between and in the middle, and links that break anywhere.

The model: a snapshot is at a site exactly if it was backed up or copied there and not forgotten; it has its content; a
full check finds nothing. A sync that ends without failures has copied all that was meant.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from casbackup.errors import ServerUnreachable, SnapshotNotFound
from casbackup.ids import VmName
from casbackup.jobs.sync import SyncRequest, sync
from casbackup.jobs.sync_plan import SnapshotFilter
from casbackup.jobs.sync_report import SyncReport
from casbackup.limits import SEGMENT_BYTES
from casbackup.repository.catalog import Snapshot
from casbackup.testing.world import disk_bytes, inline
from tests.sync.conftest import site
from tests.sync.peers import WatchedPeer

VMS = [VmName("vm/1"), VmName("vm/2")]
PIECES = [disk_bytes(seed, 5 + 3 * seed) for seed in range(4)]
HOLE = bytes(SEGMENT_BYTES - 64 * 1024)
DISKS = [
    PIECES[0],
    PIECES[1] + PIECES[0],
    PIECES[3],
    PIECES[0] + HOLE + PIECES[2],
    PIECES[1] + HOLE + PIECES[2],
]
CONFIGS = [b"one", b"two"]

WHO = st.integers(0, 1)
DISK_NUMBERS = st.integers(0, len(DISKS) - 1)  # the disks themselves would be kept as text, in gigabytes
FILTERS = st.sampled_from(
    [SnapshotFilter(), SnapshotFilter(), SnapshotFilter(last=1), SnapshotFilter(vms=("vm/1",)), SnapshotFilter(last=2)]
)


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        self.stack.enter_context(inline())
        self.sites = [site(folder / "a"), site(folder / "b")]
        self.sites[1].clock.jump(0.007)  # so that no two snapshots have the same time
        self.there: list[dict[str, Snapshot]] = [{}, {}]
        self.contents: dict[str, Mapping[str, bytes]] = {}
        self.seen: list[set[str]] = [set(), set()]
        self.forgotten: list[tuple[int, str]] = []
        """What was forgotten at which site, in order; what comes back by a sync may be forgotten again."""

    def teardown(self) -> None:
        with self.stack:
            try:
                self.check_all()
                for number in (0, 1):
                    self.copy(number, SnapshotFilter())
                self.check_all()
                assert set(self.there[0]) == set(self.there[1])
            finally:
                for place in self.sites:
                    place.repository.close()

    # --- what people do

    @rule(who=WHO, vm=st.sampled_from(VMS), disk=DISK_NUMBERS, config=st.sampled_from(CONFIGS))
    def backup(self, who: int, vm: VmName, disk: int, config: bytes) -> None:
        content = {"d": DISKS[disk], "vm.conf": config}
        made = self.sites[who].backup(content, vm)
        self.contents[made.id] = content
        self.there[who][made.id] = made

    @precondition(lambda self: any(self.there))
    @rule(who=WHO, which=st.integers(0, 20))
    def forget(self, who: int, which: int) -> None:
        if self.there[who]:
            snapshot_id = sorted(self.there[who])[which % len(self.there[who])]
            self.sites[who].peer.remove([self.there[who].pop(snapshot_id)])
            self.forgotten.append((who, snapshot_id))

    @rule(who=WHO)
    def gc(self, who: int) -> None:
        self.sites[who].gc()

    @rule(who=WHO, hours=st.sampled_from([1, 25]))
    def time_passes(self, who: int, hours: int) -> None:
        self.sites[who].clock.pass_time(3600 * hours)

    @rule(who=WHO, chosen=FILTERS)
    def sync(self, who: int, chosen: SnapshotFilter) -> None:
        self.copy(who, chosen)

    @rule(who=WHO, chosen=FILTERS, operations=st.integers(0, 25), at_source=st.booleans())
    def broken_sync(self, who: int, chosen: SnapshotFilter, operations: int, at_source: bool) -> None:
        def breaks() -> None:
            raise ServerUnreachable("the link is down")

        with suppress(ServerUnreachable):
            self.copy(who, chosen, operations, breaks, at_source=at_source)
        self.look(1 - who)

    @rule(
        who=WHO,
        chosen=FILTERS,
        operations=st.integers(0, 25),
        at_source=st.booleans(),
        others=st.lists(st.sampled_from(["gc", "forget", "sync", "sync back", "backup"]), min_size=1, max_size=3),
        which=st.integers(0, 20),
    )
    def busy_sync(
        self, who: int, chosen: SnapshotFilter, operations: int, at_source: bool, others: list[str], which: int
    ) -> None:
        """At some moment of it, others do something at both ends."""
        actions: dict[str, Callable[[], object]] = {
            "gc": lambda: [self.gc(number) for number in (0, 1)],
            "forget": lambda: self.forget(which % 2, which // 2),
            "sync": lambda: self.copy(who, SnapshotFilter()),
            "sync back": lambda: self.copy(1 - who, SnapshotFilter()),
            "backup": lambda: self.backup(which % 2, VMS[0], which % len(DISKS), CONFIGS[0]),
        }
        self.copy(who, chosen, operations, lambda: [actions[other]() for other in others], at_source=at_source)

    # --- how it is done

    def copy(
        self,
        who: int,
        chosen: SnapshotFilter,
        operations: int = 0,
        then: Callable[[], object] | None = None,
        *,
        at_source: bool = False,
    ) -> None:
        """Copy from one to the other; after so many operations, something happens, once."""
        left = operations
        meant: set[str] = set()

        def before(_what: str) -> None:
            nonlocal left, then
            left -= 1
            if left < 0 and then is not None:
                happens, then = then, None
                happens()
                if at_source and not operations:  # the source has not been asked for its snapshots yet
                    look_what_is_meant()

        def look_what_is_meant() -> None:
            meant.clear()
            meant.update(s.id for s in chosen.select(self.sites[who].repository.catalog.all()))

        look_what_is_meant()
        ends = [WatchedPeer(self.sites[number].peer) for number in (who, 1 - who)]
        ends[0 if at_source else 1].before = before
        since = len(self.forgotten)
        report = sync(ends[0], ends[1], SyncRequest(chosen))
        self.judge(report, who, meant, {item for place, item in self.forgotten[since:] if place == 1 - who})

    def judge(self, report: SyncReport, who: int, meant: set[str], forgotten: set[str]) -> None:
        assert {result.snapshot.id for result in report.results} >= meant - forgotten
        for result in report.failed:
            assert isinstance(result.error, SnapshotNotFound), result.error
            assert result.snapshot.id not in self.there[who], "only one that was forgotten meanwhile may fail"
        self.look(1 - who)
        copied = {result.snapshot.id for result in report.results} - {result.snapshot.id for result in report.failed}
        assert copied - forgotten <= set(self.there[1 - who])

    def look(self, who: int) -> None:
        """What a sync brought is at the site now, and nothing went."""
        found = {s.id: s for s in self.sites[who].repository.catalog.all()}
        assert set(self.there[who]) <= set(found)
        assert set(found) <= set(self.contents)
        self.there[who] = dict(found)

    @invariant()
    def listings_are_right(self) -> None:
        for place, there in zip(self.sites, self.there, strict=True):
            assert set(place.ids) == set(there)

    @rule()
    def check_all(self) -> None:
        """The check reads all that is stored; what a snapshot holds, its id decides once and for all."""
        for place, there, seen in zip(self.sites, self.there, self.seen, strict=True):
            place.require_sound()
            for snapshot_id in set(there) - seen:
                assert place.content(snapshot_id) == self.contents[snapshot_id]
                seen.add(snapshot_id)


class TestModel(Model.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=20, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestModelForLong(Model.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(
        max_examples=600,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
