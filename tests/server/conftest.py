"""Servers under test: in a thread of this process for speed, as a process of its own where it is to be killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
import urllib3
import uvicorn

from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.limits import MAX_UPLOADING_BYTES
from casbackup.peer.http.address import parse_address
from casbackup.peer.http.peer import HttpPeer
from casbackup.peer.http.transport import Credentials
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.testing import peer as samples
from casbackup_client.main import main
from casbackup_server.app import create_app
from casbackup_server.audit import Audit
from casbackup_server.budget import ByteBudget
from casbackup_server.gate import Failures, Gate, OpenGate, TokenGate
from casbackup_server.protocol import PatientProtocol
from casbackup_server.rights import Grant, Right
from casbackup_server.served import Server, opened
from casbackup_server.threads import Threads
from casbackup_server.tokens import TokenFile

ROOT = Path(__file__).resolve().parents[2]
START = "import sys; from casbackup_client.main import main; sys.exit(main())"
NAME = "main"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No logs, and nothing of the user's own settings."""
    structlog.configure(processors=[structlog.testing.LogCapture()], cache_logger_on_first_use=False)
    for name in [name for name in os.environ if name.startswith("CASBACKUP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@dataclass
class Running:
    """A server in a thread of this process."""

    server: Server
    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{NAME}"

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/repositories/{NAME}"

    @property
    def repository(self) -> Repository:
        return self.server.repositories[NAME].repository

    def peer(self, token: str | None = None, *, patience_s: float = 10.0) -> HttpPeer:
        return HttpPeer(parse_address(self.url), Credentials(token), patience_s=patience_s)

    def local(self) -> LocalPeer:
        return self.server.repositories[NAME].peer


@contextlib.contextmanager
def serving(folder: Path, gate: Callable[[Path], Gate] | None = None, **settings: Any) -> Iterator[Running]:
    """Serve the repository in ``folder``, made if it is not there."""
    if not folder.exists():
        Repository.create(str(folder)).close()
    with opened({NAME: str(folder)}) as served:
        made = OpenGate() if gate is None else gate(folder)
        server = Server(served, made, Audit(), Threads(), ByteBudget(MAX_UPLOADING_BYTES))
        config = uvicorn.Config(
            create_app(server),
            port=0,
            http=PatientProtocol,
            ws="none",
            log_config=None,
            timeout_graceful_shutdown=1,
            **settings,
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            while not running.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield Running(server, running.servers[0].sockets[0].getsockname()[1], folder)
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A server that lets everybody do everything."""
    with serving(tmp_path / "repository") as server:
        yield server


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Running]:
    """A server that wants tokens; ``grant`` makes them."""
    with serving(tmp_path / "repository", token_gate) as server:
        yield server


def token_gate(folder: Path) -> TokenGate:
    return TokenGate({NAME: TokenFile(str(folder))}, Audit(), failures=Failures(burst=100_000))


def grant(folder: Path, *rights: Right, isolated: bool = False, vms: tuple[str, ...] = ("*",)) -> str:
    """A new token's text."""
    file = TokenFile(str(folder))
    name = f"token{len(file.all())}"
    return file.create(name, Grant(frozenset(rights), vms=vms, isolated=isolated)).text


@dataclass
class ServerProcess:
    """``casbackup serve`` as a process that can be killed and started again on the same port."""

    folder: Path
    options: list[str] = field(default_factory=lambda: ["--insecure-no-auth"])
    port: int = 0
    process: subprocess.Popen[str] | None = None

    @property
    def log(self) -> Path:
        return self.folder.with_name("server.log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{NAME}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.port = self.port or _free_port()
        arguments = ["serve", "--listen", f"127.0.0.1:{self.port}"]
        if "--config" not in self.options:
            arguments += ["--repository", f"{NAME}={self.folder}"]
        with self.log.open("a") as log:  # a pipe that nobody reads would stop the server
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, *arguments, *self.options],
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_paths())},
                text=True,
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            if self.answers():
                return
            time.sleep(0.02)
        raise AssertionError("the server does not answer")

    def answers(self) -> bool:
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            urllib3.PoolManager(retries=False).request("GET", f"http://127.0.0.1:{self.port}/v1/openapi.json")
            return True
        return False

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> tuple[int, str]:
        """SIGTERM; its exit status and its log."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> tuple[int, str]:
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(timeout=40)
        self.process = None
        return status, self.log.read_text()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ServerProcess]:
    """A started server process with an empty repository."""
    Repository.create(str(tmp_path / "repository")).close()
    made = ServerProcess(tmp_path / "repository")
    made.start()
    yield made
    if made.process is not None:
        made.kill()


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A ``casbackup`` command in this process."""

    def command(*arguments: object) -> Result:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(status, out, err)

    return command


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_client_left() -> Iterator[None]:
    """Ends the commands that a test that failed has left."""
    yield
    while _started:
        left = _started.pop()
        if left.poll() is None:
            left.kill()
        left.communicate()


def client(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A ``casbackup`` command as a process."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_paths()), **environment},
        text=True,
    )
    _started.append(process)
    return process


def committed(folder_or_peer: Any, content: bytes, vm: str = "vm/100") -> Snapshot:
    return samples.committed(folder_or_peer, content, vm=VmName(vm), namespace=DEFAULT_NAMESPACE)


def session_in(text: str) -> str:
    """The session that an error message offers to resume."""
    found = re.search("--resume ([0-9a-f]{32})", text)
    assert found, text
    return found[1]


def _paths() -> list[str]:
    return [str(ROOT), str(ROOT / "client"), str(ROOT / "server"), str(ROOT / "migrations")]


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
