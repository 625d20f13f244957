"""The repositories of a server, open, and what routes need besides."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from casbackup.limits import MAX_REST_EXPORTS, REST_CACHE_BYTES
from casbackup.peer.api import Peer
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup_server.audit import Audit
from casbackup_server.bodies import BodyMemory
from casbackup_server.budget import ByteBudget
from casbackup_server.gate import Gate
from casbackup_server.jobs.runner import JobRunner
from casbackup_server.jobs.task import Task, default_tasks
from casbackup_server.live import LiveSessions
from casbackup_server.metrics import Metrics
from casbackup_server.opensnapshots import OpenSnapshots
from casbackup_server.threads import Threads


@dataclass(frozen=True, slots=True)
class Browsed:
    """A repository under its name, as far as it is looked at and restored from."""

    name: str
    peer: Peer
    reading: OpenSnapshots


@dataclass(frozen=True, slots=True)
class Served(Browsed):
    """A repository under its name."""

    peer: LocalPeer
    repository: Repository
    live: LiveSessions
    jobs: JobRunner


@dataclass(frozen=True, slots=True)
class Host:
    """What all requests to look and restore share."""

    repositories: Mapping[str, Browsed]
    gate: Gate
    audit: Audit
    threads: Threads
    exports: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(MAX_REST_EXPORTS), kw_only=True
    )
    metrics: Metrics = field(default_factory=Metrics, kw_only=True)


@dataclass(frozen=True, slots=True)
class Server(Host):
    """What all requests share."""

    repositories: Mapping[str, Served]
    uploading: ByteBudget
    metrics_token: str | None = None
    """Who asks for metrics must show it; None: only this machine may ask."""
    bodies: BodyMemory = field(default_factory=BodyMemory)


@contextlib.contextmanager
def opened(paths: Mapping[str, str], tasks: Mapping[str, Sequence[Task]] | None = None) -> Iterator[dict[str, Served]]:
    """Open the repositories; at the end their jobs are cancelled and their sessions parked. ``tasks``: what jobs may be
    asked for, by repository.

    :raise RepositoryError: when one cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        found: dict[str, Served] = {}
        for name, path in paths.items():
            repository = stack.enter_context(Repository.open(path))
            live = LiveSessions(repository)
            stack.callback(live.close)
            peer = LocalPeer(repository)
            reading = OpenSnapshots(peer, REST_CACHE_BYTES // len(paths), partial(_current, repository))
            stack.callback(reading.close)
            jobs = JobRunner(name, repository, (tasks or {}).get(name, default_tasks()))
            stack.callback(jobs.close)
            found[name] = Served(name, peer, reading, repository, live, jobs)
        yield found


def _current(repository: Repository, snapshot: Snapshot) -> Snapshot | None:
    """The snapshot as the catalog has it now, if it still has it."""
    found = repository.catalog.get(snapshot.key)
    return found if found is not None and found.id == snapshot.id else None
