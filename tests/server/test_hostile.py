"""What no honest client sends."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import urllib3

from casbackup.codec.codec import PLAIN
from casbackup.errors import BlobDamaged, CasbackupError, NodeInvalid, UsageError
from casbackup.ids import DEFAULT_NAMESPACE, ZERO_ID, DiskName, VmName
from casbackup.limits import MAX_QUESTION_IDS, MAX_REQUEST_BYTES, MAX_UPLOAD_BYTES, SEGMENT_BYTES
from casbackup.peer.http.session import HttpSession
from casbackup.spec.manifest import DiskRecord, encode_manifest
from casbackup.spec.record import BlobKind, Record
from casbackup.spec.wire import ATTACHMENT_HEADER
from casbackup.testing.peer import chunk, full_leaf, inner, stored_disk
from casbackup_server import guard, protocol

from .conftest import Running, committed

VM = VmName("vm/100")
HTTP = urllib3.PoolManager(retries=False)


@pytest.fixture
def session(running: Running) -> Iterator[HttpSession]:
    with running.peer() as peer:
        made = peer.open_session(DEFAULT_NAMESPACE, VM)
        yield made
        with contextlib.suppress(CasbackupError):
            made.abort()


def post(running: Running, session: HttpSession, path: str, body: bytes) -> tuple[int, str]:
    """Status and code of a request of the session's."""
    answer = HTTP.request(
        "POST",
        f"{running.api}/sessions/{session.id}{path}",
        body=body,
        headers={ATTACHMENT_HEADER: session._attachment},
    )
    return answer.status, "" if answer.status < 300 else answer.json()["code"]


def raw(record: Record) -> bytes:
    return record.header + bytes(record.payload)


def damaged(record: Record, at: int) -> bytes:
    data = bytearray(raw(record))
    data[at] ^= 1
    return bytes(data)


def forged(plain: bytes, claimed: Record) -> bytes:
    """A record whose checksum is right and whose content is not that of its id."""
    from casbackup.codec.hashing import record_checksum
    from casbackup.spec.record import pack_checked

    checked = pack_checked(BlobKind.CHUNK, 0, len(plain), len(plain), claimed.id)
    return checked + record_checksum(checked, plain) + plain


def test_records_that_are_none(running: Running, session: HttpSession) -> None:
    record = chunk(b"x" * 5000)
    whole = raw(record)
    for body, expected in (
        (b"x", (400, "server-protocol")),
        (whole[:-1], (400, "server-protocol")),
        (whole + whole[:70], (400, "server-protocol")),
        (b"\0" * 64, (422, "blob-damaged")),
        (damaged(record, 0), (422, "blob-damaged")),
        (damaged(record, 20), (422, "blob-damaged")),
        (damaged(record, 50), (422, "blob-damaged")),
        (damaged(record, len(whole) - 1), (422, "blob-damaged")),
        (forged(b"y" * 5000, record), (422, "blob-damaged")),
        (whole[:8] + b"\xff\xff\xff\xff" + whole[12:], (400, "server-protocol")),
    ):
        assert post(running, session, "/records", body) == expected
        assert session.missing([record.id]) == {record.id}
    assert post(running, session, "/records", b"") == (200, "")
    assert post(running, session, "/records", whole) == (200, "")


def test_one_bad_record_spoils_its_request(running: Running, session: HttpSession) -> None:
    good, bad = chunk(b"good"), chunk(b"bad")
    assert post(running, session, "/records", raw(good) + damaged(bad, 65))[0] == 422
    assert session.missing([good.id, bad.id]) == {good.id, bad.id}


def test_a_bomb_is_not_unpacked(running: Running, session: HttpSession) -> None:
    import zstandard

    from casbackup.codec.hashing import record_checksum
    from casbackup.spec.record import FLAG_ZSTD, pack_checked

    payload = zstandard.ZstdCompressor().compress(bytes(200 * 2**20))
    checked = pack_checked(BlobKind.CHUNK, FLAG_ZSTD, len(payload), 5000, chunk(b"x" * 5000).id)
    body = checked + record_checksum(checked, payload) + payload
    assert post(running, session, "/records", body) == (422, "blob-damaged")


def test_questions_that_make_no_sense(running: Running, session: HttpSession) -> None:
    assert post(running, session, "/missing", b"x" * 31) == (400, "server-protocol")
    assert post(running, session, "/missing", ZERO_ID) == (400, "server-protocol")
    assert post(running, session, "/missing", b"x" * 32 * (MAX_QUESTION_IDS + 1)) == (413, "request-refused")
    assert post(running, session, "/missing", b"x" * 32 * MAX_QUESTION_IDS) == (200, "")


def test_too_large_is_refused_before_it_is_read(running: Running, session: HttpSession) -> None:
    for path, size in (("/records", MAX_UPLOAD_BYTES + 1), ("/missing", MAX_REQUEST_BYTES + 1)):
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        connection.putrequest("POST", f"/v1/repositories/main/sessions/{session.id}{path}")
        connection.putheader("Content-Length", str(size))
        connection.putheader(ATTACHMENT_HEADER, session._attachment)
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.loads(answer.read())["code"] == "request-refused"
        connection.close()


def test_an_upload_must_say_its_length(running: Running, session: HttpSession) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    connection.request(
        "POST",
        f"/v1/repositories/main/sessions/{session.id}/records",
        body=iter([b"abc"]),
        headers={ATTACHMENT_HEADER: session._attachment},
        encode_chunked=True,
    )
    assert connection.getresponse().status == 411
    connection.close()


def test_chunked_bodies_have_limits_too(running: Running, session: HttpSession) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request(
            "POST",
            f"/v1/repositories/main/sessions/{session.id}/missing",
            body=iter([bytes(2**20)] * 9),
            headers={ATTACHMENT_HEADER: session._attachment, "Content-Type": "application/octet-stream"},
            encode_chunked=True,
        )
        assert connection.getresponse().status == 413
    connection.close()


def test_roots_that_could_not_be_walked(running: Running, session: HttpSession) -> None:
    """A chunk in a root's place, or a root of another level, would stop every gc of the repository."""
    record = chunk(b"k" * 4096)
    leaf = full_leaf(record)
    tall = inner(1, [leaf.id])
    session.send([record, leaf, tall])
    for root, size in ((record.id, 4096), (leaf.id, 5 * SEGMENT_BYTES), (tall.id, 4096), (tall.id, 2**40)):
        draft = replace(_draft(session), disks=(DiskRecord(DiskName("scsi0"), size, root),))
        with pytest.raises(NodeInvalid):
            session.commit(draft)
    assert running.local().snapshots() == []


def test_manifests_that_exceed_limits(running: Running, session: HttpSession) -> None:
    draft = _draft(session)
    disk = draft.disks[0]
    for bad in (
        replace(draft, labels=("not a label",)),
        replace(draft, labels=("x",) * 65),
        replace(draft, notes="x" * 100_000),
        replace(draft, host="x" * 5000),
        replace(draft, disks=(disk, disk)),
        replace(draft, disks=tuple(replace(disk, name=DiskName(f"d{n}")) for n in range(255))),
    ):
        with pytest.raises(UsageError):
            session.commit(bad)
    for given in (replace(draft, sequence=3), replace(draft, parent="x" * 64)):  # type: ignore[arg-type]
        assert post(running, session, "/commit", encode_manifest(given)[0]) == (400, "server-protocol")
    assert post(running, session, "/commit", b"rubbish") == (422, "manifest-damaged")
    session.commit(draft)


def _draft(session: HttpSession):  # type: ignore[no-untyped-def]
    return stored_disk(session, b"x" * 4096)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/repositories/../../etc/passwd",
        "/v1/repositories/..%2f..%2fetc/config",
        "/v1/repositories/main%00/config",
        "/v1/repositories/main/sessions/..%2f..%2fx/known",
        "/v1/repositories/main/sessions/" + "0" * 33 + "/known",
        "/v1/repositories/" + "x" * 5000 + "/config",
        "/v1/repositories/other/config",
        "//v1/repositories/main/config",
        "/v1/repositories/main/config/",
    ],
)
def test_paths_that_lead_nowhere(running: Running, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    connection.putrequest("GET", path, skip_host=False)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status in (404, 405, 422, 400)
    if body:
        assert "code" in json.loads(body)
    connection.close()


@pytest.mark.parametrize("name", ["vm/../x", "vm/", "x", "vm/a/b", "vm/.hidden", "vm/\u0000", "vm/" + "x" * 200])
def test_names_that_are_none(running: Running, name: str) -> None:
    body = json.dumps({"namespace": "default", "vm": name, "attachment": "a" * 32}).encode()
    json_type = {"Content-Type": "application/json"}
    answer = HTTP.request("POST", running.api + "/sessions", body=body, headers=json_type)
    assert answer.status in (400, 422)
    body = json.dumps({"namespace": "../x", "vm": "vm/1", "attachment": "a" * 32}).encode()
    assert HTTP.request("POST", running.api + "/sessions", body=body, headers=json_type).status == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"groups": 1}', b"\xff\xfe", b"[" * 100_000])
def test_json_that_is_none(running: Running, body: bytes) -> None:
    answer = HTTP.request("POST", running.api + "/usage", body=body, headers={"Content-Type": "application/json"})
    assert answer.status in (400, 422)
    assert answer.json()["code"] in ("usage", "server-protocol")


def test_a_foreign_attachment(running: Running, session: HttpSession) -> None:
    answer = HTTP.request(
        "POST",
        f"{running.api}/sessions/{session.id}/abort",
        headers={ATTACHMENT_HEADER: "f" * 32},
    )
    assert (answer.status, answer.json()["code"]) == (409, "session-busy")


def test_a_body_that_does_not_come(running: Running, session: HttpSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_PAUSE_S", 0.3)
    connection = _half_a_request(running, session)
    answer = connection.recv(4096)
    assert b" 408 " in answer
    connection.close()


def test_a_body_that_drips(running: Running, session: HttpSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_PAUSE_S", 0.3)
    connection = _half_a_request(running, session)
    began_s = time.monotonic()
    connection.settimeout(0.1)
    answer = b""
    while not answer and time.monotonic() - began_s < 10:
        with contextlib.suppress(OSError):
            connection.sendall(b"x")
        with contextlib.suppress(TimeoutError):
            answer = connection.recv(4096)
    assert b" 408 " in answer
    connection.close()


def _half_a_request(running: Running, session: HttpSession) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=10)
    connection.sendall(
        f"POST /v1/repositories/main/sessions/{session.id}/records HTTP/1.1\r\nHost: x\r\n"
        f"Content-Length: 1000000\r\n{ATTACHMENT_HEADER}: {session._attachment}\r\n\r\nxx".encode()
    )
    return connection


@pytest.mark.parametrize("said", [b"", b"GET /v1/openapi.json HTTP/1.1\r\nHost: "])
def test_a_head_that_does_not_come(running: Running, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.3)
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(said)
        assert connection.recv(100) == b""


def test_many_slow_connections_keep_nobody_out(running: Running) -> None:
    slow = [socket.create_connection(("127.0.0.1", running.port), timeout=10) for _ in range(200)]
    for connection in slow:
        connection.sendall(b"POST /v1/x HTTP/1.1\r\n")
    with running.peer() as peer:
        committed(peer, b"x" * 4096)
    for connection in slow:
        connection.close()


def test_a_record_of_the_largest_blob_passes(running: Running, session: HttpSession) -> None:
    import random

    config = PLAIN.encode_blob(BlobKind.CONFIG, random.Random(1).randbytes(16 * 2**20), 2)
    session.send([config])
    assert session.missing([config.id]) == set()


def test_an_error_that_nobody_expected_is_a_problem_document(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(running.repository.catalog, "survey", broken)
    answer = HTTP.request("GET", running.api + "/manifests")
    assert (answer.status, answer.json()["code"]) == (500, "server-fault")
    assert "bug" not in answer.json()["detail"]


def test_ids_are_checked_by_the_client_too(session: HttpSession) -> None:
    with pytest.raises(BlobDamaged):
        session.send([chunk(b"a")._replace(id=chunk(b"b").id)])
