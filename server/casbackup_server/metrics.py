"""What a server tells Prometheus (``docs/how-to/monitoring.md``). A scrape reads what is in memory, and manifests."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from casbackup.ids import Namespace, VmName
from casbackup_server.jobs.job import Job, JobState

_BUCKETS = (0.005, 0.01, 0.025, 0.1, 0.25, 1, 2.5, 10, 60, 600)
_VM = ("repository", "namespace", "vm")
_METHODS = frozenset({"GET", "HEAD", "POST"})


disable_created_metrics()  # type: ignore[no-untyped-call]


class VmGauge:
    """A figure of each VM. A VM that is no more has none."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._gauge = Gauge(name, text, _VM, registry=registry)
        self._shown: dict[str, set[tuple[Namespace, VmName]]] = {}
        self._lock = threading.Lock()

    def show(self, repository: str, values: Mapping[tuple[Namespace, VmName], float]) -> None:
        """All figures of a repository."""
        with self._lock:
            for gone in self._shown.get(repository, set()) - values.keys():
                self._gauge.remove(repository, *gone)
            for owner, value in values.items():
                self._gauge.labels(repository, *owner).set(value)
            self._shown[repository] = set(values)


class Metrics:
    """Counters, and gauges that are set when they are known."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "casbackup_requests", "Requests answered.", ("method", "route", "status"), registry=registry
        )
        self._took = Histogram(
            "casbackup_request_seconds", "Time to answer.", ("method", "route"), buckets=_BUCKETS, registry=registry
        )
        self._jobs = Counter("casbackup_jobs", "Jobs ended.", ("repository", "task", "state"), registry=registry)
        self._job_ended = Gauge(
            "casbackup_job_last_success_timestamp_seconds",
            "When a task last succeeded.",
            ("repository", "task"),
            registry=registry,
        )
        self.sessions = Gauge(
            "casbackup_sessions", "Backups that clients are attached to.", ("repository",), registry=registry
        )
        self.last_success = VmGauge("casbackup_vm_last_success_age_seconds", "Age of a VM's latest snapshot.", registry)
        self.logical = VmGauge("casbackup_vm_logical_bytes", "All snapshots of a VM as they are restored.", registry)
        self.unique = VmGauge("casbackup_vm_unique_bytes", "What forgetting a VM would free.", registry)
        self.unverified_age = Gauge(
            "casbackup_unverified_age_seconds",
            "How long ago the data that was not verified for longest was; never: since 1970.",
            ("repository",),
            registry=registry,
        )
        self.gc_pending = Gauge(
            "casbackup_gc_pending_bytes", "Garbage that the last gc had to leave.", ("repository",), registry=registry
        )

    def count(self, method: str, route: str, status: int, took_s: float) -> None:
        """A request. ``route``: its path with placeholders, empty if there is none: names must not become labels."""
        known, place = method if method in _METHODS else "other", route or "none"
        self._requests.labels(known, place, str(status)).inc()
        self._took.labels(known, place).observe(took_s)

    def job_ended(self, repository: str, job: Job) -> None:
        self._jobs.labels(repository, job.task, job.state.value).inc()
        self.remember(repository, [job])

    def remember(self, repository: str, jobs: Iterable[Job]) -> None:
        """What jobs that have ended tell, the oldest first."""
        for job in jobs:
            if job.state is JobState.SUCCEEDED and job.ended_ms is not None:
                self._job_ended.labels(repository, job.task).set(job.ended_ms / 1000)
            if job.pending_bytes is not None:
                self.gc_pending.labels(repository).set(job.pending_bytes)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self.registry)
