"""Doing the jobs of a repository, in order: one that maintains it at a time, and one sync beside it."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import structlog

from casbackup.errors import CasbackupError, RepositoryBusy, ServerJobNotFound, UsageError
from casbackup.limits import MAX_SERVER_JOBS_WAITING
from casbackup.repository.repository import Repository
from casbackup_server.jobs.history import JobHistory
from casbackup_server.jobs.job import Job, JobKind, JobState
from casbackup_server.jobs.progress import JobProgress
from casbackup_server.jobs.task import Task

_log = structlog.get_logger("casbackup.jobs")

Listener = Callable[[str, Job], None]


class JobRunner:
    """Safe from several threads. ``close`` cancels what runs and waits for it."""

    def __init__(self, name: str, repository: Repository, tasks: Sequence[Task]) -> None:
        """``tasks``: what may be asked for. ``name``: the repository's, for logs."""
        self.name = name
        self.tasks = {task.name: task for task in tasks}
        self.listeners: list[Listener] = []
        """Told, in the job's thread, of each job that has ended."""
        self._repository = repository
        self._history = JobHistory(repository.layout.root)
        self._running: dict[str, JobProgress] = {}
        self._lock = threading.Lock()
        self._maintaining = ThreadPoolExecutor(1, f"jobs-{name}")
        self._syncing = ThreadPoolExecutor(1, f"syncs-{name}")
        for job in self._history.all():
            if not job.state.is_over:
                self._history.put(replace(job, state=JobState.INTERRUPTED, result="the server was stopped"))

    def task(self, name: str) -> Task:
        """:raise UsageError: when there is none of that name."""
        task = self.tasks.get(name)
        if task is None:
            raise UsageError(f"there is no task {name!r}; there are: {', '.join(sorted(self.tasks))}")
        return task

    def start(self, task: Task, by: str) -> Job:
        """Begin it, or let it wait for its turn.

        :raise RepositoryBusy: when the same task waits or runs already, or too many wait.
        """
        with self._lock:
            going = [job for job in self._history.all() if not job.state.is_over]
            if any(job.task == task.name for job in going):
                raise RepositoryBusy(f"task {task.name} is under way already")
            if len(going) > MAX_SERVER_JOBS_WAITING:
                raise RepositoryBusy(f"{len(going)} jobs wait already")
            job = Job(secrets.token_hex(16), task.kind, task.name, by, self._repository.clock.now_ms())
            self._running[job.id] = JobProgress()
            self._history.put(job)
        pool = self._syncing if task.kind is JobKind.SYNC else self._maintaining
        pool.submit(self._do, task, job)
        return job

    def all(self) -> list[Job]:
        """The newest first."""
        return self._history.all()

    def get(self, job_id: str) -> Job:
        """:raise ServerJobNotFound: when there is none, or it was so long ago that it is forgotten."""
        job = self._history.get(job_id)
        if job is None:
            raise ServerJobNotFound(f"there is no job {job_id}")
        return job

    def progress(self, job_id: str) -> JobProgress | None:
        """None when it is over."""
        return self._running.get(job_id)

    def cancel(self, job_id: str) -> Job:
        """Have it end soon. One that is over already is no error."""
        job = self.get(job_id)
        progress = self._running.get(job_id)
        if progress is not None:
            progress.cancel()
        return job

    def close(self) -> None:
        for progress in list(self._running.values()):
            progress.cancel()
        self._maintaining.shutdown()
        self._syncing.shutdown()

    def _do(self, task: Task, job: Job) -> None:
        progress = self._running[job.id]
        job = replace(job, state=JobState.RUNNING, started_ms=self._repository.clock.now_ms())
        self._history.put(job)
        job = self._ended(task, job, progress)
        job = replace(job, ended_ms=self._repository.clock.now_ms(), log=progress.log)
        self._history.put(job)
        del self._running[job.id]
        _log.info("job ended", repository=self.name, job=job.id, task=job.task, state=job.state, result=job.result)
        for listener in self.listeners:
            listener(self.name, job)

    def _ended(self, task: Task, job: Job, progress: JobProgress) -> Job:
        try:
            progress.require_going()
            outcome = task.run(self._repository, progress)
        except CasbackupError as error:
            if progress.cancelled:
                return replace(job, state=JobState.CANCELLED, result="cancelled")
            return replace(job, state=JobState.FAILED, result=str(error), error=error.code)
        except Exception:  # noqa: BLE001  the edge of a thread
            _log.exception("job failed", repository=self.name, job=job.id, task=job.task)
            return replace(job, state=JobState.FAILED, result="an unexpected error; see the log", error="server-fault")
        return replace(job, state=JobState.SUCCEEDED, result=outcome.result, pending_bytes=outcome.pending_bytes)
