"""A job: what it does, how it stands, how it ended."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from enum import StrEnum


class JobKind(StrEnum):
    GC = "gc"
    CHECK = "check"
    FORGET = "forget"
    SYNC = "sync"


class JobState(StrEnum):
    """``interrupted``: the server ended before the job did."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def is_over(self) -> bool:
        return self not in (JobState.WAITING, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class Job:
    """Times are milliseconds since 1970. ``by``: the token that asked for it, or ``schedule``. ``error``: the code of
    what it failed with; ``result``: what it did, or why it failed, in a line. ``pending_bytes``: of a gc.
    """

    id: str
    kind: JobKind
    task: str
    by: str
    created_ms: int
    state: JobState = JobState.WAITING
    started_ms: int | None = None
    ended_ms: int | None = None
    result: str = ""
    error: str | None = None
    pending_bytes: int | None = None
    log: tuple[str, ...] = ()


def encode_job(job: Job) -> bytes:
    return json.dumps(asdict(job), indent=1).encode() + b"\n"


def decode_job(data: bytes) -> Job | None:
    """None when the bytes are no job: history may be lost, and keeps nothing from working."""
    try:
        content = json.loads(data)
        known = {field.name: content[field.name] for field in fields(Job) if field.name in content}
        enums = {"kind": JobKind(content["kind"]), "state": JobState(content["state"])}
        return Job(**{**known, **enums, "log": tuple(content["log"])})
    except (ValueError, TypeError, KeyError):
        return None
