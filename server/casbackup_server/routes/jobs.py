"""The jobs that the server does on a repository."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from casbackup.clock import format_time
from casbackup.limits import MAX_SERVER_JOBS_KEPT
from casbackup_server.context import Context, Ctx
from casbackup_server.jobs.job import Job, JobKind, JobState
from casbackup_server.problems import responses
from casbackup_server.rights import Right

router = APIRouter(prefix="/jobs", tags=["jobs"])

_JobPath = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="The job's id.")]


class Start(BaseModel):
    """What to do: a task by its name. `gc` and `check` are always there, `forget` where retention is configured."""

    task: str = Field(max_length=128, examples=["gc"])


class JobInfo(BaseModel):
    """How a job stands. Times are RFC 3339."""

    id: str = Field(examples=["5d" * 16])
    kind: JobKind
    task: str = Field(description="The name of the task.", examples=["nightly-check"])
    by: str = Field(description="The token that asked for it, or `schedule`.", examples=["ops"])
    state: JobState
    created: str = Field(examples=["2026-11-22T03:00:00.000Z"])
    started: str | None
    ended: str | None
    phase: str = Field(description="What it is doing; empty when it is over.", examples=["stored data"])
    done_bytes: int = Field(description="Of this phase.")
    total_bytes: int | None = Field(description="Of this phase, where that is known.")
    result: str = Field(description="What it did, or why it failed.", examples=["freed 1048576 bytes: ..."])
    error: str | None = Field(description="The code of what it failed with.", examples=["damage-found"])


class Jobs(BaseModel):
    """The newest first."""

    jobs: list[JobInfo]


class Log(BaseModel):
    """``lines`` from line ``after`` on."""

    after: int
    lines: list[str]


@router.post("", responses=responses(404, 409, 507))
async def start(context: Ctx, asked: Start) -> JobInfo:
    """Start a task, or let it wait for the one that runs. Needs `prune` for a forget, else `admin`."""
    _require(context, Right.PRUNE)
    task = context.served.jobs.task(asked.task)
    _require(context, Right.PRUNE if task.kind is JobKind.FORGET else Right.ADMIN)
    job = await context.server.threads.run(partial(context.served.jobs.start, task, context.access.name))
    context.note("job started", job=job.id, task=job.task)
    return _info(context, job)


@router.get("", responses=responses(404))
async def list_jobs(
    context: Ctx, limit: Annotated[int, Query(ge=1, le=MAX_SERVER_JOBS_KEPT, description="How many.")] = 50
) -> Jobs:
    """The jobs, the newest first. Needs `prune`."""
    _require(context, Right.PRUNE)
    return Jobs(jobs=[_info(context, job) for job in context.served.jobs.all()[:limit]])


@router.get("/{job}", responses=responses(404))
async def show(context: Ctx, job: _JobPath) -> JobInfo:
    """How a job stands. Needs `prune`."""
    _require(context, Right.PRUNE)
    return _info(context, context.served.jobs.get(job))


@router.get("/{job}/log", responses=responses(404))
async def log(
    context: Ctx,
    job: _JobPath,
    after: Annotated[int, Query(ge=0, le=2**31, description="Lines that are known already.")] = 0,
) -> Log:
    """What a job wrote down. Needs `prune`."""
    _require(context, Right.PRUNE)
    found = context.served.jobs.get(job)
    progress = context.served.jobs.progress(job)
    lines = found.log if progress is None else progress.log
    return Log(after=after, lines=list(lines[after:]))


@router.post("/{job}/cancel", responses=responses(404))
async def cancel(context: Ctx, job: _JobPath) -> JobInfo:
    """Have a job end soon; what it did is sound. Needs `prune` for a forget, else `admin`."""
    _require(context, Right.PRUNE)
    found = context.served.jobs.get(job)
    _require(context, Right.PRUNE if found.kind is JobKind.FORGET else Right.ADMIN)
    context.note("job cancelled", job=job, task=found.task)
    return _info(context, context.served.jobs.cancel(job))


def _require(context: Context, right: Right) -> None:
    """Jobs are about whole repositories."""
    context.access.require_all(right)


def _info(context: Context, job: Job) -> JobInfo:
    progress = context.served.jobs.progress(job.id)
    return JobInfo(
        id=job.id,
        kind=job.kind,
        task=job.task,
        by=job.by,
        state=job.state,
        created=format_time(job.created_ms),
        started=_time(job.started_ms),
        ended=_time(job.ended_ms),
        phase="" if progress is None else progress.title,
        done_bytes=0 if progress is None else progress.done_bytes,
        total_bytes=None if progress is None else progress.total_bytes,
        result=job.result,
        error=job.error,
    )


def _time(time_ms: int | None) -> str | None:
    return None if time_ms is None else format_time(time_ms)
