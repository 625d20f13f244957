"""The NBD client against real servers, and how it shares connections."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from casbackup.block.device import read_bytes
from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.uri import ClientTls, NbdAddress, is_nbd_uri, parse_uri
from casbackup.errors import NbdConnectionFailed, NbdError, NbdRequestFailed, UsageError
from casbackup.units import GiB, KiB, MiB


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbd://host", NbdAddress("", None, "host", 10809)),
        ("nbd://host:99/disk", NbdAddress("disk", None, "host", 99)),
        ("nbd://[::1]:99//a%20b", NbdAddress("/a b", None, "::1", 99)),
        ("NBD://host/", NbdAddress("", None, "host", 10809)),
        ("nbd+unix:///?socket=/run/x.sock", NbdAddress("", "/run/x.sock")),
        ("nbd+unix:///vm%2F1?socket=a%20b", NbdAddress("vm/1", "a b")),
        ("nbds://host/disk", NbdAddress("disk", None, "host", 10809, ClientTls())),
        ("nbds://host/?tls-certificates=/a%20b", NbdAddress("", None, "host", 10809, ClientTls("/a b"))),
        (
            "nbds+unix:///?socket=/x&tls-hostname=me&tls-verify-peer=false",
            NbdAddress("", "/x", tls=ClientTls(None, "me", False)),
        ),
    ],
)
def test_uris(uri: str, address: NbdAddress) -> None:
    assert is_nbd_uri(uri)
    assert parse_uri(uri) == address
    assert parse_uri(str(address)) == address


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("nbds://host/disk?tls-type=x509", "unknown parameter 'tls-type'"),
        ("nbds://host/disk?tls-verify-peer=maybe", "must be true or false"),
        ("nbd://host/disk?tls-certificates=/x", "unknown parameter 'tls-certificates'"),
        ("nbds+vsock://1/disk", "only nbd:// and nbd"),
        ("nbd+vsock://1/disk", "only nbd:// and nbd"),
        ("http://host/disk", "only nbd:// and nbd"),
        ("nbd://host:port/disk", "not a valid NBD URI"),
        ("nbd://host:99999/disk", "not a valid NBD URI"),
        ("nbd://host/disk?socket=/x", "unknown parameter 'socket'"),
        ("nbd+unix:///disk", "must name one socket"),
        ("nbd+unix:///disk?socket=/x&socket=/y", "must name one socket"),
        ("nbd+unix:///disk?socket=/x&foo=1", "unknown parameter 'foo'"),
        ("nbd+unix:///disk?socket", "not a valid NBD URI"),
        ("nbd+unix://host/disk?socket=/x", "takes no host"),
        ("nbd+unix:///?socket=/" + "x" * 107, "at most 107 bytes"),
        ("nbd://host/" + "x" * 4097, "name of an export"),
        ("nbd://host/a%00b", "name of an export"),
    ],
)
def test_uris_that_are_refused(uri: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse_uri(uri)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(NbdConnectionFailed, match="No such file"):
        NbdClient.connect(NbdAddress(socket_path=str(tmp_path / "none.sock")))
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(NbdConnectionFailed, match="refused"):
        NbdClient.connect(f"nbd://127.0.0.1:{port}")


def test_tcp_and_named_export(nbdkit: Any) -> None:
    options = ("exportname-strict=true", "exportname=disk", "exportname-list=explicit")
    with nbdkit("--filter=exportname", "data", "0xab @0xfff 0", *options, tcp=True) as uri:
        with NbdClient.connect(f"{uri}disk") as device:
            assert device.size_bytes == 4096
            assert read_bytes(device, 0, 1) == b"\xab"
        with pytest.raises(NbdConnectionFailed, match="export 'other'"):
            NbdClient.connect(f"{uri}other")


def test_capabilities_of_a_readonly_server(nbdkit: Any) -> None:
    with nbdkit("--readonly", "memory", "1M") as uri, NbdClient.connect(uri) as device:
        can = device.capabilities
        assert not can.writable and not can.can_write_zeros and not can.can_trim
        assert can.multi_conn and can.knows_zeros and can.min_block_bytes == 1


def test_status_of_a_huge_sparse_disk_is_one_extent(nbdkit: Any) -> None:
    with nbdkit("memory", "64G") as uri, NbdClient.connect(uri) as device:
        device.write(40 * GiB, b"x" * 64 * KiB)
        extents = list(device.extents(0, device.size_bytes))
        assert [(e.offset, e.zero) for e in extents] == [
            (0, True),
            (40 * GiB, False),
            (40 * GiB + 64 * KiB, True),
        ]


def test_errors_of_the_server(nbdkit: Any) -> None:
    filters = ("--filter=error", "memory", "1M", "error=ENOSPC", "error-pwrite-rate=100%")
    with nbdkit(*filters) as uri, NbdClient.connect(uri) as device:
        with pytest.raises(NbdRequestFailed, match="write of 4096 bytes at 8192 failed: ENOSPC"):
            device.write(8192, bytes(4096))
        assert read_bytes(device, 0, 4096) == bytes(4096)


def test_server_killed_between_requests(nbdkit: Any) -> None:
    with nbdkit("memory", "1M") as uri:
        device = NbdClient.connect(uri)
    with device:
        with pytest.raises(NbdConnectionFailed):
            read_bytes(device, 0, 4096)
        with pytest.raises(NbdConnectionFailed):
            device.flush()


def test_slow_server(nbdkit: Any) -> None:
    with nbdkit("--filter=delay", "memory", "1M", "delay-read=3") as uri:
        device = NbdClient.connect(uri, timeout_s=0.2)
        with device, pytest.raises(NbdConnectionFailed, match=r"no answer for 0\.2 s"):
            read_bytes(device, 0, 4096)


def test_a_flush_may_take_longer(nbdkit: Any, fake: Any, replies: Any) -> None:
    def answer(request: Any) -> bytes:
        time.sleep(0.4)
        return bytes(replies.simple(request.cookie))

    fake.answer = answer
    with fake.connect(timeout_s=0.2) as device:
        device.flush()
        with pytest.raises(NbdConnectionFailed):
            device.write(0, bytes(512))


def test_requests_keep_to_the_limits(fake: Any, replies: Any) -> None:
    fake.size_bytes = 300 * MiB
    fake.flags |= nbd.ExportFlag.SEND_WRITE_ZEROES
    sizes = nbd.INFO_BLOCK_SIZE_LAYOUT.pack(nbd.INFO_BLOCK_SIZE, 1, 4096, 128 * KiB)
    fake.go_infos = (fake.export_info(), sizes)
    fake.answer = lambda request: replies.simple(request.cookie)
    with fake.connect() as device:
        device.write(5, random.Random(1).randbytes(1 * MiB))
        device.write_zeros(0, 300 * MiB)
        device.write_zeros(0, 4096, may_trim=False)
        device.discard(4096, 4096)
    writes = [r for r in fake.requests if r.command == nbd.Command.WRITE]
    assert [r.offset for r in writes] == [5 + n * 128 * KiB for n in range(8)]
    assert b"".join(r.data for r in writes) == random.Random(1).randbytes(1 * MiB)
    zeros = [r for r in fake.requests if r.command == nbd.Command.WRITE_ZEROES]
    assert sum(r.length for r in zeros[:-1]) == 300 * MiB
    assert [r.flags for r in zeros] == [0] * (len(zeros) - 1) + [nbd.CMD_FLAG_NO_HOLE]
    assert fake.requests[-1][:2] == (0, nbd.Command.TRIM)


@pytest.mark.parametrize(("several", "expected"), [(True, range(2, 5)), (False, range(1, 2))])
def test_threads_share_connections(fake: Any, replies: Any, several: bool, expected: range) -> None:
    """At most four connections, and one unless the server allows more; all bytes right."""
    connections: list[object] = []

    def handshake(connection: Any) -> bool:
        connections.append(connection)
        return bool(fake.normal_handshake(connection))

    def answer(request: Any) -> bytes:
        time.sleep(0.002)
        return bytes(replies.data(request.cookie, request.offset, bytes([request.offset >> 12]) * request.length))

    fake.handshake, fake.answer = handshake, answer
    fake.flags |= nbd.ExportFlag.CAN_MULTI_CONN if several else 0
    wrong: list[int] = []

    def reader() -> None:
        for number in random.sample(range(200), 20):
            if read_bytes(device, number << 12, 4096) != bytes([number]) * 4096:
                wrong.append(number)

    with fake.connect() as device:
        threads = [threading.Thread(target=reader) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(connections) in expected


def test_a_server_that_gives_no_second_connection(fake: Any, replies: Any) -> None:
    """The threads then share the first."""
    accepted: list[object] = []

    def handshake(connection: Any) -> bool:
        accepted.append(connection)
        return len(accepted) == 1 and fake.normal_handshake(connection)

    def answer(request: Any) -> bytes:
        time.sleep(0.01)
        return bytes(replies.data(request.cookie, request.offset, bytes(request.length)))

    fake.handshake, fake.answer = handshake, answer
    fake.flags |= nbd.ExportFlag.CAN_MULTI_CONN
    with fake.connect() as device:
        threads = [threading.Thread(target=read_bytes, args=(device, 0, 4096)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read_bytes(device, 0, 4096) == bytes(4096)
    assert len(accepted) > 1


def test_nothing_is_left_open(fake: Any, replies: Any) -> None:
    fake.answer = lambda request: replies.data(request.cookie, request.offset, b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with fake.connect() as device, pytest.raises(NbdError):
            read_bytes(device, 0, 4096)
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > before:  # the server's ends are closed by its threads
        assert time.monotonic() < deadline, "descriptors are left open"
        time.sleep(0.01)
