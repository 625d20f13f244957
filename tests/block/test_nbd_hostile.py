"""An NBD server that lies, stalls or goes away never causes a hang, a wrong byte, or any other exception."""

from __future__ import annotations

import contextlib
import itertools
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casbackup.block.device import read_bytes
from casbackup.block.nbd import protocol as nbd
from casbackup.errors import NbdConnectionFailed, NbdError, NbdProtocolError, NbdRequestFailed

LENGTH = 8192
ZEROS = bytes(LENGTH)
MAX_CHUNKS = 100

Answer = Callable[[Any, Any], bytes]

READ_ANSWERS: dict[str, Answer] = {
    "magic": lambda m, r: b"\xde\xad\xbe\xef" + bytes(12),
    "unknown cookie": lambda m, r: m.data(r.cookie + 1, r.offset, ZEROS),
    "simple reply": lambda m, r: m.simple(r.cookie) + ZEROS,
    "data too long": lambda m, r: m.data(r.cookie, r.offset, bytes(LENGTH + 1)),
    "data of 4 GiB": lambda m, r: m.chunk(nbd.CHUNK_OFFSET_DATA, r.cookie, bytes(8), length=0xFFFFFFFF),
    "data before": lambda m, r: m.data(r.cookie, r.offset - 1, ZEROS),
    "data behind": lambda m, r: m.data(r.cookie, r.offset + LENGTH, b"x"),
    "data at a huge offset": lambda m, r: m.data(r.cookie, (1 << 64) - 1, b"x"),
    "data without a byte": lambda m, r: m.data(r.cookie, r.offset, b""),
    "data without an offset": lambda m, r: m.chunk(nbd.CHUNK_OFFSET_DATA, r.cookie, b"1234"),
    "data with a gap": lambda m, r: m.data(r.cookie, r.offset + 1, ZEROS[1:]),
    "data twice": lambda m, r: m.data(r.cookie, r.offset, ZEROS, done=False) + m.data(r.cookie, r.offset, ZEROS),
    "overlap": lambda m, r: (
        m.data(r.cookie, r.offset, ZEROS[:5000], done=False) + m.data(r.cookie, r.offset + 3192, ZEROS[:5000])
    ),
    "only half": lambda m, r: m.data(r.cookie, r.offset, ZEROS[:4096], done=False) + m.chunk(nbd.CHUNK_NONE, r.cookie),
    "nothing": lambda m, r: m.chunk(nbd.CHUNK_NONE, r.cookie),
    "none without done": lambda m, r: m.chunk(nbd.CHUNK_NONE, r.cookie, done=False),
    "none with bytes": lambda m, r: m.chunk(nbd.CHUNK_NONE, r.cookie, b"1234"),
    "hole too long": lambda m, r: m.hole(r.cookie, r.offset, 0xFFFFFFFF),
    "hole of nothing": lambda m, r: m.hole(r.cookie, r.offset, 0),
    "hole of odd size": lambda m, r: m.chunk(nbd.CHUNK_OFFSET_HOLE, r.cookie, bytes(13)),
    "status": lambda m, r: m.status(r.cookie, (LENGTH, 0)),
    "unknown chunk": lambda m, r: m.chunk(77, r.cookie, b"1234"),
    "too many chunks": lambda m, r: b"".join(
        m.data(r.cookie, r.offset, b"x", done=False) for _ in range(MAX_CHUNKS + 1)
    ),
    "error too short": lambda m, r: m.chunk(nbd.CHUNK_IS_ERROR + 1, r.cookie, b"12345"),
    "error too long": lambda m, r: m.chunk(nbd.CHUNK_IS_ERROR + 1, r.cookie, b"", length=0x7FFFFFFF),
    "error of zero": lambda m, r: m.error(r.cookie, 0),
    "error whose text ends before": lambda m, r: m.chunk(
        nbd.CHUNK_IS_ERROR + 1, r.cookie, nbd.CHUNK_ERROR.pack(5, 100) + b"short"
    ),
    "endless errors": lambda m, r: m.error(r.cookie, 5, done=False) * (MAX_CHUNKS + 1),
}


@pytest.mark.parametrize("name", READ_ANSWERS)
def test_malformed_answer_to_a_read(fake: Any, replies: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casbackup.block.nbd.request.MAX_CHUNKS", MAX_CHUNKS)
    fake.answer = lambda request: READ_ANSWERS[name](replies, request)
    with fake.connect() as device:
        with pytest.raises(NbdProtocolError):
            read_bytes(device, 4096, LENGTH)
        with pytest.raises(NbdConnectionFailed, match="given up after"):
            read_bytes(device, 0, 512)


def test_structured_reply_that_was_not_agreed_on(fake: Any, replies: Any) -> None:
    fake.structured = False
    fake.answer = lambda request: replies.data(request.cookie, request.offset, ZEROS)
    with fake.connect() as device, pytest.raises(NbdProtocolError, match="begins with 0x668e33ef"):
        read_bytes(device, 0, LENGTH)


STATUS_ANSWERS: dict[str, Answer] = {
    "another context": lambda m, r: m.status(r.cookie, (r.length, 0), context=m.CONTEXT + 1),
    "twice": lambda m, r: m.status(r.cookie, (r.length, 0), done=False) + m.status(r.cookie, (r.length, 0)),
    "empty": lambda m, r: m.status(r.cookie),
    "odd length": lambda m, r: m.chunk(nbd.CHUNK_BLOCK_STATUS, r.cookie, struct.pack(">I", m.CONTEXT) + b"12345"),
    "huge": lambda m, r: m.chunk(nbd.CHUNK_BLOCK_STATUS, r.cookie, b"", length=0xFFFFFFFC),
    "nothing": lambda m, r: m.chunk(nbd.CHUNK_NONE, r.cookie),
    "simple reply": lambda m, r: m.simple(r.cookie),
    "data": lambda m, r: m.data(r.cookie, r.offset, b"x"),
    "zero length": lambda m, r: m.status(r.cookie, (0, 0), (r.length, 0)),
    "past the end of the export": lambda m, r: m.status(r.cookie, (r.length + 1, 3)),
    "far past the end": lambda m, r: m.status(r.cookie, (0xFFFFFFFF, 3)),
    "something after the end": lambda m, r: m.status(r.cookie, (r.length, 0), (512, 0)),
}


@pytest.mark.parametrize("name", STATUS_ANSWERS)
def test_malformed_status(fake: Any, replies: Any, name: str) -> None:
    fake.answer = lambda request: STATUS_ANSWERS[name](replies, request)
    with fake.connect() as device, pytest.raises(NbdProtocolError):
        list(device.extents(0, device.size_bytes))


def test_status_that_fails_means_data(fake: Any, replies: Any) -> None:
    fake.answer = lambda request: replies.error(request.cookie, 22)
    with fake.connect() as device:
        assert list(device.extents(0, 4096)) == [(0, 4096, False)]


@pytest.mark.parametrize("structured", [True, False])
def test_failed_requests_leave_the_device_usable(fake: Any, replies: Any, structured: bool) -> None:
    """Also when the error comes among those of requests that were in flight with it."""
    fake.structured = structured
    numbers = itertools.count()

    def answer(request: Any) -> bytes:
        data = bytes([request.offset >> 20]) * request.length
        if structured:
            if next(numbers) == 1:
                first = replies.data(request.cookie, request.offset, data[:512], done=False)
                return first + replies.error(request.cookie, 5, b"medium error")
            return replies.data(request.cookie, request.offset, data)
        return replies.simple(request.cookie, 5) if next(numbers) == 1 else replies.simple(request.cookie) + data

    fake.size_bytes = 16 << 20
    fake.answer = answer
    with fake.connect() as device:
        with pytest.raises(NbdRequestFailed, match="read of 1048576 bytes at 1048576 failed: EIO"):
            read_bytes(device, 0, 12 << 20)
        assert read_bytes(device, 5 << 20, 512) == b"\x05" * 512


@pytest.mark.parametrize("error", [1, 28, 4711])
def test_unknown_kinds_of_errors_are_errors(fake: Any, replies: Any, error: int) -> None:
    fake.answer = lambda request: replies.error(request.cookie, error, kind=99)
    with (
        fake.connect() as device,
        pytest.raises(NbdRequestFailed, match=nbd.ERROR_NAMES.get(error, str(error))),
    ):
        read_bytes(device, 0, 512)


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 19, 20, 27, 28, 29, 28 + LENGTH - 1])
def test_connection_lost_in_the_middle_of_a_reply(fake: Any, replies: Any, cut: int) -> None:
    def answer(request: Any) -> bytes | None:
        reply = replies.data(request.cookie, request.offset, ZEROS)
        return reply[:cut] if cut else None

    fake.answer = answer
    with fake.connect(timeout_s=0.1) as device, pytest.raises(NbdConnectionFailed):
        read_bytes(device, 0, LENGTH)


def test_connection_closed_in_the_middle_of_data(fake: Any, replies: Any) -> None:
    def handshake(connection: Any) -> bool:
        fake.normal_handshake(connection)
        request = nbd.REQUEST.unpack(connection.recv(nbd.REQUEST.size))
        connection.sendall(replies.data(request[3], 0, ZEROS)[:100])
        return False

    fake.handshake = handshake
    with fake.connect() as device, pytest.raises(NbdConnectionFailed, match="closed the connection"):
        read_bytes(device, 0, LENGTH)


def test_trickling_server_is_given_up(fake: Any, replies: Any) -> None:
    """Each chunk comes in time, but the reply never ends."""

    def handshake(connection: Any) -> bool:
        fake.normal_handshake(connection)
        cookie = nbd.REQUEST.unpack(connection.recv(nbd.REQUEST.size))[3]
        for offset in range(LENGTH):
            connection.sendall(replies.data(cookie, offset, b"x", done=False))
            time.sleep(0.05)
        return False

    fake.handshake = handshake
    began = time.monotonic()
    with fake.connect(timeout_s=0.3) as device, pytest.raises(NbdConnectionFailed, match="no answer"):
        read_bytes(device, 0, LENGTH)
    assert time.monotonic() - began < 3


def test_server_that_reads_nothing_is_given_up(fake: Any) -> None:
    def handshake(connection: Any) -> bool:
        fake.normal_handshake(connection)
        time.sleep(0.4)
        return False

    fake.size_bytes = 16 << 20
    fake.handshake = handshake
    with fake.connect(timeout_s=0.2) as device, pytest.raises(NbdConnectionFailed, match="no answer"):
        device.write(0, bytes(16 << 20))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_a_reply(fake: Any, replies: Any, flips: list[tuple[int, int]]) -> None:
    """Whatever the header says then, it is an error of ours or a reply to the request."""

    def answer(request: Any) -> bytes:
        reply = bytearray(replies.data(request.cookie, 0, ZEROS[:512], done=False))
        reply += replies.hole(request.cookie, 512, LENGTH - 512)
        for position, mask in flips:
            reply[position if position < 28 else 540 + position - 28] ^= mask
        return bytes(reply)

    fake.answer = answer
    with contextlib.suppress(NbdError), fake.connect(timeout_s=0.05) as device:
        assert read_bytes(device, 0, LENGTH) == ZEROS
