"""Servers, devices and images for the tests of the block layer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.uri import NbdAddress

PLAIN_FLAGS = nbd.ExportFlag.HAS_FLAGS | nbd.ExportFlag.SEND_FLUSH | nbd.ExportFlag.SEND_TRIM
CONTEXT = 7


class Req(NamedTuple):
    """A request as a server sees it."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    data: bytes


def chunk(kind: int, cookie: int, payload: bytes = b"", *, done: bool = True, length: int | None = None) -> bytes:
    """A chunk of a structured reply; ``length`` lies about the payload."""
    size = len(payload) if length is None else length
    header = nbd.CHUNK_HEADER.pack(nbd.STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, size)
    return header + payload


def data_chunk(cookie: int, offset: int, data: bytes, *, done: bool = True) -> bytes:
    return chunk(nbd.CHUNK_OFFSET_DATA, cookie, nbd.DATA_OFFSET.pack(offset) + data, done=done)


def hole_chunk(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    return chunk(nbd.CHUNK_OFFSET_HOLE, cookie, nbd.HOLE.pack(offset, length), done=done)


def status_chunk(cookie: int, *descriptors: tuple[int, int], context: int = CONTEXT, done: bool = True) -> bytes:
    payload = struct.pack(">I", context) + b"".join(nbd.STATUS_DESCRIPTOR.pack(*d) for d in descriptors)
    return chunk(nbd.CHUNK_BLOCK_STATUS, cookie, payload, done=done)


def error_chunk(cookie: int, error: int, text: bytes = b"", *, done: bool = True, kind: int = 1) -> bytes:
    payload = nbd.CHUNK_ERROR.pack(error, len(text)) + text
    return chunk(nbd.CHUNK_IS_ERROR + kind, cookie, payload, done=done)


def simple_reply(cookie: int, error: int = 0) -> bytes:
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)


def option_reply(option: int, kind: int, payload: bytes = b"", *, magic: int = nbd.REPLY_MAGIC) -> bytes:
    return nbd.OPTION_REPLY.pack(magic, option, kind, len(payload)) + payload


class FakeNbd:
    """An NBD server that says what a test wants, on a unix socket, one thread per connection.

    ``answer(request)`` gives the bytes to send back; None ends the connection. ``handshake`` replaces the
    normal one: it gets the connection and returns whether to go on to requests.
    """

    size_bytes = 1024 * 1024
    flags = PLAIN_FLAGS
    structured = True
    go_infos: tuple[bytes, ...] | None = None
    answer: Callable[[Req], bytes | None] = staticmethod(lambda request: None)
    handshake: Callable[[socket.socket], bool] | None = None

    def __init__(self, path: Path) -> None:
        self.uri = f"nbd+unix:///disk?socket={path}"
        self.requests: list[Req] = []
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def connect(self, timeout_s: float = 10.0, connect_timeout_s: float = 10.0) -> NbdClient:
        return NbdClient.connect(self.uri, connect_timeout_s=connect_timeout_s, timeout_s=timeout_s)

    def close(self) -> None:
        for sock in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), connection:
            if (self.handshake or self.normal_handshake)(connection):
                while (reply := self.answer(self._request(connection))) is not None:
                    connection.sendall(reply)

    def _request(self, connection: socket.socket) -> Req:
        header = receive(connection, nbd.REQUEST.size)
        _magic, flags, command, cookie, offset, length = nbd.REQUEST.unpack(header)
        if command == nbd.Command.DISC:
            raise EOFError
        data = receive(connection, length) if command == nbd.Command.WRITE else b""
        self.requests.append(Req(flags, command, cookie, offset, length, data))
        return self.requests[-1]

    def normal_handshake(self, connection: socket.socket) -> bool:
        self.greet(connection)
        while True:
            header = receive(connection, nbd.OPTION_HEADER.size)
            _magic, option, length = nbd.OPTION_HEADER.unpack(header)
            receive(connection, length)
            if option == nbd.OPT_GO:
                infos = self.go_infos if self.go_infos is not None else (self.export_info(),)
                connection.sendall(b"".join(option_reply(option, nbd.REP_INFO, info) for info in infos))
            elif not self.structured:
                connection.sendall(option_reply(option, nbd.REP_ERROR + 1))
                continue
            elif option == nbd.OPT_SET_META_CONTEXT:
                context = struct.pack(">I", CONTEXT) + nbd.BASE_ALLOCATION
                connection.sendall(option_reply(option, nbd.REP_META_CONTEXT, context))
            connection.sendall(option_reply(option, nbd.REP_ACK))
            if option == nbd.OPT_GO:
                return True

    def greet(self, connection: socket.socket) -> None:
        connection.sendall(nbd.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, 3))
        receive(connection, 4)

    def export_info(self) -> bytes:
        return nbd.INFO_EXPORT_LAYOUT.pack(nbd.INFO_EXPORT, self.size_bytes, int(self.flags))


def receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return data


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeNbd]:
    server = FakeNbd(tmp_path / "fake.sock")
    yield server
    server.close()


@pytest.fixture
def replies() -> SimpleNamespace:
    """The functions that make replies, for tests, which cannot import this file."""
    return SimpleNamespace(
        chunk=chunk,
        data=data_chunk,
        hole=hole_chunk,
        status=status_chunk,
        error=error_chunk,
        simple=simple_reply,
        option=option_reply,
        CONTEXT=CONTEXT,
    )


@contextlib.contextmanager
def running(command: list[str], address: str | tuple[str, int]) -> Iterator[None]:
    """A server until the end of the block; it listens when the block begins."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not accepts(address):
            assert process.poll() is None and time.monotonic() < deadline, f"{command} does not serve"
            time.sleep(0.002)
        yield
    finally:
        process.kill()  # nbdkit would wait for its clients first
        process.wait()


def accepts(address: str | tuple[str, int]) -> bool:
    """Whether somebody listens; nbdkit's socket appears a moment before it does."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture
def nbdkit(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[str]]:
    """``with nbdkit("memory", "1M") as uri``: on a unix socket, or a free port with ``tcp=True``."""
    need("nbdkit")

    @contextlib.contextmanager
    def start(*arguments: str, tcp: bool = False) -> Iterator[str]:
        path = tmp_path / "nbdkit.sock"
        path.unlink(missing_ok=True)
        command = ["nbdkit", "--foreground"]
        if tcp:
            with socket.create_server(("127.0.0.1", 0)) as unused:
                port = unused.getsockname()[1]
            with running([*command, "-i", "127.0.0.1", "-p", str(port), *arguments], ("127.0.0.1", port)):
                yield f"nbd://127.0.0.1:{port}/"
        else:
            with running([*command, "--unix", str(path), *arguments], str(path)):
                yield f"nbd+unix:///?socket={path}"

    return start


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder for images, where QEMU's tools are there to make them."""
    need("qemu-img", "qemu-nbd")
    return tmp_path


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """Makes loop devices of a size; skips where that is not possible."""
    need("losetup")
    made: list[str] = []

    def make(size_bytes: int) -> str:
        backing = tmp_path / f"loop{len(made)}"
        backing.touch()
        os.truncate(backing, size_bytes)
        done = subprocess.run(["losetup", "-f", "--show", str(backing)], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"loop devices cannot be set up here: {done.stderr.strip()}")
        made.append(done.stdout.strip())
        return made[-1]

    yield make
    for device in made:
        subprocess.run(["losetup", "-d", device], check=True)


class Daemon:
    """A qemu-storage-daemon with disks, and its monitor."""

    def __init__(self, folder: Path, disks: dict[str, Path]) -> None:
        self.events: list[dict[str, Any]] = []
        monitor = str(folder / "qmp.sock")
        nodes = [
            argument
            for name, path in disks.items()
            for argument in (
                "--blockdev",
                json.dumps({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": str(path)}}),
            )
        ]
        chardev = f"socket,id=monitor,path={monitor},server=on,wait=off"
        command = ["qemu-storage-daemon", "--chardev", chardev, "--monitor", "chardev=monitor", *nodes]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._stream = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 10
        while self._stream.connect_ex(monitor) != 0:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.005)
        self._file = self._stream.makefile("rw")
        self._receive()
        self.run("qmp_capabilities")

    def run(self, command: str, **arguments: Any) -> Any:
        plain = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": plain}) + "\n")
        self._file.flush()
        while True:
            reply = self._receive()
            if "event" not in reply:
                assert "error" not in reply, reply
                return reply["return"]
            self.events.append(reply)

    def add_target(self, name: str, address: NbdAddress, **options: Any) -> None:
        server = {"type": "unix", "path": address.socket_path}
        self.run("blockdev-add", driver="nbd", node_name=f"to-{name}", export=name, server=server, **options)

    def wait_concluded(self, job: str) -> str | None:
        """The error of a job, when it has ended."""
        while not any(
            event["event"] == "JOB_STATUS_CHANGE" and event["data"] == {"id": job, "status": "concluded"}
            for event in self.events
        ):
            event = self._receive()
            assert "event" in event, event
            self.events.append(event)
        (error,) = (one.get("error") for one in self.run("query-jobs") if one["id"] == job)
        self.run("job-dismiss", id=job)
        return error

    def export(self, node: str, path: Path) -> NbdAddress:
        """Export a node for a guest."""
        self.run("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        self.run("block-export-add", type="nbd", id="guest", node_name=node, name="guest", writable=True)
        return NbdAddress("guest", str(path))

    def close(self) -> None:
        self._file.close()
        self._stream.close()
        self.process.kill()
        self.process.wait()

    def _receive(self) -> dict[str, Any]:
        line = self._file.readline()
        assert line, "the daemon has gone"
        return dict(json.loads(line))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    need("qemu-storage-daemon")
    with contextlib.ExitStack() as stack:

        def start(**disks: Path) -> Daemon:
            daemon = Daemon(tmp_path, disks)
            stack.callback(daemon.close)
            return daemon

        yield start
