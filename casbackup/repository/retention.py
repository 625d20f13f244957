"""Which snapshots to keep: a pure plan, by the rules of Proxmox Backup Server.

Each VM of each namespace is planned for itself. The rules are last, hourly, daily, weekly, monthly and
yearly, in that order; each walks the snapshots from the newest to the oldest:

* Of the snapshots of one period (an hour, day, ISO week, month or year of the wall clock in the given time
  zone) a rule keeps the newest, for as many periods as its number says. Periods without a snapshot do not
  count. When clocks are set back, the hour that comes twice is one period.
* A period in which an earlier rule has kept a snapshot is covered: it is skipped and does not count.
* Pinned snapshots are always kept, cover nothing and do not count.

"Newest" goes by the time in the manifest, then by sequence, so that archives imported later take the place
of their date. A wrong clock must not cost a backup, though, so these are kept whatever the rules say:

* the newest snapshot by sequence, the one that was made last;
* if the caller gives the present time: snapshots dated after it. Being the newest of all they would take
  the places of the rules until their dates have come, and meanwhile each backup would be forgotten as soon
  as the next one is made. So they neither count nor cover.

One difference to Proxmox Backup Server: there, a snapshot that the weekly rule passes over for a newer one
of its week is out of sight of the monthly rule too, so that adding a weekly rule can cost the only snapshot
of a month that ended within that week. Here the monthly rule still sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, tzinfo

from casbackup.errors import UsageError
from casbackup.ids import Namespace, VmName
from casbackup.repository.catalog import Snapshot

PINNED = "pinned"
IN_FUTURE = "dated in the future"
LATEST = "the latest backup"
NO_RULE = "no rule keeps it"

_PERIODS = {
    "hourly": "%Y-%m-%d %H:00",
    "daily": "%Y-%m-%d",
    "weekly": "%G-W%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}
"""The rules about periods, in their order: the name that a time gives to its period."""


@dataclass(frozen=True, slots=True)
class KeepPolicy:
    """How many snapshots, or periods with one, each rule keeps; 0: the rule is not used.

    :raise UsageError: when a number is negative, or all are 0: no policy forgets everything.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def __post_init__(self) -> None:
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        for rule, number in numbers.items():
            if not isinstance(number, int) or number < 0:
                raise UsageError(f"keep-{rule} must be a whole number of 0 or more, not {number!r}")
        if not any(numbers.values()):
            rules = ", ".join(f"keep-{rule}" for rule in numbers)
            raise UsageError(f"nothing says which snapshots to keep: give at least one of {rules}")


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a snapshot and why: ``daily 2026-11-22``, ``pinned``, ``no rule keeps it``."""

    snapshot: Snapshot
    keep: bool
    reason: str


def plan_forget(
    snapshots: Sequence[Snapshot], policy: KeepPolicy, tz: tzinfo, *, now_ms: int | None = None
) -> list[Decision]:
    """A decision for each snapshot, in the order given. Changes nothing.

    ``snapshots`` must hold all of each VM that it holds any of. ``tz`` says when a day begins; ``now_ms``
    is the present time.
    """
    groups: dict[tuple[Namespace, VmName], list[Snapshot]] = {}
    for snapshot in snapshots:
        groups.setdefault((snapshot.manifest.namespace, snapshot.manifest.vm), []).append(snapshot)
    kept = {owner: _kept(group, policy, tz, now_ms) for owner, group in groups.items()}
    decisions: list[Decision] = []
    for snapshot in snapshots:
        reason = kept[snapshot.manifest.namespace, snapshot.manifest.vm].get(_age(snapshot))
        decisions.append(Decision(snapshot, reason is not None, reason or NO_RULE))
    return decisions


_Age = tuple[int, int]
"""Time and sequence: orders the snapshots of one VM and tells them apart."""


def _age(snapshot: Snapshot) -> _Age:
    return snapshot.manifest.time_ms, snapshot.manifest.sequence


def _kept(snapshots: Sequence[Snapshot], policy: KeepPolicy, tz: tzinfo, now_ms: int | None) -> dict[_Age, str]:
    """Those snapshots of one VM that are kept, with the reason."""
    exempt = {_age(s): PINNED for s in snapshots if s.pinned}
    if now_ms is not None:
        exempt = {_age(s): IN_FUTURE for s in snapshots if s.manifest.time_ms > now_ms} | exempt
    newest_first = sorted({_age(s) for s in snapshots} - exempt.keys(), reverse=True)
    kept = {age: f"last {place} of {policy.last}" for place, age in enumerate(newest_first[: policy.last], 1)}
    for rule, pattern in _PERIODS.items():
        names = {age: datetime.fromtimestamp(age[0] // 1000, tz).strftime(pattern) for age in newest_first}
        picked = _newest_of_periods(names, kept, getattr(policy, rule))
        kept.update((age, f"{rule} {names[age]}") for age in picked)
    latest = max(snapshots, key=lambda s: (s.manifest.sequence, s.manifest.time_ms))
    return {_age(latest): LATEST} | kept | exempt


def _newest_of_periods(names: dict[_Age, str], kept: Iterable[_Age], limit: int) -> list[_Age]:
    """The newest of each of the ``limit`` newest periods that nothing in ``kept`` covers.

    ``names`` has the name of the period of each snapshot, newest first.
    """
    covered = {names[age] for age in kept}
    picked: list[_Age] = []
    for age, name in names.items():
        if len(picked) == limit:
            break
        if name not in covered:
            covered.add(name)
            picked.append(age)
    return picked
