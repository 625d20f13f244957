"""Bodies of uploads are put into memory by the kernel, past the HTTP parser: whatever the pieces in which they come,
nothing is lost, added, or taken for something else.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casbackup.errors import CasbackupError
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.peer.http.address import parse_address
from casbackup.peer.http.peer import HttpPeer
from casbackup.peer.http.session import HttpSession
from casbackup.peer.http.transport import Credentials
from casbackup.spec.record import Record
from casbackup.spec.wire import ATTACHMENT_HEADER, unpack_flags
from casbackup.testing.peer import chunk
from casbackup_server import guard

from .conftest import Running, serving


@pytest.fixture
def session(running: Running) -> Iterator[HttpSession]:
    with running.peer() as peer:
        made = peer.open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
        yield made
        with contextlib.suppress(CasbackupError):
            made.abort()


class Connection:
    """Sends what it is told, and reads answers one after another."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def line(self) -> bytes:
        return self._file.readline()

    def answer(self) -> tuple[int, bytes]:
        """Status and body; status 0 when there is none."""
        status = (self.line().split() or [b"", b"0"])[1]
        length = 0
        while line := self.line().strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line.split()[1])
        return int(status), self._file.read(length)


@pytest.fixture
def connection(running: Running) -> Iterator[Connection]:
    with Connection(running.port) as made:
        yield made


def records(seed: int, count: int = 40) -> list[Record]:
    noise = random.Random(seed)
    return [chunk(noise.randbytes(noise.randrange(1, 60_000))) for _ in range(count)]


def body_of(sent: list[Record]) -> bytes:
    return b"".join(record.header + bytes(record.payload) for record in sent)


def request(session: HttpSession, what: str, body: bytes, *more: str) -> bytes:
    lines = [
        f"POST /v1/repositories/main/sessions/{session.id}/{what} HTTP/1.1",
        "Host: x",
        f"Content-Length: {len(body)}",
        f"{ATTACHMENT_HEADER}: {session._attachment}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_pieces_of_any_size(session: HttpSession, connection: Connection) -> None:
    connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for seed in range(5):
        sent, noise = records(seed), random.Random(seed)
        data = request(session, "records", body_of(sent))
        while data:
            cut = noise.choice((1, 100, 70_000, 300_000, len(data)))
            connection.socket.sendall(data[:cut])
            data = data[cut:]
            time.sleep(0.002)
        status, flags = connection.answer()
        assert status == 200
        assert unpack_flags(flags, len(sent)) == [True] * len(sent)
        assert session.missing([record.id for record in sent]) == set()


def test_a_request_right_behind_a_body(session: HttpSession, connection: Connection) -> None:
    first, second = records(1), records(2, 10)
    asked = b"".join(record.id for record in first + second)
    connection.socket.sendall(
        request(session, "records", body_of(first))
        + request(session, "missing", asked)
        + request(session, "records", body_of(second))
        + request(session, "missing", asked)
    )
    assert connection.answer()[0] == 200
    absent = [False] * len(first) + [True] * len(second)
    assert unpack_flags(connection.answer()[1], len(absent)) == absent
    assert connection.answer()[0] == 200
    assert not any(unpack_flags(connection.answer()[1], len(absent)))


def test_a_client_that_waits_to_be_told_to_go_on(session: HttpSession, connection: Connection) -> None:
    sent = records(3)
    body = body_of(sent)
    head = request(session, "records", body, "Expect: 100-continue").removesuffix(body)
    connection.socket.sendall(head)
    assert connection.line() + connection.line() == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.socket.sendall(body)
    assert connection.answer()[0] == 200


def test_a_body_that_is_cut_off(running: Running, session: HttpSession) -> None:
    sent = records(4)
    data = request(session, "records", body_of(sent))
    for length in (len(data) - 1, len(data) // 2, len(data) - len(body_of(sent))):
        with Connection(running.port) as connection:
            connection.socket.sendall(data[:length])
            connection.socket.shutdown(socket.SHUT_WR)
            assert connection.answer()[0] != 200
    ids = [record.id for record in sent]
    assert session.missing(ids) == set(ids)
    assert session.send(sent).blobs == len(sent)


def test_what_follows_a_body_that_was_given_up_is_no_request(
    session: HttpSession, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_PAUSE_S", 0.3)
    connection.socket.sendall(request(session, "records", body_of(records(5)))[:200_000])
    assert connection.answer()[0] == 408
    with contextlib.suppress(OSError):
        connection.socket.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.answer() == (0, b"")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("tls", [False, True])
def test_with_any_loop_and_with_tls(tmp_path: Path, loop: str, tls: bool) -> None:
    settings = _certificate(tmp_path) if tls else {}
    with serving(tmp_path / "repository", loop=loop, **settings) as server:
        url = server.url.replace("http:", "https:") if tls else server.url
        with HttpPeer(parse_address(url), Credentials(cacert=settings.get("ssl_certfile"))) as peer:
            sent = records(6, 200)
            session = peer.open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
            assert session.send(sent).blobs == len(sent)
            fetched = dict(peer.fetch([record.id for record in sent]))
            assert [fetched[record.id] for record in sent] == sent
            session.abort()


def _certificate(folder: Path) -> dict[str, Any]:
    made = {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}
    done = subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {made['ssl_keyfile']} -out {made['ssl_certfile']}".split(),
        capture_output=True,
    )
    if done.returncode:
        pytest.skip("openssl is not there to make a certificate")
    return made
