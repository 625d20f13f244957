"""VMs that have not been backed up for too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from casbackup.ids import Namespace, VmName
from casbackup.repository.catalog import Snapshot
from casbackup.units import format_duration
from casbackup_server.jobs.notify import Notifier


class Overdue(NamedTuple):
    namespace: Namespace
    vm: VmName
    age_s: float
    limit_s: float


def latest_ms(snapshots: Sequence[Snapshot]) -> dict[tuple[Namespace, VmName], int]:
    """When the latest snapshot of each VM was made. ``snapshots``: in order."""
    return {(s.manifest.namespace, s.manifest.vm): s.manifest.time_ms for s in snapshots}


def overdue(snapshots: Sequence[Snapshot], max_age_s: Mapping[str, float], now_ms: int) -> list[Overdue]:
    """VMs whose latest snapshot is older than the first pattern that fits them allows."""
    found: list[Overdue] = []
    for (namespace, vm), time_ms in latest_ms(snapshots).items():
        limit_s = next((limit for pattern, limit in max_age_s.items() if fnmatchcase(vm, pattern)), None)
        age_s = (now_ms - time_ms) / 1000
        if limit_s is not None and age_s > limit_s:
            found.append(Overdue(namespace, vm, age_s, limit_s))
    return found


class Watch:
    """Says of each VM once that it is overdue, and again only after it was backed up in between."""

    def __init__(self, repository: str, max_age_s: Mapping[str, float], notifier: Notifier) -> None:
        self._repository = repository
        self._max_age_s = max_age_s
        self._notifier = notifier
        self._said: set[tuple[Namespace, VmName]] = set()

    def look(self, snapshots: Sequence[Snapshot], now_ms: int) -> None:
        late = overdue(snapshots, self._max_age_s, now_ms)
        for item in late:
            if (item.namespace, item.vm) not in self._said:
                age = format_duration(item.age_s)
                self._notifier.send(
                    f"casbackup: {item.vm} is not being backed up",
                    f"Its latest snapshot in {self._repository}, namespace {item.namespace}, is {age} old.",
                )
        self._said = {(item.namespace, item.vm) for item in late}
