"""The typed client of the REST interface, and the commands that use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from casbackup.errors import (
    BlobDamaged,
    ServerJobNotFound,
    ServerProtocolError,
    SnapshotNotFound,
    UsageError,
)
from casbackup.peer.http import rest
from casbackup.peer.http.address import parse_address
from casbackup.peer.http.rest import RestClient
from casbackup.peer.http.transport import Credentials
from casbackup_server.rights import Right

from .conftest import Running, committed, grant
from .test_rest import CONTENT, SIZE, backed_up


def connected(running: Running, token: str | None = None) -> RestClient:
    return RestClient(parse_address(running.url), Credentials(token), patience_s=0.5)


def test_browsing_and_reading(running: Running, tmp_path: Path, run: Any) -> None:
    made = backed_up(running, tmp_path, run)
    committed(running.local(), b"x", vm="vm/2")
    with connected(running) as client:
        assert client.namespaces() == ["default"]
        assert [(vm.name, vm.snapshots) for vm in client.vms("default")] == [("vm/100", 1), ("vm/2", 1)]
        (found,) = client.snapshots(vm="vm/100", last=1)
        assert found == client.snapshot(made.id[:10])
        assert (found.id, found.disks[0].size_bytes, found.labels) == (made.id, SIZE, ())
        assert len(client.snapshots()) == 2
        buffer = bytearray(3_000_000)
        client.read_into(found, "scsi0", 4_000_000, memoryview(buffer))
        assert buffer == CONTENT[4_000_000:7_000_000]
        client.read_into(found, "scsi0", 0, memoryview(bytearray()))
        assert client.config(found, found.configs[0].name) == b"memory: 512\n"
        assert b"".join(client.export(found, "raw", disks=("scsi0",))) == CONTENT
        with pytest.raises(SnapshotNotFound):
            client.read_into(found, "none", 0, memoryview(bytearray(5)))


def test_damage(running: Running, tmp_path: Path, run: Any) -> None:
    backed_up(running, tmp_path, run)
    for pack in running.folder.glob("packs/*/*.pack"):
        data = bytearray(pack.read_bytes())
        data[2 * 2**20] ^= 1
        pack.write_bytes(data)
    with connected(running) as client, pytest.raises(BlobDamaged):
        (found,) = client.snapshots()
        for start in range(0, 5 * 2**20, 2**19):
            client.read_into(found, "scsi0", start, memoryview(bytearray(2**19)))


def test_several_pages(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        committed(running.local(), b"x", vm=f"vm/{number}")
    original = RestClient._ask

    def small(self: RestClient, *arguments: Any, **query: Any) -> Any:
        return original(self, *arguments, **query, **({"limit": 2} if "offset" in query else {}))

    monkeypatch.setattr(RestClient, "_ask", small)
    with connected(running) as client:
        assert [s.vm for s in client.snapshots()] == [f"vm/{number}" for number in range(5)]


def test_answers_that_are_none() -> None:
    for content in ({}, {"id": 1}, None, []):
        with pytest.raises(ServerProtocolError):
            rest._snapshot(content)


def test_jobs(guarded: Running) -> None:
    with connected(guarded, grant(guarded.folder, Right.ADMIN)) as client:
        job = client.start_job("check")
        while not (job := client.job(job.id)).is_over:
            pass
        assert (job.state, job.task) == ("succeeded", "check")
        assert client.jobs() == [job]
        assert client.cancel_job(job.id) == job
        assert "tree nodes" in client.job_log(job.id)
        with pytest.raises(ServerJobNotFound):
            client.job("0" * 32)
        with pytest.raises(UsageError):
            client.start_job("nothing")


def test_commands(running: Running, run: Any) -> None:
    started = run("-r", running.url, "server-job", "start", "gc", "--wait", "--json")
    assert started.status == 0, started.err
    job = json.loads(started.out)["job"]
    assert (job["state"], job["task"]) == ("succeeded", "gc")
    assert job["id"] in run("-r", running.url, "server-job", "list").out
    assert "freed" in run("-r", running.url, "server-job", "show", job["id"]).out
    assert "marking" in run("-r", running.url, "server-job", "log", job["id"]).out
    assert run("-r", running.url, "server-job", "cancel", job["id"]).status == 0
    assert run("-r", running.url, "server-job", "show", "0" * 32, "--json").status == 1
    assert run("-r", running.folder, "server-job", "list").status == 2


def test_a_job_that_fails_is_a_failure_of_the_command(running: Running, run: Any) -> None:
    committed(running.local(), b"x" * 100_000)
    for pack in running.folder.glob("packs/*/*.pack"):
        pack.unlink()
    result = run("-r", running.url, "server-job", "start", "check", "--wait")
    assert result.status == 1
    assert "damage" in result.err
