"""Gauges that are set from a repository: quick ones at each scrape, dear ones now and then."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import structlog

from casbackup.errors import CasbackupError
from casbackup.repository.accounting import account
from casbackup.repository.indextable import read_index
from casbackup_server.jobs.overdue import latest_ms
from casbackup_server.metrics import Metrics
from casbackup_server.served import Served

_log = structlog.get_logger("casbackup.server")


def look(served: Served, metrics: Metrics) -> None:
    """Ages of VMs, and sessions."""
    now_ms = served.repository.clock.now_ms()
    found, _ = served.repository.catalog.survey()
    ages = {owner: max(0, now_ms - time_ms) / 1000 for owner, time_ms in latest_ms(found).items()}
    metrics.last_success.show(served.name, ages)
    metrics.sessions.labels(served.name).set(served.live.count())


def refresh(served: Served, metrics: Metrics) -> None:
    """Bytes of VMs and the age of what is not verified: reads the index, and takes 64 bytes a blob meanwhile."""
    try:
        _refresh(served, metrics)
    except CasbackupError as error:
        _log.warning("figures of a repository cannot be had", repository=served.name, reason=str(error))


def _refresh(served: Served, metrics: Metrics) -> None:
    sums = account(served.repository)
    owners = groupby(sums.snapshots, lambda s: (s.manifest.namespace, s.manifest.vm))
    usages = {owner: sums.usage(group) for owner, group in owners}
    metrics.logical.show(served.name, {owner: usage.logical_bytes for owner, usage in usages.items()})
    metrics.unique.show(served.name, {owner: usage.unique_bytes for owner, usage in usages.items()})
    values = read_index(served.repository.index).values
    verified = values["verified"][values["pack"] > 0].astype(np.int64)
    oldest_s = int(verified.min()) if len(verified) else served.repository.clock.now_ms() // 1000
    metrics.unverified_age.labels(served.name).set(max(0, served.repository.clock.now_ms() / 1000 - oldest_s))
