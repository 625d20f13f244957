"""Starting tasks by the clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import partial
from zoneinfo import ZoneInfo

import structlog
from apscheduler.schedulers.background import BackgroundScheduler  # type: ignore[import-untyped]
from apscheduler.triggers.cron import CronTrigger  # type: ignore[import-untyped]

from casbackup.errors import CasbackupError, ConfigInvalid
from casbackup.units import parse_duration
from casbackup_server.figures import refresh
from casbackup_server.jobs.job import Job
from casbackup_server.jobs.notify import Notifier, report_failure
from casbackup_server.jobs.overdue import Watch
from casbackup_server.jobs.runner import JobRunner
from casbackup_server.jobs.task import Task
from casbackup_server.metrics import Metrics
from casbackup_server.served import Served
from casbackup_server.settings import Settings

_LATE_S = 3600
"""A task whose time passed while the machine slept is still done so much later."""
_WATCH_MINUTES = 10
_FIGURES_HOURS = 6

_log = structlog.get_logger("casbackup.jobs")


@contextlib.contextmanager
def scheduled(
    settings: Settings, repositories: Mapping[str, Served], zone: ZoneInfo, notifier: Notifier, metrics: Metrics
) -> Iterator[None]:
    """While this is entered, tasks are started when their time comes, and VMs are watched.

    :raise ConfigInvalid: when a cron line or a duration is not understood.
    """
    scheduler = BackgroundScheduler(timezone=zone)
    for name, served in repositories.items():
        metrics.remember(name, reversed(served.jobs.all()))
        served.jobs.listeners.append(partial(_ended, notifier, metrics))
        for task in served.jobs.tasks.values():
            if task.cron is not None:
                scheduler.add_job(_start, _trigger(task.cron, zone), [served.jobs, task], misfire_grace_time=_LATE_S)
        if settings.repositories[name].max_age:
            watch = Watch(name, _limits(settings.repositories[name].max_age), notifier)
            scheduler.add_job(_look, "interval", [served, watch], minutes=_WATCH_MINUTES)
        scheduler.add_job(
            refresh, "interval", [served, metrics], hours=_FIGURES_HOURS, next_run_time=datetime.now(zone)
        )
    scheduler.start()
    try:
        yield
    finally:
        scheduler.shutdown(wait=False)


def _trigger(cron: str, zone: ZoneInfo) -> CronTrigger:
    try:
        return CronTrigger.from_crontab(cron, timezone=zone)
    except ValueError as error:
        raise ConfigInvalid(f"{cron!r} is no line of cron: {error}") from error


def _limits(max_age: Mapping[str, str]) -> dict[str, float]:
    try:
        return {pattern: parse_duration(text) for pattern, text in max_age.items()}
    except CasbackupError as error:
        raise ConfigInvalid(f"max-age: {error}") from error


def _start(jobs: JobRunner, task: Task) -> None:
    """One that is still under way since last time is left to it."""
    try:
        jobs.start(task, "schedule")
    except CasbackupError as error:
        _log.warning("task not started", repository=jobs.name, task=task.name, reason=str(error))


def _ended(notifier: Notifier, metrics: Metrics, repository: str, job: Job) -> None:
    metrics.job_ended(repository, job)
    report_failure(notifier, repository, job)


def _look(served: Served, watch: Watch) -> None:
    found, _ = served.repository.catalog.survey()
    watch.look(found, served.repository.clock.now_ms())
