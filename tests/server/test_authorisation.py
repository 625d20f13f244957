"""Every route against every right; what append-only means; what a token for some VMs cannot see."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import urllib3

from casbackup.clock import format_time
from casbackup.codec.codec import PLAIN
from casbackup.errors import RightMissing, SnapshotNotFound, TokenInvalid, TokenMissing
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import ConfigRecord, encode_manifest
from casbackup.spec.record import BlobKind
from casbackup.spec.wire import ATTACHMENT_HEADER, encode_snapshot
from casbackup.testing.peer import TIME_MS, chunk, stored_disk
from casbackup_server.gate import Failures
from casbackup_server.jobs.task import gc_task
from casbackup_server.problems import Refusal
from casbackup_server.rights import Right
from casbackup_server.tokens import TokenFile

from .conftest import NAME, Running, committed, grant

ATTACHMENT = "a" * 32
HTTP = urllib3.PoolManager(retries=False)


class Call(NamedTuple):
    """A request that would succeed with all rights. ``needs``: the rights without which it must be refused."""

    method: str
    path: str
    body: bytes
    needs: frozenset[Right]


def with_config(running: Running, content: bytes) -> Snapshot:
    """A snapshot that has a disk and a config."""
    session = running.local().open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
    config = PLAIN.encode_blob(BlobKind.CONFIG, b"memory: 1\n", 3)
    session.send([config])
    draft = stored_disk(session, content)
    return session.commit(replace(draft, configs=(ConfigRecord("vm.conf", 10, config.id),)))


def calls(running: Running) -> dict[str, Call]:
    """One call of each route, and whatever it needs to succeed."""
    snapshot = with_config(running, b"x" * 4096)
    copy = replace(snapshot.manifest, sequence=7, time_ms=TIME_MS + 5)
    live = running.server.repositories[NAME].live
    sessions = iter(
        [live.open(DEFAULT_NAMESPACE, VmName("vm/100"), ATTACHMENT[:-1] + digit, "nobody") for digit in "0123456789"]
    )
    record = chunk(b"y" * 100)
    body = record.header + bytes(record.payload)

    def json_of(**content: object) -> bytes:
        return json.dumps(content).encode()

    read, backup, restore, prune, admin = (frozenset({right}) for right in Right)
    jobs = running.server.repositories[NAME].jobs
    job = jobs.start(gc_task("another"), "test").id
    manifest = encode_manifest(replace(snapshot.manifest, sequence=0, parent=None))[0]
    return {
        "config": Call("GET", "/config", b"", read),
        "usage": Call("POST", "/usage", json_of(groups=[[snapshot.id]]), read),
        "manifests": Call("GET", "/manifests", b"", read),
        "find": Call("GET", "/manifests/find?reference=vm/100", b"", read),
        "annotate": Call("POST", "/manifests/annotate", json_of(id=snapshot.id, pinned=False), prune),
        "open": Call("POST", "/sessions", json_of(namespace="default", vm="vm/100", attachment=ATTACHMENT), backup),
        "resume": Call("POST", f"/sessions/{next(sessions)}/resume", json_of(attachment=ATTACHMENT[:-1] + "0"), backup),
        "known": Call("GET", f"/sessions/{next(sessions)}/known", b"", backup),
        "heartbeat": Call("POST", f"/sessions/{next(sessions)}/heartbeat", b"", backup),
        "missing": Call("POST", f"/sessions/{next(sessions)}/missing", record.id, backup),
        "records": Call("POST", f"/sessions/{next(sessions)}/records", body, backup),
        "commit": Call("POST", f"/sessions/{next(sessions)}/commit", manifest, backup),
        "adopt": Call(
            "POST", f"/sessions/{next(sessions)}/adopt", encode_snapshot(encode_manifest(copy)[0], b""), backup | prune
        ),
        "park": Call("POST", f"/sessions/{next(sessions)}/park", b"", backup),
        "abort": Call("POST", f"/sessions/{next(sessions)}/abort", b"", backup),
        "readings": Call("POST", "/readings", json_of(id="b" * 32, snapshot=snapshot.id), restore),
        "end": Call("POST", f"/readings/{'b' * 32}/end", b"", restore),
        "fetch": Call("POST", "/fetch", snapshot.manifest.disks[0].root, restore),
        "namespaces": Call("GET", "/namespaces", b"", read),
        "vms": Call("GET", "/vms", b"", read),
        "snapshots": Call("GET", "/snapshots", b"", read),
        "snapshot": Call("GET", f"/snapshots/{snapshot.id}", b"", read),
        "disk": Call("GET", f"/snapshots/{snapshot.id}/disks/scsi0", b"", restore),
        "disk-head": Call("HEAD", f"/snapshots/{snapshot.id}/disks/scsi0", b"", restore),
        "config-content": Call("GET", f"/snapshots/{snapshot.id}/configs/vm.conf", b"", restore),
        "diff": Call("GET", f"/snapshots/{snapshot.id}/diff?to={snapshot.id}", b"", restore),
        "export": Call("GET", f"/snapshots/{snapshot.id}/export?format=vma", b"", restore),
        "job-start": Call("POST", "/jobs", json_of(task="gc"), admin),
        "jobs": Call("GET", "/jobs", b"", prune),
        "job": Call("GET", f"/jobs/{job}", b"", prune),
        "job-log": Call("GET", f"/jobs/{job}/log", b"", prune),
        "job-cancel": Call("POST", f"/jobs/{job}/cancel", b"", admin),
        "forget": Call("POST", "/manifests/forget", json_of(ids=[snapshot.id]), prune),
    }


def made(running: Running, call: Call, token: str | None) -> urllib3.BaseHTTPResponse:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    if call.body.startswith(b"{"):
        headers["Content-Type"] = "application/json"
    if "/sessions/" in call.path:
        session = call.path.split("/")[2]
        live = running.server.repositories[NAME].live._sessions.get(session)  # type: ignore[call-overload]
        headers[ATTACHMENT_HEADER] = live.attachment if live is not None else ATTACHMENT
    return HTTP.request(call.method, running.api + call.path, body=call.body, headers=headers)


def test_every_route_is_in_the_matrix(guarded: Running) -> None:
    described = HTTP.request("GET", f"http://127.0.0.1:{guarded.port}/v1/openapi.json").json()
    known = {(call.method, _shape(call.path)) for call in calls(guarded).values()}
    known |= {("GET", "/key"), ("PUT", "/key")}  # test_stored_key.py has those, and an encrypted repository for them
    prefix = "/v1/repositories/{repository}"
    for path, operations in described["paths"].items():
        for method in operations:
            if path.startswith(prefix + "/"):
                assert (method.upper(), _shape(path.removeprefix(prefix))) in known, path


def _shape(path: str) -> str:
    parts = path.partition("?")[0].split("/")
    names = ("scsi0", "vm.conf")
    return "/".join("*" if len(part) in (32, 64) or part in names or part.startswith("{") else part for part in parts)


@pytest.mark.parametrize("right", Right)
def test_matrix(guarded: Running, right: Right) -> None:
    """With one right, exactly those routes work that need no other."""
    prepared = calls(guarded)
    token = grant(guarded.folder, right)
    for name, call in prepared.items():
        allowed = right is Right.ADMIN or call.needs <= {right, Right.READ}
        answer = made(guarded, call, token)
        if allowed:
            assert answer.status in (200, 204), (name, answer.data)
        else:
            assert (answer.status, _code(call, answer)) == (403, "right-missing"), name


def _code(call: Call, answer: urllib3.BaseHTTPResponse) -> str:
    """The code in the problem document; an answer to HEAD has none."""
    if call.method == "HEAD":
        return {401: "token-missing", 403: "right-missing"}[answer.status]
    return str(answer.json()["code"])


def test_without_a_token(guarded: Running) -> None:
    for name, call in calls(guarded).items():
        answer = made(guarded, call, None)
        assert (answer.status, _code(call, answer)) == (401, "token-missing"), name
        assert "www-authenticate" in answer.headers
        answer = made(guarded, call, "cb1_0123456789ab_" + "A" * 43)
        assert answer.status == 401, name
        assert call.method == "HEAD" or answer.json()["code"] == "token-invalid", name


def test_for_another_vm(guarded: Running) -> None:
    """Rights for vm/200 are none for vm/100; what belongs to the latter is not even there."""
    prepared = calls(guarded)
    token = grant(guarded.folder, Right.BACKUP, Right.RESTORE, Right.PRUNE, vms=("vm/200",))
    for name, call in prepared.items():
        answer = made(guarded, call, token)
        if name in ("config", "manifests", "end", "fetch", "forget", "namespaces", "vms", "snapshots"):
            assert answer.status in (200, 204)
        else:
            assert answer.status in (403, 404), name
    assert len(guarded.local().snapshots()) == 1  # nothing was forgotten
    with guarded.peer(token) as peer:
        assert peer.snapshots() == []
        with pytest.raises(SnapshotNotFound):
            peer.find("vm/100", DEFAULT_NAMESPACE)


def test_an_append_only_client_cannot_set_time_and_host(guarded: Running) -> None:
    with guarded.peer(grant(guarded.folder, Right.BACKUP)) as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
        draft = replace(stored_disk(session, b"x"), time_ms=TIME_MS + 10**12, host="somebody")
        snapshot = session.commit(draft)
        now_ms = guarded.repository.clock.now_ms()
        assert abs(snapshot.manifest.time_ms - now_ms) < 60_000, format_time(snapshot.manifest.time_ms)
        assert snapshot.manifest.host == "token0"
        for forbidden in (
            lambda: peer.remove([snapshot]),
            lambda: peer.annotate(snapshot, pinned=True),
            lambda: peer.open_session(DEFAULT_NAMESPACE, VmName("vm/1")).adopt(b"", snapshot.sidecar),
        ):
            with pytest.raises((RightMissing, Exception)) as raised:
                forbidden()
            assert raised.value.code in ("right-missing", "manifest-damaged")  # type: ignore[attr-defined]


def test_a_session_of_another_vm_cannot_be_taken(guarded: Running) -> None:
    with guarded.peer(grant(guarded.folder, Right.BACKUP, vms=("vm/100",))) as mine:
        session = mine.open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
        session.park()
        with (
            guarded.peer(grant(guarded.folder, Right.BACKUP, vms=("vm/200",))) as other,
            pytest.raises(RightMissing),
        ):
            other.resume_session(session.id)
        with pytest.raises(RightMissing):
            mine.open_session(DEFAULT_NAMESPACE, VmName("vm/200"))
        again = mine.resume_session(session.id)
        with pytest.raises(RightMissing):
            again.commit(stored_disk(again, b"x", vm=VmName("vm/200")))


# --- isolation


@pytest.fixture
def secret(guarded: Running) -> Snapshot:
    """A snapshot of somebody else's."""
    return committed(guarded.local(), b"secret" * 1000, vm="vm/200")


def isolated(running: Running) -> str:
    return grant(running.folder, Right.BACKUP, Right.RESTORE, isolated=True, vms=("vm/100",))


def test_an_isolated_client_is_not_told_what_exists(guarded: Running, secret: Snapshot) -> None:
    record = chunk(b"secret" * 1000)
    with guarded.peer(isolated(guarded)) as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
        assert session.missing([record.id]) == {record.id}
        stored = session.send([record])  # as if it were new
        assert stored.blobs == 1
        assert session.missing([record.id]) == set()
        session.abort()


def test_an_isolated_client_cannot_name_what_it_has_not(guarded: Running, secret: Snapshot) -> None:
    """A guessed id in a tree node would be a way to read somebody else's data."""
    from casbackup.errors import ClosureViolation
    from casbackup.spec.node import Extent
    from casbackup.testing.peer import leaf

    record = chunk(b"secret" * 1000)
    with guarded.peer(isolated(guarded)) as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
        node = leaf([Extent(6000, 0, record.id)])
        with pytest.raises(ClosureViolation):
            session.send([node])
        with pytest.raises(ClosureViolation):
            session.commit(replace(secret.manifest, sequence=0, parent=None, vm=VmName("vm/100")))
        session.send([record, node])  # whoever has the content may
        session.abort()


def test_an_isolated_client_reads_its_own_snapshots_and_no_others(guarded: Running, secret: Snapshot) -> None:
    from casbackup.errors import BlobMissing
    from casbackup.spec.record import Record

    own = committed(guarded.local(), b"mine" * 1000)
    root, others = own.manifest.disks[0].root, secret.manifest.disks[0].root
    with guarded.peer(isolated(guarded)) as peer:
        with peer.reading(own):
            found = dict(peer.fetch([root, others, chunk(b"mine" * 1000).id]))
        assert isinstance(found[root], Record)
        assert isinstance(found[others], BlobMissing)
        assert isinstance(found[chunk(b"mine" * 1000).id], Record)
        assert isinstance(dict(peer.fetch([root]))[root], BlobMissing)  # without saying what is read
        session = peer.open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
        assert session.missing([root]) == set()
        assert session.missing([others]) == {others}
        with pytest.raises(RightMissing):
            peer.usage([[own]])
        session.abort()


# --- tokens


def test_tokens_as_a_password(guarded: Running) -> None:
    token = grant(guarded.folder, Right.READ)
    credentials = base64.b64encode(f"anybody:{token}".encode()).decode()
    answer = HTTP.request("GET", guarded.api + "/config", headers={"Authorization": f"Basic {credentials}"})
    assert answer.status == 200
    for wrong in (
        "Basic !!!",
        "Basic " + base64.b64encode(b"\xff").decode(),
        "Digest x",
        "",
        "Bearer",
        "Bearer " * 999,
    ):
        answer = HTTP.request("GET", guarded.api + "/config", headers={"Authorization": wrong})
        assert answer.status == 401, wrong


def test_revoking_and_rotating_count_at_once(guarded: Running) -> None:
    file = TokenFile(str(guarded.folder))
    token = grant(guarded.folder, Right.READ)
    with guarded.peer(token) as peer:
        peer.snapshots()
        rotated = file.rotate("token0", grace_ms=60_000)
        peer.snapshots()  # the old secret is good for a while
        with guarded.peer(rotated.text) as new:
            new.snapshots()
        rotated = file.rotate("token0")
        with pytest.raises(TokenInvalid):
            peer.snapshots()
        file.revoke(rotated.token.id)
        with guarded.peer(rotated.text) as new, pytest.raises(TokenInvalid):
            new.snapshots()
    with guarded.peer() as nobody, pytest.raises(TokenMissing):
        nobody.snapshots()


def test_expiry(guarded: Running) -> None:
    from casbackup_server.rights import Grant

    file = TokenFile(str(guarded.folder))
    expired = file.create("old", Grant(frozenset({Right.READ})), lifetime_ms=0)
    good = file.create("new", Grant(frozenset({Right.READ})), lifetime_ms=60_000)
    with guarded.peer(expired.text) as peer, pytest.raises(TokenInvalid):
        peer.snapshots()
    with guarded.peer(good.text) as peer:
        peer.snapshots()
    guarded.server.gate.note_used()
    assert set(file.used()) == {good.token.id}


def test_no_secret_is_kept(guarded: Running) -> None:
    token = grant(guarded.folder, Right.READ)
    secret = token.rpartition("_")[2]
    for path in guarded.folder.glob("tokens*"):
        assert secret not in path.read_text()
    assert token not in repr(guarded.peer(token)._transport._headers.keys())


def test_wrong_tokens_are_slowed_down() -> None:
    now = [0.0]
    failures = Failures(burst=3, refill_s=10, now_s=lambda: now[0])
    for _ in range(3):
        failures.note("a")
    _refused(lambda: failures.note("a"))
    failures.note("b")
    now[0] = 11.0
    failures.note("a")
    _refused(lambda: failures.note("a"))


def _refused(action: Callable[[], None]) -> None:
    with pytest.raises(Refusal) as raised:
        action()
    assert raised.value.status == 429
