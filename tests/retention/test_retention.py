"""Which snapshots a policy keeps: documented examples of Proxmox Backup Server, corner cases, properties."""

from __future__ import annotations

import zoneinfo
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from datetime import UTC, datetime, timedelta, timezone, tzinfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from casbackup.clock import format_time, parse_time
from casbackup.errors import UsageError
from casbackup.ids import Namespace, SnapshotId, VmName
from casbackup.repository.catalog import Snapshot
from casbackup.repository.retention import IN_FUTURE, LATEST, NO_RULE, PINNED, KeepPolicy, plan_forget
from casbackup.spec.manifest import Manifest, Sidecar

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)


def snapshot(time: str | datetime, sequence: int = 0, *, vm: str = "vm/100", pinned: bool = False) -> Snapshot:
    """``time``: RFC 3339, UTC without a zone."""
    time_ms = parse_time(time) if isinstance(time, str) else round(time.timestamp() * 1000)
    manifest = Manifest(Namespace("default"), VmName(vm), time_ms, sequence, disks=())
    return Snapshot(SnapshotId(f"{sequence:064x}"), manifest)


def history(times: Sequence[str | datetime]) -> list[Snapshot]:
    """Snapshots made one after another."""
    return [snapshot(time, number) for number, time in enumerate(times, start=1)]


def daily(first: str, last: str) -> list[datetime]:
    """Every day at the time of ``first``."""
    start, end = datetime.fromisoformat(first).replace(tzinfo=UTC), datetime.fromisoformat(last)
    return [start + n * DAY for n in range((end.date() - start.date()).days + 1)]


def kept(
    snapshots: Sequence[Snapshot], policy: KeepPolicy, tz: tzinfo = UTC, *, now_ms: int | None = None
) -> list[Snapshot]:
    return [d.snapshot for d in plan_forget(snapshots, policy, tz, now_ms=now_ms) if d.keep]


def reasons(
    snapshots: Sequence[Snapshot], policy: KeepPolicy, tz: tzinfo = UTC, *, now_ms: int | None = None
) -> list[str]:
    return [d.reason for d in plan_forget(snapshots, policy, tz, now_ms=now_ms)]


def dates(snapshots: Sequence[Snapshot]) -> list[str]:
    """Newest first."""
    return [format_time(s.manifest.time_ms)[:10] for s in reversed(snapshots)]


def zone(name: str) -> tzinfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except zoneinfo.ZoneInfoNotFoundError:
        pytest.skip(f"this machine has no description of time zone {name}")


class TestPolicy:
    def test_that_keeps_nothing_is_refused(self) -> None:
        with pytest.raises(UsageError, match="keep-last, keep-hourly, keep-daily"):
            KeepPolicy()

    def test_with_a_negative_number_is_refused(self) -> None:
        with pytest.raises(UsageError, match="keep-weekly"):
            KeepPolicy(last=1, weekly=-1)


class TestDocumentedBehaviour:
    """What the documentation of Proxmox Backup Server promises."""

    def test_last_keeps_that_many(self) -> None:
        snapshots = history(daily("2026-11-01T20:00", "2026-11-22"))
        assert dates(kept(snapshots, KeepPolicy(last=3))) == ["2026-11-22", "2026-11-21", "2026-11-20"]

    @pytest.mark.parametrize(
        ("policy", "times", "expected"),
        [
            (
                KeepPolicy(hourly=2),
                ["2026-11-22T18:10", "2026-11-22T18:50", "2026-11-22T19:10", "2026-11-22T19:50"],
                [1, 3],
            ),
            (
                KeepPolicy(daily=2),
                ["2026-11-21T01", "2026-11-21T23", "2026-11-22T01", "2026-11-22T23"],
                [1, 3],
            ),
            (
                KeepPolicy(monthly=2),
                ["2026-10-01", "2026-10-31", "2026-11-01", "2026-11-30"],
                [1, 3],
            ),
            (KeepPolicy(yearly=2), ["2025-01-01", "2025-12-31", "2026-01-01", "2026-12-31"], [1, 3]),
        ],
    )
    def test_of_several_in_a_period_the_latest_stays(
        self, policy: KeepPolicy, times: list[str], expected: list[int]
    ) -> None:
        snapshots = history(times)
        assert kept(snapshots, policy) == [snapshots[n] for n in expected]

    def test_periods_without_a_backup_do_not_count(self) -> None:
        snapshots = history(["2019-01-05", "2023-06-01", "2026-11-20", "2026-11-22"])
        assert kept(snapshots, KeepPolicy(daily=4)) == snapshots
        assert kept(snapshots, KeepPolicy(monthly=2)) == [snapshots[1], snapshots[3]]

    def test_weeks_start_on_monday(self) -> None:
        snapshots = history(["2026-11-15T23:59:59", "2026-11-16T00:00:00", "2026-11-22T23:59:59"])
        assert kept(snapshots, KeepPolicy(weekly=2)) == [snapshots[0], snapshots[2]]
        assert reasons(snapshots, KeepPolicy(weekly=2)) == ["weekly 2026-W46", NO_RULE, "weekly 2026-W47"]

    def test_weeks_at_the_turn_of_the_year_are_one(self) -> None:
        # 2026-12-28 to 2027-01-03 is week 53 of 2026.
        snapshots = history(["2026-12-27", "2026-12-28", "2027-01-03", "2027-01-04"])
        assert reasons(snapshots, KeepPolicy(weekly=9)) == [
            "weekly 2026-W52",
            NO_RULE,
            "weekly 2026-W53",
            "weekly 2027-W01",
        ]

    def test_the_next_rule_does_not_take_care_of_what_is_covered(self) -> None:
        snapshots = history(daily("2026-10-01T20:00", "2026-11-22"))
        policy = KeepPolicy(last=1, daily=2, weekly=2, monthly=1)
        found = dates(kept(snapshots, policy))
        # Week 47 is covered by the daily rule, November by both.
        assert found == ["2026-11-22", "2026-11-21", "2026-11-20", "2026-11-15", "2026-11-08", "2026-10-31"]

    def test_the_example_of_ten_years_of_daily_backups(self) -> None:
        """3 last, 13 daily, 8 weekly, 11 monthly, 9 yearly: two weeks, two months, a year, ten years."""
        snapshots = history(daily("2014-01-01T20:00", "2026-11-22"))
        policy = KeepPolicy(last=3, daily=13, weekly=8, monthly=11, yearly=9)
        plan = [d for d in plan_forget(snapshots, policy, UTC) if d.keep]
        by_rule = [d.reason.split()[0] for d in reversed(plan)]
        assert by_rule == ["last"] * 3 + ["daily"] * 13 + ["weekly"] * 8 + ["monthly"] * 11 + ["yearly"] * 9
        assert dates([d.snapshot for d in plan])[-1] == "2016-12-31"

    def test_a_backup_made_by_hand_takes_no_day_away(self) -> None:
        snapshots = history([*daily("2026-11-01T20:00", "2026-11-22"), "2026-11-22T21:00", "2026-11-22T22:00"])
        assert len(kept(snapshots, KeepPolicy(last=3, daily=13))) == 3 + 13

    def test_pinned_ones_stay_and_do_not_count(self) -> None:
        snapshots = history(daily("2026-11-01T20:00", "2026-11-22"))
        for number in (0, 20, 21):
            snapshots[number] = replace(snapshots[number], sidecar=Sidecar(pinned=True))
        plan = plan_forget(snapshots, KeepPolicy(last=1, daily=1), UTC)
        assert [(d.reason, n) for n, d in enumerate(plan) if d.keep] == [
            (PINNED, 0),
            ("daily 2026-11-19", 18),
            ("last 1 of 1", 19),
            (PINNED, 20),
            (PINNED, 21),
        ]

    def test_each_vm_of_each_namespace_is_planned_for_itself(self) -> None:
        here = history(["2026-11-20", "2026-11-21"])
        there = [replace(s, manifest=replace(s.manifest, namespace=Namespace("acme/prod"))) for s in here]
        other = [snapshot("2020-01-01", 1, vm="vm/200")]
        mixed = [here[0], there[1], other[0], there[0], here[1]]
        assert kept(mixed, KeepPolicy(last=1)) == [there[1], other[0], here[1]]

    def test_a_week_passed_over_does_not_cost_a_month(self) -> None:
        """Differs from Proxmox Backup Server: 30 November is in the week of 6 December."""
        snapshots = history(["2026-11-30", "2026-12-06"])
        assert reasons(snapshots, KeepPolicy(weekly=1, monthly=1)) == ["monthly 2026-11", "weekly 2026-W49"]


class TestReasons:
    def test_name_the_rule_and_its_period(self) -> None:
        snapshots = history(["2024-05-05", "2026-01-01", "2026-11-03", "2026-11-22T17:30", "2026-11-22T20:00"])
        assert reasons(snapshots, KeepPolicy(last=1, hourly=1, weekly=1, monthly=1, yearly=1)) == [
            "yearly 2024",
            "monthly 2026-01",
            "weekly 2026-W45",
            "hourly 2026-11-22 17:00",
            "last 1 of 1",
        ]

    def test_come_in_the_order_of_the_question(self) -> None:
        snapshots = history(["2026-11-20", "2026-11-22", "2026-11-21"])
        plan = plan_forget(snapshots, KeepPolicy(daily=1), UTC)
        assert [d.snapshot for d in plan] == snapshots
        assert [d.reason for d in plan] == [NO_RULE, "daily 2026-11-22", LATEST]

    def test_nothing_to_decide(self) -> None:
        assert plan_forget([], KeepPolicy(last=1), UTC) == []


class TestWrongClocks:
    def test_the_latest_backup_stays_although_the_clock_was_set_back(self) -> None:
        snapshots = history(["2036-01-01", "2036-01-02", "2026-11-21", "2026-11-22"])
        assert reasons(snapshots, KeepPolicy(last=1)) == [NO_RULE, "last 1 of 1", NO_RULE, LATEST]

    def test_snapshots_dated_in_the_future_take_no_places(self) -> None:
        snapshots = history(["2036-01-01", "2036-01-02", "2026-11-20", "2026-11-21", "2026-11-22"])
        now_ms = parse_time("2026-11-22T20:00")
        assert reasons(snapshots, KeepPolicy(last=2), now_ms=now_ms) == [
            IN_FUTURE,
            IN_FUTURE,
            NO_RULE,
            "last 2 of 2",
            "last 1 of 2",
        ]

    def test_a_clock_ten_years_behind_forgets_nothing(self) -> None:
        snapshots = history(daily("2026-11-01T20:00", "2026-11-22"))
        assert kept(snapshots, KeepPolicy(last=1), now_ms=parse_time("2016-11-22")) == snapshots

    def test_a_clock_ten_years_ahead_forgets_no_more_than_usual(self) -> None:
        snapshots = history(daily("2026-11-01T20:00", "2026-11-22"))
        policy = KeepPolicy(last=2, weekly=2)
        assert kept(snapshots, policy, now_ms=parse_time("2036-11-22")) == kept(snapshots, policy)

    def test_archives_imported_later_take_the_place_of_their_date(self) -> None:
        snapshots = history(["2026-11-21", "2026-11-22", "2020-05-05", "2021-05-05", "2022-05-05"])
        assert kept(snapshots, KeepPolicy(last=2)) == [snapshots[0], snapshots[1], snapshots[4]]

    def test_the_same_time_twice_goes_by_sequence(self) -> None:
        snapshots = [snapshot("2026-11-22", 8), snapshot("2026-11-22", 7)]
        assert kept(snapshots, KeepPolicy(last=1)) == [snapshots[0]]


class TestTimeZones:
    def test_a_day_begins_at_the_users_midnight(self) -> None:
        snapshots = history(["2026-11-21T22:30", "2026-11-21T23:30", "2026-11-22T22:30"])
        assert kept(snapshots, KeepPolicy(daily=2)) == [snapshots[1], snapshots[2]]
        assert kept(snapshots, KeepPolicy(daily=2), timezone(HOUR)) == [snapshots[0], snapshots[2]]
        assert reasons(snapshots, KeepPolicy(daily=2), timezone(HOUR))[0] == "daily 2026-11-21"

    def test_a_zone_of_quarter_hours(self) -> None:
        kathmandu = timezone(timedelta(hours=5, minutes=45))
        snapshots = history(["2026-11-22T10:10", "2026-11-22T10:20", "2026-11-22T11:10"])
        assert reasons(snapshots, KeepPolicy(hourly=9), kathmandu) == [
            "hourly 2026-11-22 15:00",
            NO_RULE,
            "hourly 2026-11-22 16:00",
        ]

    def test_the_day_of_25_hours(self) -> None:
        """In Berlin, 2026-10-25T02:00 to 03:00 comes twice, at 00:00 and 01:00 UTC."""
        snapshots = history([datetime(2026, 10, 24, 22, tzinfo=UTC) + n * HOUR for n in range(25)])
        berlin = zone("Europe/Berlin")
        assert kept(snapshots, KeepPolicy(daily=2), berlin) == snapshots[-1:]
        assert len(kept(snapshots, KeepPolicy(hourly=99), berlin)) == 24
        assert reasons(snapshots, KeepPolicy(hourly=99), berlin)[2:4] == [NO_RULE, "hourly 2026-10-25 02:00"]

    def test_the_day_of_23_hours(self) -> None:
        snapshots = history([datetime(2026, 3, 28, 23, tzinfo=UTC) + n * HOUR for n in range(23)])
        berlin = zone("Europe/Berlin")
        assert kept(snapshots, KeepPolicy(daily=2), berlin) == snapshots[-1:]
        assert kept(snapshots, KeepPolicy(hourly=99), berlin) == snapshots

    def test_clocks_set_back_over_midnight(self) -> None:
        """In Newfoundland clocks went back from 00:01 to 23:01 of the day before, so days interleave."""
        st_johns = zone("America/St_Johns")
        snapshots = history([f"2010-11-07T{time}" for time in ("02:00", "02:30:30", "03:00", "04:00")])
        local = [datetime.fromtimestamp(s.manifest.time_ms / 1000, st_johns).day for s in snapshots]
        assert local == [6, 7, 6, 7]
        assert kept(snapshots, KeepPolicy(daily=2), st_johns) == [snapshots[2], snapshots[3]]


ZONES: list[tzinfo] = [UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-11))]
for name in ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia", "America/St_Johns"):
    if name in zoneinfo.available_timezones():
        ZONES.append(zoneinfo.ZoneInfo(name))

NOW_MS = parse_time("2026-11-22T20:00")
_NUMBERS = st.integers(0, 4)
policies = st.tuples(*[_NUMBERS] * 6).filter(any).map(lambda numbers: KeepPolicy(*numbers))
times = st.one_of(
    st.integers(0, 60 * 24 * 14).map(lambda minutes: NOW_MS - minutes * 60_000),
    st.integers(0, 24 * 900).map(lambda hours: NOW_MS - hours * 3_600_000),
    st.integers(-10, 10).map(lambda years: NOW_MS + years * 365 * 86_400_000),
    # Around the ends of summer time, the turn of a year, and a month that ends within a week.
    st.tuples(
        st.sampled_from(["2026-10-25T01:00", "2010-11-07T02:30", "2026-12-31T23:30", "2026-11-30T00:00"]),
        st.integers(-72, 72),
    ).map(lambda pair: parse_time(pair[0]) + pair[1] * 1_800_000),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Snapshot]:
    """Snapshots of one VM; some pinned, and in some the clock jumped."""
    chosen = draw(st.lists(times, max_size=25, unique=True))
    if draw(st.booleans()):
        chosen.sort()
    found = history([datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms) for ms in chosen])
    pins = draw(st.sets(st.integers(0, 24), max_size=3))
    return [replace(s, sidecar=Sidecar(pinned=n in pins)) for n, s in enumerate(found)]


zones = st.sampled_from(ZONES)
presents = st.none() | st.just(NOW_MS)

Period = Callable[[datetime], object]
PERIODS: dict[str, Period] = {
    "hourly": lambda t: (t.year, t.month, t.day, t.hour),
    "daily": lambda t: t.date(),
    "weekly": lambda t: t.isocalendar()[:2],
    "monthly": lambda t: (t.year, t.month),
    "yearly": lambda t: t.year,
}


def local(snapshot: Snapshot, tz: tzinfo) -> datetime:
    return (datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=snapshot.manifest.time_ms)).astimezone(tz)


def model(snapshots: Sequence[Snapshot], policy: KeepPolicy, tz: tzinfo, now_ms: int | None) -> set[SnapshotId]:
    """The module's documentation once more, in sets."""
    free = {s for s in snapshots if not s.pinned and (now_ms is None or s.manifest.time_ms <= now_ms)}
    newest_first = sorted(free, key=lambda s: s.manifest.time_ms, reverse=True)
    by_rule = set(newest_first[: policy.last])
    for rule, period in PERIODS.items():
        covered = {period(local(s, tz)) for s in by_rule}
        newest: dict[object, Snapshot] = {}
        for s in newest_first:
            newest.setdefault(period(local(s, tz)), s)
        open_periods = [p for p in newest if p not in covered]
        by_rule |= {newest[p] for p in open_periods[: getattr(policy, rule)]}
    latest = {max(snapshots, key=lambda s: s.manifest.sequence)} if snapshots else set()
    return {s.id for s in by_rule | (set(snapshots) - free) | latest}


def ids(snapshots: Sequence[Snapshot]) -> set[SnapshotId]:
    return {s.id for s in snapshots}


def more_than(policy: KeepPolicy, additions: Sequence[int]) -> KeepPolicy:
    return KeepPolicy(*(a + b for a, b in zip(astuple(policy), additions, strict=True)))


class TestProperties:
    @given(histories(), policies, zones, presents)
    def test_agrees_with_the_model(
        self, snapshots: list[Snapshot], policy: KeepPolicy, tz: tzinfo, now_ms: int | None
    ) -> None:
        assert ids(kept(snapshots, policy, tz, now_ms=now_ms)) == model(snapshots, policy, tz, now_ms)

    @given(histories(), policies, zones, presents)
    def test_what_a_policy_keeps_it_keeps_again(
        self, snapshots: list[Snapshot], policy: KeepPolicy, tz: tzinfo, now_ms: int | None
    ) -> None:
        once = kept(snapshots, policy, tz, now_ms=now_ms)
        assert kept(once, policy, tz, now_ms=now_ms) == once

    @given(histories(), policies, zones, presents, st.randoms(use_true_random=False))
    def test_the_order_of_the_question_does_not_matter(
        self, snapshots: list[Snapshot], policy: KeepPolicy, tz: tzinfo, now_ms: int | None, random: object
    ) -> None:
        shuffled = list(snapshots)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        assert ids(kept(shuffled, policy, tz, now_ms=now_ms)) == ids(kept(snapshots, policy, tz, now_ms=now_ms))

    @given(histories().filter(bool), policies, zones, presents)
    def test_the_latest_and_the_newest_always_stay(
        self, snapshots: list[Snapshot], policy: KeepPolicy, tz: tzinfo, now_ms: int | None
    ) -> None:
        stay = kept(snapshots, policy, tz, now_ms=now_ms)
        assert max(snapshots, key=lambda s: s.manifest.sequence) in stay
        assert max(snapshots, key=lambda s: s.manifest.time_ms) in stay

    @given(histories(), policies, zones, presents)
    def test_the_pinned_stay_and_change_nothing_for_the_others(
        self, snapshots: list[Snapshot], policy: KeepPolicy, tz: tzinfo, now_ms: int | None
    ) -> None:
        stay = kept(snapshots, policy, tz, now_ms=now_ms)
        assert {s for s in snapshots if s.pinned} <= set(stay)
        others = [s for s in snapshots if not s.pinned]
        assert {s for s in stay if not s.pinned} <= set(kept(others, policy, tz, now_ms=now_ms))

    @given(histories(), policies, st.tuples(*[_NUMBERS] * 6), zones, presents)
    def test_more_rules_remove_no_more(
        self,
        snapshots: list[Snapshot],
        policy: KeepPolicy,
        additions: tuple[int, ...],
        tz: tzinfo,
        now_ms: int | None,
    ) -> None:
        """Exactly so for rules whose periods lie within one another, so for all of them but weekly."""
        policy = replace(policy, weekly=0, last=max(policy.last, 1))
        more = replace(more_than(policy, additions), weekly=0)
        assert ids(kept(snapshots, policy, tz, now_ms=now_ms)) <= ids(kept(snapshots, more, tz, now_ms=now_ms))

    @given(histories(), policies, st.tuples(*[_NUMBERS] * 6), zones)
    @example(
        history(["2026-10-31", "2026-11-29", "2026-11-30", "2026-12-06"]),
        KeepPolicy(monthly=2),
        (0, 0, 0, 2, 0, 0),
        UTC,
    )
    def test_more_rules_leave_no_week_month_or_year_without_a_snapshot(
        self, snapshots: list[Snapshot], policy: KeepPolicy, additions: tuple[int, ...], tz: tzinfo
    ) -> None:
        """If a weekly rule is added, another day may come to stand for a month that ends within a week."""
        before = kept(snapshots, policy, tz)
        after = kept(snapshots, more_than(policy, additions), tz)
        assert len(after) >= len(before)
        for rule in ("weekly", "monthly", "yearly"):
            period = PERIODS[rule]
            assert {period(local(s, tz)) for s in before} <= {period(local(s, tz)) for s in after}

    @given(histories(), policies, zones)
    def test_a_backup_more_never_costs_more_than_it_replaces(
        self, snapshots: list[Snapshot], policy: KeepPolicy, tz: tzinfo
    ) -> None:
        """Number kept = what the rules add up to, at the most, beside the pinned and the latest."""
        stay = [s for s in kept(snapshots, policy, tz) if not s.pinned]
        assert len(stay) <= sum(astuple(policy)) + 1


@pytest.mark.parametrize(
    "policy",
    [
        KeepPolicy(last=3, daily=4, weekly=1, monthly=3, yearly=4),
        KeepPolicy(daily=7, weekly=4, monthly=12),
        KeepPolicy(hourly=1, weekly=5),
        KeepPolicy(monthly=6, yearly=1),
    ],
)
def test_forgetting_after_every_backup_keeps_what_the_policy_promises(policy: KeepPolicy) -> None:
    """500 daily backups: the newest days, weeks and months that the policy names are there at any time."""
    present: list[Snapshot] = []
    start = datetime(2026, 1, 1, 20, tzinfo=UTC)
    for number in range(500):
        now = start + number * DAY
        present = kept([*present, snapshot(now, number + 1)], policy)
        found = [local(s, UTC) for s in present]
        for back in range(min(number + 1, max(policy.last, policy.daily))):
            assert now - back * DAY in found
        weeks = {PERIODS["weekly"](t) for t in found}
        assert {PERIODS["weekly"](now - back * 7 * DAY) for back in range(min(number // 7, policy.weekly))} <= weeks
        months = {(t.year, t.month) for t in found}
        assert len(months) >= min(policy.monthly, (now.year - 2026) * 12 + now.month)
