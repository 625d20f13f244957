"""The example of ``docs/how-to/retention.md`` is what the rules make of it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from casbackup.clock import format_time
from casbackup.ids import DEFAULT_NAMESPACE, SnapshotId, VmName
from casbackup.repository.catalog import Snapshot
from casbackup.repository.retention import KeepPolicy, plan_forget
from casbackup.spec.manifest import Manifest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "retention.md"


def nightly(first: datetime, nights: int) -> list[Snapshot]:
    moments = [first + timedelta(days=n) for n in range(nights)]
    return [
        Snapshot(
            SnapshotId(f"{n:064x}"),
            Manifest(DEFAULT_NAMESPACE, VmName("vm/100"), int(moment.timestamp()) * 1000, n, ()),
        )
        for n, moment in enumerate(moments, 1)
    ]


def test_example() -> None:
    text = PAGE.read_text(encoding="utf-8")
    snapshots = nightly(datetime(2026, 9, 1, 22, tzinfo=UTC), 83)
    assert "from 1 September to 22 November 2026, 83 snapshots" in text
    assert "--keep-daily 7 --keep-weekly 4 --keep-monthly 3" in text
    decisions = plan_forget(snapshots, KeepPolicy(daily=7, weekly=4, monthly=3), UTC)
    kept = [(format_time(d.snapshot.manifest.time_ms)[:10], d.reason) for d in decisions if d.keep]
    assert re.findall(r"^\| (2026-\S+) \| (.*) \|$", text, re.MULTILINE) == kept[::-1]
