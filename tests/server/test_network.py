"""Broken connections, restarted servers, killed clients: nothing that was acknowledged is sent again or lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import urllib3

from casbackup.codec.codec import PLAIN
from casbackup.errors import ServerUnreachable, SessionBusy, SessionNotFound
from casbackup.ids import DEFAULT_NAMESPACE, BlobId, VmName
from casbackup.peer.http.address import parse_address
from casbackup.peer.http.peer import HttpPeer
from casbackup.peer.http.session import HttpSession
from casbackup.peer.http.transport import Transport
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.repository import Repository
from casbackup.spec.record import Record
from casbackup.testing.peer import chunk, stored_disk
from casbackup_server.rights import Right

from .conftest import NAME, Result, Running, ServerProcess, client, committed, grant, session_in
from .proxy import Proxy

MiB = 1024 * 1024
VM = VmName("vm/100")
Run = Callable[..., Result]


def disk(folder: Path, mib: int, seed: int = 1) -> Path:
    path = folder / f"disk{seed}.raw"
    path.write_bytes(random.Random(seed).randbytes(mib * MiB))
    return path


def chunks(count: int, size: int = 60_000, seed: int = 0) -> list[Record]:
    return [chunk(random.Random(seed * 100_000 + n).randbytes(size)) for n in range(count)]


def via(proxy: Proxy) -> HttpPeer:
    return HttpPeer(parse_address(f"http://127.0.0.1:{proxy.port}/{NAME}"), patience_s=20)


def posted(session: HttpSession) -> list[BlobId]:
    """The ids of all records that get an answer from now on."""
    acknowledged: list[BlobId] = []
    post = session._post

    def noting(records: list[Record]) -> list[bool]:
        answer = post(records)
        acknowledged.extend(record.id for record in records)
        return answer

    session._uploads._post = noting  # type: ignore[assignment]
    return acknowledged


def sound(folder: Path) -> None:
    with Repository.open(str(folder)) as repository:
        report = check(repository, CheckOptions(read_data=True))
        assert not report.damaged, report.findings


def test_a_backup_gets_through_a_connection_that_breaks(running: Running, tmp_path: Path, run: Run) -> None:
    source = disk(tmp_path, 24)
    with Proxy(running.port) as proxy:
        proxy.cut_after_bytes = 3 * MiB
        url = f"http://127.0.0.1:{proxy.port}/{NAME}"
        stop = threading.Event()
        cutter = threading.Thread(target=_cut_again_and_again, args=(proxy, stop))
        cutter.start()
        result = run("-r", url, "backup", "vm/100", f"scsi0={source}")
        stop.set()
        cutter.join()
        assert result.status == 0, result.err
        assert proxy.cuts >= 3
    assert run("-r", running.folder, "restore", "vm/100", "--to", tmp_path / "out").status == 0
    assert (tmp_path / "out" / "scsi0.raw").read_bytes() == source.read_bytes()


def _cut_again_and_again(proxy: Proxy, stop: threading.Event) -> None:
    """A few times: of several transfers at once, none might ever come to its end otherwise."""
    while not stop.wait(0.05) and proxy.cuts < 5:
        if proxy.cut_after_bytes is None:
            proxy.cut_after_bytes = 5 * MiB


def test_a_restore_gets_through_a_connection_that_breaks(running: Running, tmp_path: Path, run: Run) -> None:
    source = disk(tmp_path, 24)
    assert run("-r", running.url, "backup", "vm/100", f"scsi0={source}").status == 0
    with Proxy(running.port) as proxy:
        proxy.cut_after_bytes = 6 * MiB
        stop = threading.Event()
        cutter = threading.Thread(target=_cut_again_and_again, args=(proxy, stop))
        cutter.start()
        result = run("-r", f"http://127.0.0.1:{proxy.port}/{NAME}", "restore", "vm/100", "--to", tmp_path / "out")
        stop.set()
        cutter.join()
        assert result.status == 0, result.err
        assert proxy.cuts >= 2
    assert (tmp_path / "out" / "scsi0.raw").read_bytes() == source.read_bytes()


def test_latency_and_bandwidth_are_emulated(running: Running) -> None:
    with Proxy(running.port, latency_s=0.05) as proxy, via(proxy) as peer:
        began_s = time.monotonic()
        assert peer.config == running.repository.config
        assert 0.1 <= time.monotonic() - began_s < 2
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        proxy.bytes_per_s = 4 * MiB
        began_s = time.monotonic()
        session.send(chunks(35))
        assert 0.5 <= time.monotonic() - began_s < 4
        session.abort()


def test_acknowledged_chunks_are_not_sent_again_when_the_server_is_killed(process: ServerProcess) -> None:
    """The server is killed in the middle of an upload and started again: the session goes on by itself."""
    records = chunks(600)
    with HttpPeer(parse_address(process.url), patience_s=60) as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        acknowledged = posted(session)
        killer = threading.Thread(target=_restart_when, args=(process, lambda: len(acknowledged) > 100))
        killer.start()
        for start in range(0, len(records), 20):
            session.send_soon(records[start : start + 20], lambda _: None)
        session.flush()
        killer.join()
        assert len(acknowledged) == len(set(acknowledged)) == 600
        assert session.missing([record.id for record in records]) == set()
        snapshot = session.commit(stored_disk(session, b"x" * 5000))
        assert peer.snapshots() == [snapshot]
    process.stop()
    sound(process.folder)


def _restart_when(process: ServerProcess, condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)
    process.kill()
    process.start()


def test_what_was_acknowledged_survives_a_kill_of_the_server(process: ServerProcess) -> None:
    records = chunks(50)
    with HttpPeer(parse_address(process.url)) as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        session.send(records)
        process.kill()
        process.start()
        again = peer.open_session(DEFAULT_NAMESPACE, VM)
        assert again.missing([record.id for record in records]) == set()
        found = {blob_id: bytes(PLAIN.decode(r)) for blob_id, r in peer.fetch([r.id for r in records])}  # type: ignore[arg-type]
        assert found == {record.id: bytes(PLAIN.decode(record)) for record in records}
        again.abort()


def test_a_session_is_taken_over_with_the_same_token(guarded: Running) -> None:
    """The client may be dead; if it is not, it must not go on beside the new one."""
    token, another = grant(guarded.folder, Right.BACKUP), grant(guarded.folder, Right.BACKUP)
    with guarded.peer(token) as peer, guarded.peer(token) as other, guarded.peer(another) as stranger:
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        draft = stored_disk(session, b"x" * 5000)
        records = chunks(40)
        session.send(records)
        with pytest.raises(SessionBusy, match="same token"):
            stranger.resume_session(session.id)
        resumed = other.resume_session(session.id)
        assert resumed.id == session.id
        assert resumed.missing([record.id for record in records]) == set()
        for use in (
            lambda: session.missing([chunk(b"new").id]),
            lambda: session.send(chunks(1, seed=2)),
            lambda: session.commit(draft),
            session._attach,  # as after the server was restarted
            session.abort,
        ):
            with pytest.raises(SessionBusy):
                use()
        assert resumed.commit(draft).manifest.disks == draft.disks
        assert len(guarded.local().snapshots()) == 1


def test_a_fenced_client_does_not_come_back(guarded: Running) -> None:
    """A request to take over that arrives twice, the second time after somebody else did the same."""
    token = grant(guarded.folder, Right.BACKUP)
    live = guarded.server.repositories[NAME].live
    with guarded.peer(token) as first, guarded.peer(token) as second, guarded.peer(token) as third:
        session = first.open_session(DEFAULT_NAMESPACE, VM)
        late = second.resume_session(session.id)
        last = third.resume_session(session.id)
        with pytest.raises(SessionBusy, match="taken over"):
            live.resume(session.id, late._attachment, "token0", lambda *_: None, take_over=True)
        assert last.missing([chunk(b"new").id]) == {chunk(b"new").id}
        last.abort()


def test_the_time_of_a_snapshot_is_that_of_the_client_that_made_it(guarded: Running) -> None:
    token = grant(guarded.folder, Right.BACKUP)
    with guarded.peer(token) as peer, guarded.peer(token) as other:
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        draft = stored_disk(session, b"x" * 5000)
        time.sleep(0.05)
        now_ms = guarded.repository.clock.now_ms()
        assert other.resume_session(session.id).commit(draft).manifest.time_ms >= now_ms


def test_a_killed_client_is_resumed_at_once(process: ServerProcess, tmp_path: Path, run: Run) -> None:
    source = disk(tmp_path, 48)
    with Proxy(process.port, bytes_per_s=24 * MiB) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/{NAME}"
        backup = client("-r", url, "backup", "vm/100", f"scsi0={source}")
        while proxy.passed_bytes < 24 * MiB:
            time.sleep(0.01)
        backup.kill()
        backup.communicate(timeout=60)
        (session,) = json.loads(run("-r", process.folder, "sessions", "--json").out)["sessions"]
        passed_before, proxy.bytes_per_s = proxy.passed_bytes, 0
        result = run("-r", url, "backup", "vm/100", f"scsi0={source}", "--resume", session["id"])
        assert result.status == 0, result.err
        assert proxy.passed_bytes - passed_before < 40 * MiB
    sound(process.folder)


def test_sigterm_parks_sessions_and_ends_well(process: ServerProcess, tmp_path: Path, run: Run) -> None:
    source = disk(tmp_path, 48)
    backup = client("-r", process.url, "backup", "vm/100", f"scsi0={source}", "--json")
    packs = process.folder / "packs"
    while not any(packs.rglob("*.pack")):
        time.sleep(0.01)
    status, log = process.stop()
    assert status == 0, log
    assert "Traceback" not in log
    process.start()
    _, err = backup.communicate(timeout=60)
    assert backup.returncode == 0, err
    assert run("-r", process.folder, "restore", "vm/100", "--to", tmp_path / "out").status == 0
    assert (tmp_path / "out" / "scsi0.raw").read_bytes() == source.read_bytes()


def test_an_interrupted_backup_is_resumed_without_sending_again(
    process: ServerProcess, tmp_path: Path, run: Run
) -> None:
    source = disk(tmp_path, 48)
    with Proxy(process.port, bytes_per_s=24 * MiB) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/{NAME}"
        backup = client("-r", url, "backup", "vm/100", f"scsi0={source}")
        while proxy.passed_bytes < 16 * MiB:
            time.sleep(0.01)
        backup.terminate()
        _, err = backup.communicate(timeout=60)
        assert backup.returncode == 130, err
        passed_before = proxy.passed_bytes
        proxy.bytes_per_s = 0
        result = run("-r", url, "backup", "vm/100", f"scsi0={source}", "--resume", session_in(err))
        assert result.status == 0, result.err
        assert proxy.passed_bytes < 50 * MiB + 10 * MiB
        assert proxy.passed_bytes - passed_before < 40 * MiB
    sound(process.folder)


def test_a_lost_answer_of_a_commit_is_found_out(running: Running) -> None:
    """The server commits, its answer never arrives, and then it forgets that it did, as when it is restarted."""
    with running.peer() as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        draft = stored_disk(session, b"x" * 5000)
        once = session._once

        def losing(method: str, path: str, body: bytes) -> bytes:
            if path == "/commit":
                once(method, path, body)
                running.server.repositories[NAME].live._committed.clear()
            return once(method, path, body)

        session._once = losing  # type: ignore[method-assign]
        snapshot = session.commit(draft)
        assert running.local().snapshots() == [snapshot]


def test_a_commit_asked_twice_is_one(running: Running) -> None:
    with running.peer() as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        draft = stored_disk(session, b"x" * 5000)
        once = session._once
        session._once = lambda *a: (once(*a), once(*a))[1]  # type: ignore[method-assign]
        snapshot = session.commit(draft)
        assert running.local().snapshots() == [snapshot]


def test_a_session_that_was_never_committed_is_not_found(running: Running) -> None:
    with running.peer() as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        draft = stored_disk(session, b"x" * 5000)
        with running.peer() as other:
            running.server.repositories[NAME].live.close()
            other.resume_session(session.id).abort()
        with pytest.raises(SessionNotFound):
            session.commit(draft)


def test_silent_sessions_are_parked(running: Running) -> None:
    live = running.server.repositories[NAME].live
    with running.peer() as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        session.send(chunks(3))
        assert live.park_silent(60) == []
        assert live.park_silent(-1) == [session.id]
        # the client notices nothing of it
        assert session.missing([chunk(b"other").id]) == {chunk(b"other").id}
        assert session.missing([record.id for record in chunks(3)]) == set()
        session.abort()


# --- giving up


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds elsewhere takes less."""
    monkeypatch.setattr("casbackup.peer.http.transport._BRIEF", urllib3.Timeout(connect=0.5, read=0.5))


@pytest.mark.parametrize("how", ["stalled", "down"])
def test_a_session_is_left_soon(running: Running, short: None, how: str) -> None:
    """Connections that say nothing more, or a server that is gone: nobody waits for what is under way."""
    with Proxy(running.port) as proxy, HttpPeer(parse_address(f"http://127.0.0.1:{proxy.port}/{NAME}")) as peer:
        session = peer.open_session(DEFAULT_NAMESPACE, VM)
        proxy.latency_s = 3600 if how == "stalled" else 0
        if how == "down":
            proxy.__exit__(None, None, None)
        for start in range(0, 200, 20):
            session.send_soon(chunks(200)[start : start + 20], lambda _: None)
        time.sleep(0.3)
        began_s = time.monotonic()
        peer.give_up(0.5)
        with pytest.raises(ServerUnreachable):
            session.flush()
        session.park()
        assert time.monotonic() - began_s < 5


def test_when_patience_is_over_nothing_else_waits(running: Running, short: None) -> None:
    with Proxy(running.port) as proxy:
        snapshot = committed(running.local(), b"x" * 5000)
        address = parse_address(f"http://127.0.0.1:{proxy.port}/{NAME}")
        with HttpPeer(address, patience_s=1.0) as peer, contextlib.ExitStack() as readings:
            for _ in range(30):
                readings.enter_context(peer.reading(snapshot))
            session = peer.open_session(DEFAULT_NAMESPACE, VM)
            proxy.__exit__(None, None, None)
            began_s = time.monotonic()
            with pytest.raises(ServerUnreachable):
                session.missing([chunk(b"x").id])
            session.park()
            readings.close()
            assert time.monotonic() - began_s < 4


def test_a_body_may_take_long_to_send(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a connection may take to be made."""
    monkeypatch.setattr("casbackup.peer.http.transport._TIMEOUT", urllib3.Timeout(connect=0.2, read=20))
    with slow_reader() as port:
        transport = Transport(parse_address(f"http://127.0.0.1:{port}/{NAME}"), patience_s=0)
        assert transport.request("POST", "/x", bytes(8 * MiB)) == b"ok"


@contextlib.contextmanager
def slow_reader() -> Iterator[int]:
    """The port of a server that takes 8 MiB in a second, and then answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                left = 8 * MiB
                while left > 0 and (piece := connection.recv(64 * 1024)):
                    left -= len(piece)
                    time.sleep(len(piece) / (8 * MiB))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        thread = threading.Thread(target=serve)
        thread.start()
        yield int(server.getsockname()[1])
        thread.join()


def test_the_patience_of_a_command_is_set(process: ServerProcess, tmp_path: Path) -> None:
    """A server that goes away in mid-upload, for good; the session is named for all that."""
    source = disk(tmp_path, 48)
    with Proxy(process.port, bytes_per_s=16 * MiB) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/{NAME}"
        backup = client("-r", url, "backup", "vm/100", f"scsi0={source}", CASBACKUP_PATIENCE="1s")
        while proxy.passed_bytes < 8 * MiB:
            time.sleep(0.01)
        process.kill()
        began_s = time.monotonic()
        _, err = backup.communicate(timeout=60)
        assert time.monotonic() - began_s < 15
    assert backup.returncode == 1, err
    assert "cannot be reached" in err
    session_in(err)


def test_a_signal_ends_the_waiting(process: ServerProcess, tmp_path: Path) -> None:
    source = disk(tmp_path, 48)
    with Proxy(process.port, bytes_per_s=16 * MiB) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/{NAME}"
        backup = client("-r", url, "backup", "vm/100", f"scsi0={source}")
        while proxy.passed_bytes < 8 * MiB:
            time.sleep(0.01)
        process.kill()
        time.sleep(1)
        assert backup.poll() is None
        began_s = time.monotonic()
        backup.terminate()
        _, err = backup.communicate(timeout=60)
        assert time.monotonic() - began_s < 20
    assert backup.returncode == 130, err
    session_in(err)


def test_no_server_is_soon_said(tmp_path: Path) -> None:
    with HttpPeer(parse_address("http://127.0.0.1:9/main")) as peer:
        began_s = time.monotonic()
        with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:9"):
            peer.snapshots()
        assert time.monotonic() - began_s < 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_random_moments(process: ServerProcess, tmp_path: Path) -> None:
    """Server and client are killed again and again; at last everything is there, once, and sound."""
    seed = int(os.environ.get("CASBACKUP_TEST_SEED", "1"))
    choice = random.Random(seed)
    source = disk(tmp_path, 64)
    resume: list[str] = []
    for round_ in range(100):
        backup = client("-r", process.url, "backup", "vm/100", f"scsi0={source}", *resume)
        time.sleep(choice.uniform(0.2, 1.5))
        if choice.random() < 0.5:
            process.kill()
            process.start()
        if choice.random() < 0.5:
            backup.kill()
        backup.communicate(timeout=120)
        if round_ % 10 == 9:
            with source.open("r+b") as file:
                file.seek(choice.randrange(60 * MiB))
                file.write(choice.randbytes(MiB))
    backup = client("-r", process.url, "backup", "vm/100", f"scsi0={source}")
    _, err = backup.communicate(timeout=120)
    assert backup.returncode == 0, err
    restore = client("-r", process.url, "restore", "vm/100", "--to", tmp_path / "out")
    restore.communicate(timeout=120)
    assert (tmp_path / "out" / "scsi0.raw").read_bytes() == source.read_bytes()
    process.stop()
    sound(process.folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_clients_at_once(process: ServerProcess, tmp_path: Path) -> None:
    """Clones of a VM, each a little different, backed up at once while gc and check run; 300 MB are enough."""
    sources = []
    for number in range(8):
        path = disk(tmp_path, 96, seed=7)
        own = tmp_path / f"vm{number}.raw"
        own.write_bytes(path.read_bytes()[: 88 * MiB] + random.Random(number).randbytes(8 * MiB))
        sources.append(own)
    backups = [client("-r", process.url, "backup", f"vm/{n}", f"scsi0={s}") for n, s in enumerate(sources)]
    for _ in range(3):
        for command in ("gc", "check"):
            assert client("-r", process.folder, command).wait(120) == 0
    for backup in backups:
        _, err = backup.communicate(timeout=300)
        assert backup.returncode == 0, err
    for number, source in enumerate(sources):
        out = tmp_path / f"out{number}"
        assert client("-r", process.url, "restore", f"vm/{number}", "--to", out).wait(120) == 0
        assert (out / "scsi0.raw").read_bytes() == source.read_bytes()
    assert process.process is not None
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kib < 300 * 1024
    process.stop()
    sound(process.folder)
