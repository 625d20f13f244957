"""Jobs of a server: doing, refusing, cancelling, remembering them; schedules, notifications, retention."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import urllib3

from casbackup.errors import ConfigInvalid, RepositoryBusy, UsageError
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.jobs.sync_plan import SnapshotFilter
from casbackup.repository.repository import Repository
from casbackup.repository.retention import KeepPolicy
from casbackup.testing.peer import TIME_MS
from casbackup.testing.peer import committed as stored
from casbackup_server.jobs import overdue
from casbackup_server.jobs.configured import configured_tasks, zone_of
from casbackup_server.jobs.history import JobHistory
from casbackup_server.jobs.job import Job, JobKind, JobState, decode_job
from casbackup_server.jobs.notify import AppriseNotifier, report_failure
from casbackup_server.jobs.progress import JobProgress
from casbackup_server.jobs.runner import JobRunner
from casbackup_server.jobs.schedule import scheduled
from casbackup_server.jobs.task import OtherEnd, Outcome, Task, forget_task, sync_task
from casbackup_server.settings import read_settings

from .conftest import NAME, Running, committed, serving
from .proxy import Proxy

HTTP = urllib3.PoolManager(retries=False)


class Told:
    """A notifier that remembers."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def send(self, title: str, text: str) -> None:
        self.titles.append(title)


def ask(running: Running, method: str, path: str = "", **body: object) -> dict[str, Any]:
    options = {"json": body} if body else {}
    answer = HTTP.request(method, running.api + "/jobs" + path, **options)
    return {"status": answer.status, **answer.json()}


def over(running: Running, job: str) -> dict[str, Any]:
    return _until(lambda: ask(running, "GET", f"/{job}"), lambda found: found["ended"] is not None)


def _until(look: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 20
    while not good(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def slow_task(entered: threading.Event, name: str = "slow") -> Task:
    """Runs until it is cancelled."""

    def run(_: Repository, progress: JobProgress) -> Outcome:
        progress.start("waiting", 100)
        entered.set()
        while True:
            progress.advance(done=1)
            time.sleep(0.005)

    return Task(name, JobKind.GC, run)


def test_gc_and_check(running: Running) -> None:
    snapshot = committed(running.local(), b"x" * 100_000)
    running.local().remove([snapshot])
    started = ask(running, "POST", task="gc")
    assert started["status"] == 200
    ended = over(running, started["id"])
    assert (ended["state"], ended["error"]) == ("succeeded", None)
    assert "freed" in ended["result"]
    checked = over(running, ask(running, "POST", task="check")["id"])
    assert checked["state"] == "succeeded"
    assert [job["task"] for job in ask(running, "GET")["jobs"]] == ["check", "gc"]
    assert "marking" in ask(running, "GET", f"/{ended['id']}/log")["lines"]
    assert ask(running, "GET", f"/{ended['id']}/log?after=1000")["lines"] == []


@pytest.mark.parametrize("how", ["stalled", "down"])
def test_a_sync_whose_other_end_is_stuck_is_cancelled_at_once(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the server stops soon, too: it cancels what runs."""
    monkeypatch.setattr("casbackup.peer.http.transport._BRIEF", urllib3.Timeout(connect=0.5, read=0.5))
    monkeypatch.setattr("casbackup_server.jobs.task._LEAVING_S", 0.5)
    with serving(tmp_path / "there") as there, serving(tmp_path / "here") as here, Proxy(there.port) as proxy:
        committed(here.local(), b"x" * 100_000)
        proxy.latency_s = 3600 if how == "stalled" else 0.0
        if how == "down":
            proxy.cut_after_bytes = 1000
            proxy._target = 9
        task = sync_task(
            "off", OtherEnd(f"http://127.0.0.1:{proxy.port}/{NAME}", False), SnapshotFilter(), mirror=False
        )
        runner = JobRunner("x", here.repository, [task])
        job = runner.start(task, "test")
        _until(lambda: proxy.connections, bool)
        time.sleep(0.5)
        began_s = time.monotonic()
        runner.close()
        assert time.monotonic() - began_s < 5
        assert runner.get(job.id).state is JobState.CANCELLED if how == "stalled" else runner.get(job.id).state.is_over


def test_damage_makes_a_check_fail(running: Running) -> None:
    committed(running.local(), b"x" * 100_000)
    for pack in running.folder.glob("packs/*/*.pack"):
        pack.unlink()
    running.repository.store.storage.close()
    ended = over(running, ask(running, "POST", task="check")["id"])
    assert (ended["state"], ended["error"]) == ("failed", "damage-found")


def test_what_is_refused(running: Running) -> None:
    assert ask(running, "POST", task="nothing")["code"] == "usage"
    assert ask(running, "GET", "/" + "0" * 32)["code"] == "server-job-not-found"
    entered = threading.Event()
    jobs = running.server.repositories[NAME].jobs
    first = jobs.start(slow_task(entered), "test")
    with pytest.raises(RepositoryBusy):
        jobs.start(slow_task(entered), "test")
    waiting = ask(running, "POST", task="gc")
    assert entered.wait(10)
    assert ask(running, "GET", f"/{waiting['id']}")["state"] == "waiting"
    committed(running.local(), b"backups go on")
    jobs.cancel(first.id)
    assert over(running, first.id)["state"] == "cancelled"
    assert over(running, waiting["id"])["state"] == "succeeded"


def test_cancelling(running: Running) -> None:
    entered = threading.Event()
    jobs = running.server.repositories[NAME].jobs
    first, second = jobs.start(slow_task(entered), "test"), jobs.start(slow_task(entered, "later"), "test")
    assert entered.wait(10)
    shown = _until(lambda: ask(running, "GET", f"/{first.id}"), lambda found: found["done_bytes"] > 0)
    assert (shown["state"], shown["phase"], shown["total_bytes"]) == ("running", "waiting", 100)
    for job in (second, first):
        assert ask(running, "POST", f"/{job.id}/cancel")["status"] == 200
    assert {over(running, job.id)["state"] for job in (first, second)} == {"cancelled"}
    assert ask(running, "POST", f"/{first.id}/cancel")["state"] == "cancelled"  # it is over: no error


def test_history_survives_and_says_what_was_cut_short(tmp_path: Path) -> None:
    Repository.create(str(tmp_path / "r")).close()
    history = JobHistory(str(tmp_path / "r"), most=3)
    for number in range(6):
        history.put(Job(f"{number:032x}", JobKind.GC, f"t{number}", "me", number, JobState.SUCCEEDED))
    history.put(Job("f" * 32, JobKind.GC, "cut", "me", 9, JobState.RUNNING))
    assert [job.task for job in JobHistory(str(tmp_path / "r")).all()] == ["cut", "t5", "t4"]
    (tmp_path / "r" / "jobs" / "x.json").write_text("rubbish")
    with Repository.open(str(tmp_path / "r")) as repository:
        runner = JobRunner("r", repository, [])
        assert runner.get("f" * 32).state is JobState.INTERRUPTED
        runner.close()


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b'{"kind": "gc"}', b'{"kind": "x", "state": "y"}'])
def test_files_that_are_no_jobs(data: bytes) -> None:
    assert decode_job(data) is None


def test_retention(running: Running) -> None:
    for hour in range(5):
        stored(running.local(), bytes([hour]) * 100, time_ms=TIME_MS + hour * 3_600_000)
    jobs = running.server.repositories[NAME].jobs
    ended = over(running, jobs.start(forget_task(KeepPolicy(last=2), ZoneInfo("UTC")), "test").id)
    assert ended["result"] == "forgot 3 of 5 snapshots"
    assert len(running.local().snapshots()) == 2


def test_sync(running: Running, tmp_path: Path) -> None:
    snapshot = committed(running.local(), b"x" * 5000)
    Repository.create(str(tmp_path / "other")).close()
    jobs = running.server.repositories[NAME].jobs
    task = sync_task("offsite", OtherEnd(str(tmp_path / "other"), False), SnapshotFilter(), mirror=False)
    ended = over(running, jobs.start(task, "test").id)
    assert ended["state"] == "succeeded", ended
    with Repository.open(str(tmp_path / "other")) as other:
        assert [s.id for s in other.catalog.all()] == [snapshot.id]
    gone = sync_task("gone", OtherEnd(str(tmp_path / "nothing"), True), SnapshotFilter(), mirror=False)
    assert over(running, jobs.start(gone, "test").id)["error"] == "repository-not-found"


CONFIG = """
timezone = "Europe/Berlin"
[repositories.main]
path = "r"
retention = { daily = 7 }
max-age = { "vm/*" = "26h" }
[repositories.main.tasks.nightly]
kind = "check"
cron = "0 4 * * *"
time-budget = "1h"
[repositories.main.tasks.offsite]
kind = "sync"
to = "https://offsite.example.com:8007/main"
last = 3
"""


def settings_of(tmp_path: Path, text: str) -> Any:
    (tmp_path / "server.toml").write_text(text)
    return read_settings(str(tmp_path / "server.toml"))


def test_configuration(tmp_path: Path) -> None:
    tasks = {task.name: task for task in configured_tasks(settings_of(tmp_path, CONFIG))["main"]}
    assert set(tasks) == {"gc", "check", "forget", "nightly", "offsite"}
    assert tasks["nightly"].cron == "0 4 * * *"
    assert tasks["offsite"].kind is JobKind.SYNC


@pytest.mark.parametrize(
    "change",
    [
        ('timezone = "Europe/Berlin"', 'timezone = "Nowhere/At-All"'),
        ("retention = { daily = 7 }", "retention = { daily = -1 }"),
        ("retention = { daily = 7 }", "retention = { }"),
        ('time-budget = "1h"', 'time-budget = "soon"'),
        ('to = "https://offsite.example.com:8007/main"', ""),
        ('kind = "check"', 'kind = "destroy"'),
        ("last = 3", "last = 0"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path: Path, change: tuple[str, str]) -> None:
    assert change[0] in CONFIG
    with pytest.raises(ConfigInvalid):
        configured_tasks(settings_of(tmp_path, CONFIG.replace(*change)))


def test_schedule(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is due is started; what fails is told."""
    from apscheduler.triggers.date import DateTrigger

    from casbackup_server.jobs import schedule

    monkeypatch.setattr(schedule, "_trigger", lambda *_: DateTrigger())
    served = running.server.repositories[NAME]

    def fail(*_: object) -> Outcome:
        raise UsageError("no")

    served.jobs.tasks["bad"] = Task("bad", JobKind.GC, fail, cron="* * * * *")
    settings, told = settings_of(tmp_path, CONFIG), Told()
    with scheduled(settings, {NAME: served}, zone_of(settings), told, running.server.metrics):
        _until(lambda: told.titles, bool)
    assert told.titles == ["casbackup: bad of main failed"]
    assert served.jobs.all()[0].by == "schedule"


def test_a_cron_line_that_is_none(running: Running, tmp_path: Path) -> None:
    served = running.server.repositories[NAME]
    served.jobs.tasks["bad"] = Task("bad", JobKind.GC, lambda *_: Outcome(""), cron="every day")
    settings = settings_of(tmp_path, CONFIG)
    with (
        pytest.raises(ConfigInvalid),
        scheduled(settings, {NAME: served}, zone_of(settings), Told(), running.server.metrics),
    ):
        raise AssertionError


def test_overdue_vms_are_told_of_once(running: Running) -> None:
    local, told = running.local(), Told()
    stored(local, b"a", vm=VmName("vm/100"), namespace=DEFAULT_NAMESPACE)
    stored(local, b"b", vm=VmName("vm/lab1"), namespace=DEFAULT_NAMESPACE)
    watch = overdue.Watch("main", {"vm/lab*": 1e9, "vm/*": 3600.0}, told)
    watch.look(local.snapshots(), TIME_MS + 3_599_000)
    assert told.titles == []
    for later_ms in (3_601_000, 9_000_000):
        watch.look(local.snapshots(), TIME_MS + later_ms)
    assert told.titles == ["casbackup: vm/100 is not being backed up"]
    stored(local, b"c", vm=VmName("vm/100"), namespace=DEFAULT_NAMESPACE, time_ms=TIME_MS + 9_000_000)
    watch.look(local.snapshots(), TIME_MS + 9_000_001)
    watch.look(local.snapshots(), TIME_MS + 90_000_000)
    assert len(told.titles) == 2


def test_only_failures_are_told_of() -> None:
    told = Told()
    for state in JobState:
        report_failure(told, "main", Job("0" * 32, JobKind.GC, "gc", "me", 0, state))
    assert told.titles == ["casbackup: gc of main failed"]


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
def test_a_notification_that_cannot_be_sent_harms_nothing() -> None:
    AppriseNotifier(["json://127.0.0.1:1/", "nonsense"]).send("title", "text")
