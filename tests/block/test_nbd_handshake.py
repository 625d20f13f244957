"""A server that is none, or lies, stalls or refuses before the first request."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from casbackup.block.nbd import protocol as nbd
from casbackup.errors import NbdConnectionFailed, NbdProtocolError

# What follows a greeting that is right.
EXPORT = nbd.INFO_EXPORT_LAYOUT.pack(nbd.INFO_EXPORT, 1 << 20, 1)


def block_sizes(least: int, preferred: int, most: int) -> bytes:
    return nbd.INFO_BLOCK_SIZE_LAYOUT.pack(nbd.INFO_BLOCK_SIZE, least, preferred, most)


@pytest.mark.parametrize(
    ("greeting", "error", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", NbdProtocolError, "not an NBD server"),
        (nbd.INIT_MAGIC + nbd.OLDSTYLE_MAGIC + bytes(200), NbdProtocolError, "oldstyle"),
        (nbd.INIT_MAGIC + nbd.OPTION_MAGIC + b"\0\0", NbdProtocolError, "fixed newstyle"),
        (nbd.INIT_MAGIC, NbdConnectionFailed, "closed the connection"),
        (b"", NbdConnectionFailed, "closed the connection"),
    ],
)
def test_wrong_greeting(fake: Any, greeting: bytes, error: type[Exception], text: str) -> None:
    fake.handshake = lambda connection: bool(connection.sendall(greeting))
    with pytest.raises(error, match=text):
        fake.connect()


def test_silence_instead_of_a_greeting(fake: Any) -> None:
    fake.handshake = lambda connection: bool(connection.recv(1))
    with pytest.raises(NbdConnectionFailed, match=r"no answer for 0\.2 s"):
        fake.connect(connect_timeout_s=0.2)


@pytest.mark.parametrize(
    ("infos", "text"),
    [
        ((), "did not tell the size"),
        ((EXPORT[:-1],), "description of the export has 11 bytes"),
        ((nbd.INFO_EXPORT_LAYOUT.pack(nbd.INFO_EXPORT, 1 << 63, 1),), "not possible"),
        ((EXPORT, block_sizes(0, 4096, 1 << 20)), "not possible"),
        ((EXPORT, block_sizes(3, 4096, 1 << 20)), "not possible"),
        ((EXPORT, block_sizes(4096, 4096, 1024)), "not possible"),
        ((EXPORT, block_sizes(1 << 20, 1 << 20, 1 << 25)), "not possible"),
        ((EXPORT, block_sizes(1, 1, 1)[:-1]), "the block sizes have"),
        ((EXPORT,) * (nbd.MAX_OPTION_REPLIES + 1), "does not come to an end"),
    ],
)
def test_malformed_description_of_the_export(fake: Any, infos: tuple[bytes, ...], text: str) -> None:
    fake.go_infos = infos
    with pytest.raises(NbdProtocolError, match=text):
        fake.connect()


def test_unknown_infos_are_ignored(fake: Any) -> None:
    fake.go_infos = (EXPORT, struct.pack(">H", 77) + b"whatever", b"", block_sizes(1, 0, 65536 + 1))
    with fake.connect() as device:
        assert device.size_bytes == 1 << 20
        assert device.capabilities.preferred_block_bytes == 1


@pytest.mark.parametrize(
    ("kind", "payload", "error", "text"),
    [
        (nbd.REP_ERROR + 6, b"", NbdConnectionFailed, "no such export"),
        (nbd.REP_ERROR + 5, b"", NbdConnectionFailed, "TLS"),
        (nbd.REP_ERROR + 99, b"go \x1b[31m away", NbdConnectionFailed, r"go \?\[31m away"),
        (77, b"", NbdProtocolError, "type 0x4d where it is not expected"),
    ],
)
def test_refused_option(fake: Any, replies: Any, kind: int, payload: bytes, error: type[Exception], text: str) -> None:
    def handshake(connection: Any) -> bool:
        fake.greet(connection)
        connection.recv(4096)
        connection.sendall(replies.option(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ERROR + 1))
        connection.recv(4096)
        connection.sendall(replies.option(nbd.OPT_GO, kind, payload))
        return bool(connection.recv(1))

    fake.handshake = handshake
    with pytest.raises(error, match=text):
        fake.connect()


@pytest.mark.parametrize(
    "reply",
    [
        nbd.OPTION_REPLY.pack(1234, nbd.OPT_STRUCTURED_REPLY, nbd.REP_ACK, 0),
        nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, nbd.OPT_GO, nbd.REP_ACK, 0),
        nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, nbd.OPT_STRUCTURED_REPLY, nbd.REP_ACK, 0xFFFFFFFF),
    ],
    ids=["magic", "other option", "huge"],
)
def test_malformed_option_reply(fake: Any, reply: bytes) -> None:
    def handshake(connection: Any) -> bool:
        fake.greet(connection)
        connection.sendall(reply)
        return bool(connection.recv(1))

    fake.handshake = handshake
    with pytest.raises(NbdProtocolError):
        fake.connect()
