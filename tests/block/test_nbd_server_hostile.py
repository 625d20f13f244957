"""Clients that lie, stall or speak nonsense get an error or lose their connection, and nobody else notices."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.protocol import Command, Errno
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.sparse import SparseMemory
from casbackup.limits import MAX_NBD_OPTION_BYTES, MAX_NBD_OPTIONS, MAX_NBD_REQUEST_BYTES
from casbackup.units import MiB

SIZE = 4 * MiB
NAME = struct.pack(">I", 4) + b"disk"
GO = NAME + struct.pack(">H", 0)
CONTEXT = NAME + struct.pack(">I", 1) + struct.pack(">I", len(nbd.BASE_ALLOCATION)) + nbd.BASE_ALLOCATION


class Served:
    """A server with one export ``disk``, and what it reported."""

    def __init__(self, path: str) -> None:
        self.device = MemoryDevice(SIZE)
        self.reports = list[str]()
        self.server = NbdServer(
            [Export.of("disk", Guarded(self.device)), Export.of("ro", Guarded(MemoryDevice(SIZE, writable=False)))],
            handshake_timeout_s=0.7,
            stall_timeout_s=0.7,
            report=self.reports.append,
        )
        self.address = self.server.listen(NbdAddress("disk", path))

    def client(self) -> Client:
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(10)
        stream.connect(self.address.socket_path or "")
        return Client(stream)

    def check(self) -> None:
        """It still serves others, and nothing went wrong inside."""
        assert not [report for report in self.reports if "Error:" in report], self.reports
        with NbdClient.connect(self.address) as client:
            client.write(0, b"still here")


class Client:
    """Sends what a test wants."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream

    def send(self, *data: bytes) -> None:
        self.stream.sendall(b"".join(data))

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.stream.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def is_hung_up(self) -> bool:
        """Whether the server ends the connection, whatever it sends before."""
        with contextlib.suppress(ConnectionError):
            while self.stream.recv(65536):
                pass
        return True

    def greet(self, flags: int = 3) -> None:
        assert self.receive(nbd.GREETING.size) == nbd.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, 3)
        self.send(nbd.CLIENT_FLAGS.pack(flags))

    def option(
        self, option: int, data: bytes = b"", length: int | None = None, magic: bytes = nbd.OPTION_MAGIC
    ) -> None:
        self.send(nbd.OPTION_HEADER.pack(magic, option, len(data) if length is None else length), data)

    def reply(self) -> tuple[int, bytes]:
        """Type and data of the next reply to an option."""
        magic, _option, kind, length = nbd.OPTION_REPLY.unpack(self.receive(nbd.OPTION_REPLY.size))
        assert magic == nbd.REPLY_MAGIC
        return kind, self.receive(length)

    def ask(self, option: int, data: bytes = b"", **options: Any) -> list[int]:
        """The types of all replies to an option."""
        self.option(option, data, **options)
        kinds = [self.reply()[0]]
        while kinds[-1] != nbd.REP_ACK and not kinds[-1] & nbd.REP_ERROR:
            kinds.append(self.reply()[0])
        return kinds

    def enter(self, *, structured: bool = False, data: bytes = GO) -> None:
        """Come to the transmission phase."""
        self.greet()
        if structured:
            assert self.ask(nbd.OPT_STRUCTURED_REPLY) == [nbd.REP_ACK]
            assert self.ask(nbd.OPT_SET_META_CONTEXT, CONTEXT) == [nbd.REP_META_CONTEXT, nbd.REP_ACK]
        assert self.ask(nbd.OPT_GO, data)[-1] == nbd.REP_ACK

    def request(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 7) -> None:
        self.send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length))

    def error(self) -> int:
        """The error of a simple reply."""
        magic, error, _cookie = nbd.SIMPLE_REPLY.unpack(self.receive(nbd.SIMPLE_REPLY.size))
        assert magic == nbd.SIMPLE_REPLY_MAGIC
        return int(error)

    def chunk(self) -> tuple[int, bool, bytes]:
        """Type, whether it is the last, and payload of a chunk."""
        magic, flags, kind, _cookie, length = nbd.CHUNK_HEADER.unpack(self.receive(nbd.CHUNK_HEADER.size))
        assert magic == nbd.STRUCTURED_REPLY_MAGIC
        return kind, bool(flags & nbd.CHUNK_FLAG_DONE), self.receive(length)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(str(tmp_path / "nbd.sock"))
    yield served
    served.check()
    served.server.close()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    client = served.client()
    yield client
    client.stream.close()


# --- the handshake


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        struct.pack(">I", 5) + b"disk",
        NAME,
        NAME + b"\0",
        NAME + struct.pack(">HH", 2, 3),
        NAME + struct.pack(">HHH", 1, 3, 3),
        struct.pack(">I", 0xFFFFFFFF),
    ],
)
@pytest.mark.parametrize("option", [nbd.OPT_GO, nbd.OPT_INFO, nbd.OPT_SET_META_CONTEXT, nbd.OPT_LIST_META_CONTEXT])
def test_malformed_options_are_refused(client: Client, option: int, data: bytes) -> None:
    client.greet()
    assert client.ask(option, data) == [nbd.REP_ERR_INVALID]
    assert client.ask(nbd.OPT_GO, GO)[-1] == nbd.REP_ACK


def test_what_is_asked_for_in_the_wrong_way(client: Client) -> None:
    client.greet()
    assert client.ask(nbd.OPT_SET_META_CONTEXT, CONTEXT) == [nbd.REP_ERR_INVALID]  # without structured replies
    assert client.ask(nbd.OPT_STRUCTURED_REPLY, b"x") == [nbd.REP_ERR_INVALID]
    assert client.ask(nbd.OPT_LIST, b"x") == [nbd.REP_ERR_INVALID]
    assert client.ask(nbd.OPT_STARTTLS) == [nbd.REP_ERR_POLICY]
    assert client.ask(11) == [nbd.REP_ERR_UNSUP]
    assert client.ask(0xFFFFFFFF) == [nbd.REP_ERR_UNSUP]
    assert client.ask(nbd.OPT_GO, struct.pack(">I", 1) + b"x" + struct.pack(">H", 0)) == [nbd.REP_ERR_UNKNOWN]
    assert client.ask(nbd.OPT_GO, bytes(MAX_NBD_OPTION_BYTES + 1)) == [nbd.REP_ERR_TOO_BIG]
    assert client.ask(nbd.OPT_LIST) == [nbd.REP_SERVER, nbd.REP_SERVER, nbd.REP_ACK]
    assert client.ask(nbd.OPT_INFO, NAME + struct.pack(">HHH", 2, 1, 2)) == [nbd.REP_INFO] * 4 + [nbd.REP_ACK]
    assert client.ask(nbd.OPT_ABORT) == [nbd.REP_ACK]
    assert client.is_hung_up()


def test_contexts(client: Client) -> None:
    client.greet()
    assert client.ask(nbd.OPT_STRUCTURED_REPLY) == [nbd.REP_ACK]
    found = [nbd.REP_META_CONTEXT, nbd.REP_ACK]
    for option, queries, expected in (
        (nbd.OPT_LIST_META_CONTEXT, (), found),
        (nbd.OPT_LIST_META_CONTEXT, (b"base:",), found),
        (nbd.OPT_LIST_META_CONTEXT, (b"qemu:", b"base:allocation"), found),
        (nbd.OPT_LIST_META_CONTEXT, (b"qemu:",), [nbd.REP_ACK]),
        (nbd.OPT_SET_META_CONTEXT, (b"base:",), [nbd.REP_ACK]),
        (nbd.OPT_SET_META_CONTEXT, (), [nbd.REP_ACK]),
        (nbd.OPT_SET_META_CONTEXT, (b"base:allocation",), found),
    ):
        data = b"".join(struct.pack(">I", len(query)) + query for query in queries)
        assert client.ask(option, NAME + struct.pack(">I", len(queries)) + data) == expected


def test_a_context_of_another_export_does_not_count(client: Client) -> None:
    client.greet()
    client.ask(nbd.OPT_STRUCTURED_REPLY)
    client.ask(nbd.OPT_SET_META_CONTEXT, CONTEXT)
    client.ask(nbd.OPT_GO, struct.pack(">I", 2) + b"ro" + struct.pack(">H", 0))
    client.request(Command.BLOCK_STATUS, 0, 512)
    assert client.chunk()[0] == nbd.CHUNK_ERROR_PLAIN


@pytest.mark.parametrize("padded", [True, False])
def test_export_name_the_old_way(client: Client, padded: bool) -> None:
    client.greet(1 if padded else 3)
    client.option(nbd.OPT_EXPORT_NAME, b"disk")
    size_bytes, flags = nbd.EXPORT_NAME_REPLY.unpack(client.receive(nbd.EXPORT_NAME_REPLY.size))
    assert size_bytes == SIZE and flags & nbd.ExportFlag.HAS_FLAGS
    if padded:
        assert client.receive(124) == bytes(124)
    client.request(Command.READ, 0, 512)
    assert client.error() == 0 and client.receive(512) == bytes(512)


BAD_BEGINNINGS: dict[str, Callable[[Client], None]] = {
    "nothing": lambda client: None,
    "half of the flags": lambda client: client.send(b"\0\0"),
    "unknown flags": lambda client: client.greet(0xFF),
    "no option": lambda client: client.greet(),
    "http": lambda client: client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "magic": lambda client: (client.greet(), client.option(nbd.OPT_LIST, magic=b"IHAVENOT")),  # type: ignore[func-returns-value]
    "huge option": lambda client: (client.greet(), client.option(nbd.OPT_GO, length=0xFFFFFFFF)),  # type: ignore[func-returns-value]
    "option that does not come": lambda client: (client.greet(), client.option(nbd.OPT_GO, length=1000)),  # type: ignore[func-returns-value]
    "unknown export": lambda client: (client.greet(), client.option(nbd.OPT_EXPORT_NAME, b"x")),  # type: ignore[func-returns-value]
    "huge export name": lambda client: (client.greet(), client.option(nbd.OPT_EXPORT_NAME, b"x" * 20_000)),  # type: ignore[func-returns-value]
    "too many options": lambda client: (client.greet(), [client.option(nbd.OPT_LIST) for _ in range(MAX_NBD_OPTIONS)]),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", BAD_BEGINNINGS)
def test_bad_beginnings_end_the_connection(client: Client, name: str) -> None:
    BAD_BEGINNINGS[name](client)
    start_s = time.monotonic()
    assert client.is_hung_up()
    assert time.monotonic() - start_s < 5


def test_a_handshake_that_trickles_is_ended(client: Client) -> None:
    client.greet()
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            client.send(nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, nbd.OPT_LIST, 0))
            time.sleep(0.02)
    assert client.is_hung_up()


# --- requests


def test_requests_that_are_refused(client: Client) -> None:
    client.enter()
    for command, offset, length, flags, error in (
        (Command.READ, SIZE, 1, 0, Errno.EINVAL),
        (Command.READ, 1 << 63, 512, 0, Errno.EINVAL),
        (Command.READ, 0, MAX_NBD_REQUEST_BYTES + 1, 0, Errno.EOVERFLOW),
        (Command.READ, 0, 512, nbd.CMD_FLAG_FUA, Errno.EINVAL),
        (Command.WRITE_ZEROES, SIZE - 1, 2, 0, Errno.ENOSPC),
        (Command.WRITE_ZEROES, 0, 1, 1 << 4, Errno.EINVAL),
        (Command.TRIM, (1 << 64) - 1, 0xFFFFFFFF, 0, Errno.EINVAL),
        (Command.BLOCK_STATUS, 0, 512, 0, Errno.EINVAL),  # no context
        (Command.FLUSH, 0, 0, 1 << 15, Errno.EINVAL),
        (5, 0, 512, 0, Errno.EINVAL),  # CACHE is not offered
        (8, 0, 2 * SIZE, 0, Errno.EINVAL),  # RESIZE neither: a disk keeps its size
        (0xFFFF, 0, 0, 0, Errno.EINVAL),
    ):
        client.request(command, offset, length, flags)
        assert client.error() == error, (command, offset, length, flags)
    for offset, length, flags in ((SIZE, 512, 0), (0, 3 * MiB, 1 << 14), ((1 << 64) - 1, 1, 0)):
        client.request(Command.WRITE, offset, length, flags)
        client.send(bytes(length))
        assert client.error() in (Errno.ENOSPC, Errno.EINVAL)
    client.request(Command.READ, 0, 0)
    assert client.error() == 0


def test_a_write_that_is_too_large_though_there_is_room(tmp_path: Path) -> None:
    large = SparseMemory(1 << 40)
    with NbdServer([Export.of("disk", Guarded(large))]) as server:
        address = server.listen(NbdAddress("disk", str(tmp_path / "large.sock")))
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(address.socket_path or "")
            client = Client(stream)
            client.enter()
            client.request(Command.WRITE, 0, MAX_NBD_REQUEST_BYTES)
            client.send(b"x" * MAX_NBD_REQUEST_BYTES)
            assert client.error() == 0
            client.request(Command.WRITE, 0, MAX_NBD_REQUEST_BYTES + 1)
            assert client.is_hung_up()
    assert large.used_bytes() == MAX_NBD_REQUEST_BYTES


def test_nothing_writes_to_a_readonly_export(client: Client) -> None:
    client.enter(data=struct.pack(">I", 2) + b"ro" + struct.pack(">H", 0))
    for command in (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM):
        client.request(command, 0, 512)
        if command == Command.WRITE:
            client.send(bytes(512))
        assert client.error() == Errno.EPERM


def test_structured_refusals_say_why(client: Client) -> None:
    client.enter(structured=True)
    client.request(Command.READ, SIZE, 512)
    kind, done, payload = client.chunk()
    error, length = nbd.CHUNK_ERROR.unpack_from(payload)
    assert (kind, done, error) == (nbd.CHUNK_ERROR_PLAIN, True, Errno.EINVAL)
    assert payload[nbd.CHUNK_ERROR.size :] == b"beyond the end of the export" and length == len(payload) - 6
    client.request(Command.READ, 0, 0)
    assert client.chunk() == (nbd.CHUNK_NONE, True, b"")
    client.request(Command.READ, 0, 3 * MiB)
    assert client.chunk() == (nbd.CHUNK_OFFSET_HOLE, True, nbd.HOLE.pack(0, 3 * MiB))
    client.request(Command.READ, 0, 3 * MiB, nbd.CMD_FLAG_DF)
    assert client.chunk() == (nbd.CHUNK_OFFSET_DATA, True, bytes(8 + 3 * MiB))


def test_status_replies_are_bounded(served: Served, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casbackup.limits.MAX_NBD_STATUS_EXTENTS", 100)
    for offset in range(0, SIZE, 8192):
        served.device.write(offset, b"x")
    client.enter(structured=True)
    client.request(Command.BLOCK_STATUS, 0, SIZE)
    data, zero = nbd.STATUS_DESCRIPTOR.pack(4096, 0), nbd.STATUS_DESCRIPTOR.pack(4096, 3)
    assert client.chunk()[2][4:] == (data + zero) * 50
    client.request(Command.BLOCK_STATUS, 100, SIZE - 100, nbd.CMD_FLAG_REQ_ONE)
    assert client.chunk()[2][4:] == nbd.STATUS_DESCRIPTOR.pack(8092, 3)


def test_pipelined_requests_are_answered_before_the_server_ends(tmp_path: Path) -> None:
    served = Served(str(tmp_path / "nbd.sock"))
    client = served.client()
    client.enter()
    for cookie in range(50):
        client.request(Command.WRITE, cookie * 512, 512, cookie=cookie)
        client.send(bytes((cookie,)) * 512)
    served.server.close()
    assert [client.error() for _ in range(50)] == [0] * 50
    assert served.device.content()[49 * 512 : 50 * 512] == b"\x31" * 512
    client.stream.close()


BAD_REQUESTS: dict[str, Callable[[Client], None]] = {
    "magic": lambda client: client.send(bytes(28)),
    "half a header": lambda client: client.send(b"\x25\x60\x95\x13"),
    "huge write": lambda client: client.request(Command.WRITE, 0, MAX_NBD_REQUEST_BYTES + 1),
    "huge write beyond the end": lambda client: client.request(Command.WRITE, SIZE, 0xFFFFFFFF),
    "payload that does not come": lambda client: client.request(Command.WRITE, 0, 512),
    "half of the payload": lambda client: (client.request(Command.WRITE, 0, 2 * MiB), client.send(bytes(1 * MiB))),  # type: ignore[func-returns-value]
    "disconnect": lambda client: client.request(Command.DISC),
    "end in the middle": lambda client: (
        client.request(Command.WRITE, 0, 4096),  # type: ignore[func-returns-value]
        client.send(b"x"),  # type: ignore[func-returns-value]
        client.stream.shutdown(socket.SHUT_WR),  # type: ignore[func-returns-value]
    ),
    "replies that are not taken": lambda client: [client.request(Command.READ, 0, 2 * MiB) for _ in range(20)] and None,
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_end_the_connection(served: Served, client: Client, name: str) -> None:
    client.enter()
    BAD_REQUESTS[name](client)
    deadline = time.monotonic() + 5
    while served.server.connections:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert client.is_hung_up()


def test_a_client_may_be_silent_between_requests(client: Client) -> None:
    client.enter()
    time.sleep(1)
    client.request(Command.FLUSH)
    assert client.error() == 0


options = st.builds(
    lambda option, data, lie: nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, option, len(data) + lie) + data,
    st.integers(0, 12),
    st.binary(max_size=60) | st.just(GO) | st.just(CONTEXT),
    st.sampled_from([0, 0, 0, 0, 1, 1000]),
)
requests = st.builds(
    lambda flags, command, offset, length, data: (
        nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, 1, offset, length) + data
    ),
    st.sampled_from([0, 0, 1, 2, 4, 8, 0xFFFF]),
    st.integers(0, 9),
    st.integers(0, SIZE + 10) | st.integers(0, (1 << 64) - 1),
    st.integers(0, 5000) | st.integers(0, (1 << 32) - 1),
    st.binary(max_size=100),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(str(tmp_path_factory.mktemp("nbd") / "nbd.sock"))
    yield served
    served.server.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(beginning=st.lists(options | st.binary(max_size=40), max_size=6), rest=st.lists(requests, max_size=6))
def test_nonsense(shared: Served, beginning: list[bytes], rest: list[bytes]) -> None:
    client = shared.client()
    with client.stream, contextlib.suppress(ConnectionError):
        client.greet()
        client.send(*beginning, nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, nbd.OPT_GO, len(GO)), GO, *rest)
        client.stream.shutdown(socket.SHUT_WR)
        assert client.is_hung_up()
    shared.check()
