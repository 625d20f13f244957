"""Tasks as the configuration describes them."""

from __future__ import annotations

from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from casbackup.errors import ConfigInvalid, UsageError
from casbackup.jobs.sync_plan import SnapshotFilter
from casbackup.peer.http.patience import PATIENCE_S
from casbackup.repository.check import CheckOptions
from casbackup.repository.retention import KeepPolicy
from casbackup.units import parse_duration
from casbackup_server.jobs.task import OtherEnd, Task, check_task, default_tasks, forget_task, gc_task, sync_task
from casbackup_server.settings import RepositorySettings, RetentionSettings, Settings, TaskSettings


def zone_of(settings: Settings) -> ZoneInfo:
    """:raise ConfigInvalid: when there is no such time zone."""
    try:
        return ZoneInfo(settings.timezone)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ConfigInvalid(f"{settings.timezone!r} is no time zone; they look like Europe/Berlin") from error


def configured_tasks(settings: Settings) -> dict[str, list[Task]]:
    """The tasks of each repository, with those that are always there.

    :raise ConfigInvalid: when one makes no sense.
    """
    zone = zone_of(settings)
    return {name: _tasks(name, item, zone) for name, item in settings.repositories.items()}


def _tasks(name: str, settings: RepositorySettings, zone: ZoneInfo) -> list[Task]:
    tasks = {task.name: task for task in default_tasks()}
    try:
        if settings.retention is not None:
            tasks["forget"] = forget_task(_policy(settings.retention), zone)
        for task_name, item in settings.tasks.items():
            tasks[task_name] = _task(task_name, item, settings, zone)
    except UsageError as error:
        raise ConfigInvalid(f"repositories.{name}: {error}") from error
    return list(tasks.values())


def _task(name: str, item: TaskSettings, settings: RepositorySettings, zone: ZoneInfo) -> Task:
    if item.kind == "gc":
        return gc_task(name, item.cron)
    if item.kind == "check":
        budget_s = None if item.time_budget is None else parse_duration(item.time_budget)
        return check_task(
            CheckOptions(read_data=item.read_data or budget_s is not None, time_budget_s=budget_s), name, item.cron
        )
    if item.kind == "forget":
        if settings.retention is None:
            raise UsageError(f"task {name} forgets, but there is no retention")
        return forget_task(_policy(settings.retention), zone, name, item.cron)
    return _sync(name, item)


def _sync(name: str, item: TaskSettings) -> Task:
    place = item.to or item.source
    if place is None or (item.to is not None and item.source is not None):
        raise UsageError(f"task {name} needs either to or from")
    patience_s = PATIENCE_S if item.patience is None else parse_duration(item.patience)
    end = OtherEnd(place, item.source is not None, item.token_file, item.cacert, patience_s)
    chosen = SnapshotFilter(vms=tuple(item.vms), last=item.last)
    return sync_task(name, end, chosen, mirror=item.mirror, cron=item.cron)


def _policy(retention: RetentionSettings) -> KeepPolicy:
    return KeepPolicy(**retention.model_dump())
