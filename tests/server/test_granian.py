"""granian in the place of uvicorn: the same server, with TLS."""

from __future__ import annotations

import importlib.util
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import urllib3

from casbackup.errors import UsageError
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.peer.http.address import parse_address
from casbackup.peer.http.peer import HttpPeer
from casbackup.peer.http.transport import Credentials
from casbackup.repository.repository import Repository
from casbackup.testing.peer import chunk
from casbackup_server import granian_front

from .conftest import NAME, Result, ServerProcess

needs_granian = pytest.mark.skipif(importlib.util.find_spec("granian") is None, reason="granian is not installed")
MiB = 1024 * 1024
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For 127.0.0.1, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = (
        f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {key} -out {cert} -days 2 -subj /CN=x"
    )
    subprocess.run(
        ["openssl", *words.split(), "-keyout", key, "-out", cert, "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    return cert, key


class TlsProcess(ServerProcess):
    """``casbackup serve --server granian`` with TLS."""

    cert: Path

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/{NAME}"

    def answers(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.cert))
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as plain:
                context.wrap_socket(plain, server_hostname="127.0.0.1").close()
        except OSError:
            return False
        return True


@pytest.fixture
def served(tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[TlsProcess]:
    Repository.create(str(tmp_path / "repository")).close()
    cert, key = certificate
    options = ["--insecure-no-auth", "--server", "granian", "--tls-cert", str(cert), "--tls-key", str(key)]
    process = TlsProcess(tmp_path / "repository", options)
    process.cert = cert
    process.start()
    yield process
    if process.process is not None:
        process.kill()


def peer(served: TlsProcess) -> HttpPeer:
    return HttpPeer(parse_address(served.url), Credentials(cacert=str(served.cert)))


@needs_granian
def test_backup_and_restore(served: TlsProcess, tmp_path: Path, run: Run) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(random.Random(1).randbytes(24 * MiB))
    where = ("-r", served.url, "--cacert", served.cert)
    assert run(*where, "backup", "vm/100", f"scsi0={source}").status == 0
    assert run(*where, "restore", "vm/100", "--to", tmp_path / "out").status == 0
    assert (tmp_path / "out" / "scsi0.raw").read_bytes() == source.read_bytes()
    api = f"https://127.0.0.1:{served.port}/v1/repositories/{NAME}/snapshots"
    with urllib3.PoolManager(ca_certs=str(served.cert), retries=False) as http:
        (snapshot,) = http.request("GET", api).json()["snapshots"]
        disk = f"{api}/{snapshot['id']}/disks/scsi0"
        answer = http.request("GET", disk, headers={"Range": "bytes=5000000-5000099"})
        assert (answer.status, answer.data) == (206, source.read_bytes()[5_000_000:5_000_100])
    assert run("-r", served.url, "snapshots").status != 0, "a certificate that nobody vouches for"


@needs_granian
def test_sigterm_finishes_what_is_under_way(served: TlsProcess) -> None:
    """Chunks that are on their way when the signal comes are stored, and acknowledged."""
    records = [chunk(random.Random(n).randbytes(60_000)) for n in range(400)]
    answered: list[int] = []
    with peer(served) as client:
        session = client.open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
        began = threading.Event()

        def send() -> None:
            for start in range(0, 400, 50):
                began.set()
                session.send(records[start : start + 50])
                answered.append(start)

        sender = threading.Thread(target=send)
        sender.start()
        began.wait()
        time.sleep(0.05)
        status, log = served.stop()
        assert status == 0, log
        assert "Traceback" not in log
        served.start()
        sender.join(60)
        assert len(answered) == 8
        assert session.missing([record.id for record in records]) == set()
        session.abort()


@needs_granian
@pytest.mark.parametrize("what", ["disks/scsi0", "export?format=raw"])
def test_what_cannot_be_completed_is_cut_off(served: TlsProcess, tmp_path: Path, run: Run, what: str) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(random.Random(1).randbytes(24 * MiB))
    assert run("-r", served.folder, "backup", "vm/100", f"scsi0={source}").status == 0
    (pack,) = served.folder.glob("packs/*/*.pack")
    with pack.open("r+b") as file:
        file.seek(20 * MiB)
        file.write(bytes(1000))
    api = f"https://127.0.0.1:{served.port}/v1/repositories/{NAME}/snapshots"
    with urllib3.PoolManager(ca_certs=str(served.cert), retries=False) as http:
        (snapshot,) = http.request("GET", api).json()["snapshots"]
        answer = http.request("GET", f"{api}/{snapshot['id']}/{what}", preload_content=False)
        assert answer.status == 200
        with pytest.raises(urllib3.exceptions.HTTPError):
            while answer.read(MiB):
                pass


@needs_granian
def test_a_head_that_never_comes(served: TlsProcess) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as plain:
        context = ssl.create_default_context(cafile=str(served.cert))
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.settimeout(60)
            connection.sendall(b"GET /v1/openapi.json HT")
            began_s = time.monotonic()
            while connection.recv(1000):
                pass
            assert time.monotonic() - began_s < 40


def test_without_granian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "granian.constants", None)
    with pytest.raises(UsageError, match=r"casbackup\[granian\]"):
        granian_front._server(None, "127.0.0.1", 0, None)  # type: ignore[arg-type]
