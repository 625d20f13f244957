"""Metrics and health."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import urllib3

from casbackup.errors import RightMissing, TokenInvalid
from casbackup_server.figures import refresh
from casbackup_server.jobs.job import Job, JobKind, JobState
from casbackup_server.routes.health import _admit

from .conftest import NAME, Running, committed

HTTP = urllib3.PoolManager(retries=False)


def get(running: Running, path: str, **headers: str) -> urllib3.BaseHTTPResponse:
    return HTTP.request("GET", f"http://127.0.0.1:{running.port}{path}", headers=headers)


def test_health(running: Running) -> None:
    assert (get(running, "/healthz").status, get(running, "/healthz").data) == (200, b"ok\n")
    assert get(running, "/readyz").json() == {"repositories": 1}
    (running.folder / "config.json").rename(running.folder / "away")
    assert get(running, "/readyz").status == 503
    assert get(running, "/healthz").status == 200


def test_metrics(running: Running) -> None:
    snapshot = committed(running.local(), b"x" * 4096)
    get(running, f"/v1/repositories/main/snapshots/{snapshot.id}")
    get(running, "/no/such/place")
    served = running.server.repositories[NAME]
    refresh(served, running.server.metrics)
    ended = Job("0" * 32, JobKind.GC, "gc", "me", 0, JobState.SUCCEEDED, ended_ms=5000, pending_bytes=77)
    running.server.metrics.job_ended(NAME, ended)
    text = get(running, "/metrics").data.decode()
    vm = '{namespace="default",repository="main",vm="vm/100"}'
    assert f"casbackup_vm_logical_bytes{vm} 4096.0" in text
    assert f"casbackup_vm_unique_bytes{vm} " in text
    assert f"casbackup_vm_last_success_age_seconds{vm} " in text
    assert 'casbackup_gc_pending_bytes{repository="main"} 77.0' in text
    assert 'casbackup_jobs_total{repository="main",state="succeeded",task="gc"} 1.0' in text
    assert 'casbackup_job_last_success_timestamp_seconds{repository="main",task="gc"} 5.0' in text
    assert 'casbackup_sessions{repository="main"} 0.0' in text
    assert 'casbackup_unverified_age_seconds{repository="main"}' in text
    assert 'route="/snapshots/{snapshot}",status="200"} 1.0' in text
    assert 'route="none",status="404"} 1.0' in text
    assert snapshot.id not in text
    running.local().remove([snapshot])
    refresh(served, running.server.metrics)
    assert "vm/100" not in get(running, "/metrics").data.decode()


def test_metrics_are_for_this_machine(running: Running) -> None:
    assert get(running, "/metrics").status == 200
    assert get(running, "/metrics", **{"X-Forwarded-For": "192.0.2.1"}).status == 403
    stranger = SimpleNamespace(client=SimpleNamespace(host="192.0.2.1"), headers={})
    with pytest.raises(RightMissing):
        _admit(stranger, None)  # type: ignore[arg-type]


def test_or_for_whoever_shows_the_token() -> None:
    request = SimpleNamespace(client=SimpleNamespace(host="192.0.2.1"), headers={"authorization": "Bearer secret"})
    _admit(request, "secret")  # type: ignore[arg-type]
    with pytest.raises(TokenInvalid):
        _admit(request, "another")  # type: ignore[arg-type]
