"""What is said when a server cannot be reached, or is not what it seems."""

from __future__ import annotations

import http.server
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.errors import CasbackupError, CertificateUntrusted, ServerUnreachable
from casbackup.peer.http.address import parse_address
from casbackup.peer.http.transport import Credentials, Transport


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None: ...


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients go away in the middle of handshakes here."""


def certificate(folder: Path, days: int = 2, name: str = "IP:127.0.0.1") -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days {days} -subj /CN=x"
    subprocess.run(
        ["openssl", *words.split(), "-keyout", key, "-out", cert, "-addext", f"subjectAltName={name}"],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture
def plain() -> Iterator[_Server]:
    yield from running(_Server(("127.0.0.1", 0), _Handler))


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[_Server]:
    server = _Server(("127.0.0.1", 0), _Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate(tmp_path))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    yield from running(server)


def running(server: _Server) -> Iterator[_Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def failure(url: str, cacert: Path | None = None) -> CasbackupError:
    transport = Transport(parse_address(url), Credentials(cacert=None if cacert is None else str(cacert)), patience_s=0)
    with pytest.raises(CasbackupError) as found:
        transport.request("GET", "/x")
    transport.close()
    return found.value


def test_a_certificate_that_nobody_vouches_for(secure: _Server, tmp_path: Path) -> None:
    error = failure(f"https://127.0.0.1:{secure.server_port}/main")
    assert isinstance(error, CertificateUntrusted)
    assert "self-signed certificate" in str(error)
    assert "_ssl.c" not in str(error)
    assert "--cacert" in error.advice
    trusted = Transport(
        parse_address(f"https://127.0.0.1:{secure.server_port}/main"), Credentials(cacert=str(tmp_path / "cert.pem"))
    )
    assert trusted.request("GET", "/x") == b"ok"
    trusted.close()


def test_a_certificate_of_another_address(secure: _Server, tmp_path: Path) -> None:
    error = failure(f"https://localhost:{secure.server_port}/main", tmp_path / "cert.pem")
    assert isinstance(error, CertificateUntrusted)
    assert "localhost" in str(error)


def test_https_where_there_is_no_tls(plain: _Server) -> None:
    error = failure(f"https://127.0.0.1:{plain.server_port}/main")
    assert isinstance(error, ServerUnreachable)
    assert "TLS failed: wrong version number; it may want http://" in str(error)


def test_http_where_tls_is_wanted(secure: _Server) -> None:
    error = failure(f"http://127.0.0.1:{secure.server_port}/main")
    assert isinstance(error, ServerUnreachable)
    assert "it may want https://" in str(error)


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        error = failure(f"http://127.0.0.1:{taken.getsockname()[1]}/main")
    assert str(error).endswith("cannot be reached: Connection refused")
    assert "Name or service not known" in str(failure("http://nosuch.invalid/main"))
