"""The NBD server against our own client, QEMU's and libnbd's programs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.block.device import BlockDevice, read_bytes
from casbackup.block.filters.copy_before_write import CopyBeforeWrite
from casbackup.block.filters.faults import Fault, Faults, Rule
from casbackup.block.filters.operation import Operation
from casbackup.block.filters.overlay import Overlay
from casbackup.block.filters.saving import ScratchSaver
from casbackup.block.filters.snapshot_view import SnapshotView
from casbackup.block.filters.trace import Record, Trace
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.rawfile import RawFile
from casbackup.block.sparse import SparseMemory
from casbackup.errors import AddressUnusable, NbdConnectionFailed, NbdRequestFailed, TargetUnwritable, UsageError
from casbackup.testing.block import BlockDeviceConformance
from casbackup.units import GiB, KiB, MiB
from tests.waiting import wait_until

SIZE = 8 * MiB


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., NbdAddress]]:
    """``serve(device)`` or ``serve(export, export, ...)``: the address of a new server."""
    with contextlib.ExitStack() as servers:

        def start(*exports: BlockDevice | Export, tcp: bool = False, **options: object) -> NbdAddress:
            offered = [one if isinstance(one, Export) else Export.of("", Guarded(one)) for one in exports]
            server = servers.enter_context(NbdServer(offered, **options))  # type: ignore[arg-type]
            start.server = server  # type: ignore[attr-defined]
            path = str(tmp_path / f"nbd{len(os.listdir(tmp_path))}.sock")
            return server.listen(NbdAddress(host="127.0.0.1", port=0) if tcp else NbdAddress(socket_path=path))

        yield start


def sparse_content() -> bytes:
    content = bytearray(SIZE)
    for offset, length in ((0, 100_000), (2 * MiB, 1 * MiB), (5 * MiB + 4096, 4096), (SIZE - 512, 512)):
        content[offset : offset + length] = random.Random(offset).randbytes(length)
    return bytes(content)


def checks(writable: bool) -> list[str]:
    return [name for name, _check in BlockDeviceConformance(MemoryDevice, writable=writable).checks()]


def with_blocks(content: bytes) -> BlockDevice:
    device = MemoryDevice(content)
    device.capabilities = replace(device.capabilities, min_block_bytes=512)
    return device


def without_zeros(content: bytes) -> BlockDevice:
    device = MemoryDevice(content)
    device.capabilities = replace(device.capabilities, knows_zeros=False, multi_conn=False)
    return device


@pytest.mark.parametrize("check", checks(writable=True))
@pytest.mark.parametrize("make", [MemoryDevice, with_blocks, without_zeros])
def test_client_and_server_conform(
    make: Callable[[bytes], BlockDevice], check: str, serve: Callable[..., NbdAddress]
) -> None:
    multiple = 512 if make is with_blocks else 1
    suite = BlockDeviceConformance(lambda content: NbdClient.connect(serve(make(content))), size_multiple=multiple)
    dict(suite.checks())[check]()


@pytest.mark.parametrize("check", checks(writable=False))
def test_readonly_export_conforms(check: str, serve: Callable[..., NbdAddress]) -> None:
    def opened(content: bytes) -> BlockDevice:
        return NbdClient.connect(serve(MemoryDevice(content, writable=False), tcp=True))

    dict(BlockDeviceConformance(opened, writable=False).checks())[check]()


def test_errors_reach_the_client_and_the_connection_goes_on(serve: Callable[..., NbdAddress]) -> None:
    def full(message: str) -> TargetUnwritable:
        error = TargetUnwritable(message)
        error.__cause__ = OSError(28, "No space left on device")
        return error

    device = Faults(MemoryDevice(SIZE))
    everything = frozenset(Operation)
    with NbdClient.connect(serve(device)) as client:
        device.set_rules(Rule(everything))
        with pytest.raises(NbdRequestFailed, match=r"read of 512 bytes at 0 failed: EIO \(extents at byte 0 failed"):
            read_bytes(client, 0, 512)
        with pytest.raises(NbdRequestFailed, match="flush failed: EIO"):
            client.flush()
        device.set_rules(Rule(everything, error=full))
        with pytest.raises(NbdRequestFailed, match="write of 1048576 bytes at 0 failed: ENOSPC"):
            client.write(0, bytes(4 * MiB))
        with pytest.raises(NbdRequestFailed, match="write zeroes of 512 bytes at 0 failed: ENOSPC"):
            client.write_zeros(0, 512)
        with pytest.raises(NbdRequestFailed, match="trim"):
            client.discard(0, 512)
        assert list(client.extents(0, 4096)) == [(0, 4096, False)]
        device.set_rules()
        client.write(0, b"well")
        assert read_bytes(client, 0, 4) == b"well"


def test_zeros_are_not_sent(serve: Callable[..., NbdAddress]) -> None:
    records = list[Record]()
    with NbdClient.connect(serve(Trace(MemoryDevice(sparse_content(), writable=False), records.append))) as client:
        assert read_bytes(client, 0, SIZE) == sparse_content()
    assert sum(record.length for record in records if record.operation is Operation.READ) < 1.5 * MiB


def test_several_exports_and_listeners(serve: Callable[..., NbdAddress], tmp_path: Path) -> None:
    address = serve(*(Export.of(name, Guarded(MemoryDevice(name.encode() * 512))) for name in ("a", "b", "vm/1 ü")))
    other = serve.server.listen(NbdAddress(host="127.0.0.1", port=0))  # type: ignore[attr-defined]
    for place in (address, other):
        for name in ("a", "b", "vm/1 ü"):
            with NbdClient.connect(replace(place, export=name)) as client:
                assert read_bytes(client, 0, 1) == name.encode()[:1]
        with pytest.raises(NbdConnectionFailed, match="no such export"):
            NbdClient.connect(replace(place, export="c"))
    with pytest.raises(UsageError, match="same name"):
        NbdServer([Export.of("a", MemoryDevice(1)), Export.of("a", MemoryDevice(1))])


def test_an_export_is_opened_for_the_first_and_closed_after_the_last(serve: Callable[..., NbdAddress]) -> None:
    """So connecting takes a snapshot: all connections see it, until nobody is there any more."""
    disk = CopyBeforeWrite(MemoryDevice(b"a" * SIZE))

    def snapshot() -> BlockDevice:
        saver = ScratchSaver(SparseMemory(SIZE))
        return Guarded(SnapshotView(disk.begin(saver), saver))

    live, frozen = Export.of("live", Guarded(disk)), Export("frozen", snapshot)
    address = serve(live, frozen)
    with NbdClient.connect(replace(address, export="live")) as guest:
        for letter in (b"b", b"c"):
            with NbdClient.connect(replace(address, export="frozen")) as backup:
                before = read_bytes(disk, 0, SIZE)
                guest.write(0, letter * 4 * MiB)
                with NbdClient.connect(replace(address, export="frozen")) as second:
                    assert read_bytes(second, 0, SIZE) == before
                assert read_bytes(backup, 0, SIZE) == before
                assert not frozen.wait_unused(0.01)
            assert frozen.wait_unused(5)
            assert disk.point is None


def test_an_export_that_cannot_be_opened(serve: Callable[..., NbdAddress]) -> None:
    def broken() -> BlockDevice:
        raise TargetUnwritable("no place for it")

    with pytest.raises(NbdConnectionFailed, match="no place for it"):
        NbdClient.connect(serve(Export("", broken)))


def test_closing_answers_what_has_arrived(serve: Callable[..., NbdAddress]) -> None:
    under_way = threading.Event()

    def slow(_seconds: float) -> None:
        under_way.set()
        time.sleep(0.1)

    device = Faults(MemoryDevice(SIZE), Rule(frozenset({Operation.WRITE}), Fault.DELAY, delay_s=1), sleep=slow)
    address = serve(device)
    client = NbdClient.connect(address)
    written = threading.Thread(target=client.write, args=(0, b"x" * MiB))
    written.start()
    under_way.wait(30)
    serve.server.close()  # type: ignore[attr-defined]
    written.join()
    assert read_bytes(device, 0, MiB) == b"x" * MiB
    assert not os.path.exists(address.socket_path or "")
    with pytest.raises(NbdConnectionFailed):
        read_bytes(client, 0, 1)
    with pytest.raises(NbdConnectionFailed):
        NbdClient.connect(address)


def test_closing_does_not_wait_for_a_device_that_hangs(serve: Callable[..., NbdAddress]) -> None:
    under_way, go_on = threading.Event(), threading.Event()

    def hang(_seconds: float) -> None:
        under_way.set()
        go_on.wait(30)

    device = Faults(MemoryDevice(SIZE), Rule(frozenset({Operation.WRITE}), Fault.DELAY, delay_s=1), sleep=hang)
    client = NbdClient.connect(serve(device))

    def write() -> None:
        with pytest.raises(NbdConnectionFailed):
            client.write(0, b"x")

    failed = threading.Thread(target=write)
    failed.start()
    under_way.wait(30)
    start_s = time.monotonic()
    serve.server.close(timeout_s=0.2)  # type: ignore[attr-defined]
    assert time.monotonic() - start_s < 5
    failed.join()
    go_on.set()


def test_limit_of_connections(serve: Callable[..., NbdAddress]) -> None:
    reports = list[str]()
    address = serve(MemoryDevice(SIZE), max_connections=2, report=reports.append)
    clients = [NbdClient.connect(address) for _ in range(2)]
    with pytest.raises(NbdConnectionFailed, match="closed the connection"):
        NbdClient.connect(address)
    for client in clients:
        client.close()
    wait_until(lambda: not serve.server.connections)  # type: ignore[attr-defined]
    NbdClient.connect(address).close()
    assert any("refused, there are 2 connections" in report for report in reports)


def test_where_to_listen(tmp_path: Path, serve: Callable[..., NbdAddress]) -> None:
    address = serve(MemoryDevice(1))
    assert os.stat(address.socket_path or "").st_mode & 0o777 == 0o600
    server = NbdServer([])
    with pytest.raises(AddressUnusable, match="cannot listen there"):
        server.listen(address)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(AddressUnusable):
        server.listen(NbdAddress(socket_path=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(UsageError, match="at most 107 bytes"):
        server.listen(NbdAddress(socket_path="/" + "x" * 107))
    left_behind = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left_behind))
    server.listen(NbdAddress(socket_path=str(left_behind)))
    with pytest.raises(NbdConnectionFailed, match="no such export"):
        NbdClient.connect(NbdAddress(socket_path=str(left_behind)))
    server.close()
    assert not left_behind.exists()


def test_nothing_is_left_behind(serve: Callable[..., NbdAddress]) -> None:
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    address = serve(MemoryDevice(SIZE))
    for _ in range(5):
        with NbdClient.connect(address) as client:
            read_bytes(client, 0, SIZE)
    serve.server.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads


# --- other people's clients


def run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for offset, length in ((0, 100_000), (2 * MiB, 1 * MiB), (5 * MiB + 4096, 4096), (SIZE - 512, 512)):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(length))
    assert path.read_bytes() == sparse_content()
    return path


def test_nbdinfo(serve: Callable[..., NbdAddress], image: Path) -> None:
    readonly = Export.of("disk", Guarded(RawFile.open(str(image))), description="the boot disk")
    address = replace(serve(readonly, Export.of("other", Guarded(MemoryDevice(1 * MiB)))), export="disk")
    (export,) = json.loads(run("nbdinfo", "--json", str(address)))["exports"]
    assert export["export-name"] == "disk" and export["description"] == "the boot disk"
    assert export["export-size"] == SIZE and export["block_size_minimum"] == 1
    assert export["is_read_only"] and export["can_multi_conn"] and export["can_df"] and not export["can_trim"]
    assert export["contexts"] == ["base:allocation"]
    listed = json.loads(run("nbdinfo", "--json", "--list", str(address)))["exports"]
    assert {(one["export-name"], one["is_read_only"], one["can_fua"]) for one in listed} == {
        ("disk", True, False),
        ("other", False, True),
    }
    extents = json.loads(run("nbdinfo", "--json", "--map", str(address)))
    assert sum(extent["length"] for extent in extents) == SIZE
    assert [extent["type"] for extent in extents[:3]] == [0, 3, 0]


@pytest.mark.parametrize(
    "options", [(), ("--connections=1",), ("--no-extents", "--request-size=33554432"), ("-S", "512")]
)
def test_nbdcopy_both_ways(serve: Callable[..., NbdAddress], image: Path, tmp_path: Path, options: tuple[str]) -> None:
    source = serve(RawFile.open(str(image)))
    copy = tmp_path / "copy.raw"
    run("nbdcopy", *options, str(source), str(copy))
    assert copy.read_bytes() == sparse_content()
    device = MemoryDevice(b"\xee" * SIZE)
    run("nbdcopy", "--flush", *options, str(copy), str(serve(device, tcp=True)))
    assert device.content() == sparse_content()


@pytest.mark.qemu
def test_qemu_img(serve: Callable[..., NbdAddress], image: Path, tmp_path: Path) -> None:
    address = serve(RawFile.open(str(image)))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(address), str(tmp_path / "copy.qcow2"))
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(address), str(tmp_path / "copy.qcow2"))
    device = MemoryDevice(b"\xee" * SIZE)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", str(tmp_path / "copy.qcow2"), str(serve(device)))
    assert device.content() == sparse_content()
    mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", str(address)))
    assert any(extent["zero"] for extent in mapped) and sum(extent["length"] for extent in mapped) == SIZE


@pytest.mark.qemu
def test_qemu_io(serve: Callable[..., NbdAddress]) -> None:
    records = list[Record]()
    device = MemoryDevice(b"\xee" * SIZE)
    commands = (
        "write -P 0x11 0 1M",
        "write -f -P 0x22 1000 3000",
        "write -z 2M 64k",
        "write -z -u 3M 64k",
        "discard 4M 1M",
        "flush",
        "read -P 0x22 1000 3000",
        "read -P 0 2M 64k",
        "aio_write -P 0x33 5M 2M",
        "aio_read 0 8M",
        "aio_flush",
    )
    arguments = [argument for command in commands for argument in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, str(serve(Trace(device, records.append))))
    assert "Pattern verification failed" not in output
    content = device.content()
    assert content[1000:4000] == b"\x22" * 3000 and content[4000 : 1 * MiB] == b"\x11" * (1 * MiB - 4000)
    assert not any(content[2 * MiB : 2 * MiB + 64 * KiB]) and not any(content[3 * MiB : 3 * MiB + 64 * KiB])
    assert content[5 * MiB : 7 * MiB] == b"\x33" * 2 * MiB
    kinds = [record.operation for record in records]
    assert Operation.DISCARD in kinds and kinds.count(Operation.FLUSH) >= 2


LIBNBD = """
import nbd, sys
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(sys.argv[1])
assert h.get_size() == 8 << 20 and h.is_read_only() is False and h.can_df() and h.can_fua()
h.set_strict_mode(0)
h.pwrite(b"x" * 4096, 0, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 0) == b"x" * 4096
chunks = []
h.pread_structured(8 << 20, 0, lambda data, offset, status, error: chunks.append((offset, len(data), status)))
assert {status for _, _, status in chunks} == {nbd.READ_DATA, nbd.READ_HOLE}, chunks
one = []
h.pread_structured(4 << 20, 0, lambda data, offset, status, error: one.append(len(data)), nbd.CMD_FLAG_DF)
assert one == [4 << 20], one
h.zero(1 << 20, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
h.trim(1 << 20, 2 << 20)
h.flush()
extents = []
h.block_status(8 << 20, 0, lambda context, offset, entries, error: extents.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 2, extents
for call in (lambda: h.pread(512, 8 << 20), lambda: h.pwrite(bytes(512), 8 << 20), lambda: h.cache(512, 0)):
    try:
        call()
    except nbd.Error as error:
        print(error.errno)
print(h.get_protocol(), h.get_structured_replies_negotiated())
h.shutdown()
"""


def test_libnbd(serve: Callable[..., NbdAddress]) -> None:
    if subprocess.run(["/usr/bin/python3", "-c", "import nbd"], capture_output=True).returncode != 0:
        pytest.skip("libnbd's Python binding is not installed")
    output = run("/usr/bin/python3", "-c", LIBNBD, str(serve(MemoryDevice(SIZE))))
    assert output.split() == ["EINVAL", "ENOSPC", "EINVAL", "newstyle-fixed", "True"]


@pytest.mark.qemu
def test_a_guest_disk_over_an_overlay(serve: Callable[..., NbdAddress], image: Path) -> None:
    """What a VM writes to a restored disk stays in the overlay, and can be listed."""
    overlay = Overlay(RawFile.open(str(image)), SparseMemory(SIZE))
    run("qemu-io", "-f", "raw", "-c", "write -P 7 3M 1000", "-c", "write -z 2M 64k", str(serve(overlay)))
    assert image.read_bytes() == sparse_content()
    assert [(extent.offset, extent.length, extent.zero) for extent in overlay.changed()] == [
        (2 * MiB, 64 * KiB, True),
        (3 * MiB, 64 * KiB, False),
    ]


def test_a_huge_export(serve: Callable[..., NbdAddress], tmp_path: Path) -> None:
    path = tmp_path / "huge.raw"
    path.touch()
    os.truncate(path, 8 * 1024 * GiB)
    with NbdClient.connect(serve(RawFile.open(str(path), writable=True), stall_timeout_s=math.inf)) as client:
        assert list(client.extents(0, client.size_bytes)) == [(0, client.size_bytes, True)]
        client.write(client.size_bytes - 3, b"end")
        assert read_bytes(client, client.size_bytes - 4, 4) == b"\0end"
