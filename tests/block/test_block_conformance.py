"""Every implementation of BlockDevice under the conformance suite."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from casbackup.block.align import Aligned, byte_addressable
from casbackup.block.device import BlockDevice
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.client import NbdClient
from casbackup.block.qemu_img import create
from casbackup.block.qemu_nbd import QemuImage
from casbackup.block.rawfile import RawFile
from casbackup.testing.block import BlockDeviceConformance, Opened

Factory = Callable[[pytest.FixtureRequest], Opened]


def memory(_request: pytest.FixtureRequest) -> Opened:
    return MemoryDevice


def memory_readonly(_request: pytest.FixtureRequest) -> Opened:
    return lambda content: MemoryDevice(content, writable=False)


def raw_file(request: pytest.FixtureRequest) -> Opened:
    return lambda content: RawFile.open(sparse_file(request, content), writable=True)


def raw_file_readonly(request: pytest.FixtureRequest) -> Opened:
    return lambda content: RawFile.open(sparse_file(request, content))


def block_device(request: pytest.FixtureRequest) -> Opened:
    make = request.getfixturevalue("loop_device")

    def opened(content: bytes) -> BlockDevice:
        device = RawFile.open(make(len(content)), writable=True)
        device.write(0, content)
        return device

    return opened


def nbdkit_memory(request: pytest.FixtureRequest) -> Opened:
    return _nbdkit(request, "memory")


def nbdkit_bare(request: pytest.FixtureRequest) -> Opened:
    """Simple replies, no status, no zeroing, one connection, small requests."""
    filters = ("--no-sr", "--filter=nozero", "--filter=multi-conn")
    return _nbdkit(request, *filters, "memory", "multi-conn-mode=disable")


def nbdkit_blocks(request: pytest.FixtureRequest) -> Opened:
    """A server that refuses what is not aligned or larger than it said."""
    sizes = ("blocksize-minimum=4096", "blocksize-maximum=65536", "blocksize-preferred=65536")
    return _nbdkit(request, "--filter=blocksize-policy", "memory", *sizes, "blocksize-error-policy=error")


def nbdkit_blocks_aligned(request: pytest.FixtureRequest) -> Opened:
    inner = nbdkit_blocks(request)

    @contextlib.contextmanager
    def opened(content: bytes) -> Iterator[BlockDevice]:
        with inner(content) as device:
            yield byte_addressable(device)

    return opened


def aligned_memory(_request: pytest.FixtureRequest) -> Opened:
    """Below the filter a guard sees to it that only whole blocks arrive."""

    def opened(content: bytes) -> BlockDevice:
        device = MemoryDevice(content)
        device.capabilities = replace(device.capabilities, min_block_bytes=512)
        return Aligned(Guarded(device))

    return opened


def qcow2(request: pytest.FixtureRequest) -> Opened:
    path = str(request.getfixturevalue("images") / "image.qcow2")

    def opened(content: bytes) -> BlockDevice:
        create(path, "qcow2", len(content))
        image = QemuImage.open(path, "qcow2", writable=True)
        image.write(0, content)
        return image

    return opened


def vmdk_readonly(request: pytest.FixtureRequest) -> Opened:
    folder = request.getfixturevalue("images")

    def opened(content: bytes) -> BlockDevice:
        image = str(folder / "image.vmdk")
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", sparse_file(request, content), image]
        subprocess.run(convert, check=True)
        return QemuImage.open(image, "vmdk")

    return opened


def fragmenting_server(request: pytest.FixtureRequest) -> Opened:
    """A fake server that answers reads in small chunks, last first, zeros as holes, and reports status."""
    server, replies = request.getfixturevalue("fake"), request.getfixturevalue("replies")

    def opened(content: bytes) -> BlockDevice:
        server.size_bytes = len(content)
        server.flags = nbd.ExportFlag.HAS_FLAGS | nbd.ExportFlag.READ_ONLY | nbd.ExportFlag.CAN_MULTI_CONN
        server.answer = _FragmentingAnswers(content, replies)
        return server.connect()

    return opened


IMPLEMENTATIONS: dict[Factory, tuple[bool, int]] = {
    memory: (True, 1),
    memory_readonly: (False, 1),
    raw_file: (True, 1),
    raw_file_readonly: (False, 1),
    block_device: (True, 512),
    nbdkit_memory: (True, 1),
    nbdkit_bare: (True, 1),
    nbdkit_blocks: (True, 4096),
    nbdkit_blocks_aligned: (True, 4096),
    aligned_memory: (True, 1),
    qcow2: (True, 512),
    vmdk_readonly: (False, 512),
    fragmenting_server: (False, 1),
}
"""(writable, multiple of sizes) of each."""
MARKS = {block_device: pytest.mark.root, qcow2: pytest.mark.qemu, vmdk_readonly: pytest.mark.qemu}


def _cases() -> Iterator[object]:
    for factory, (writable, _multiple) in IMPLEMENTATIONS.items():
        marks = [MARKS[factory]] if factory in MARKS else []
        for name, _check in BlockDeviceConformance(MemoryDevice, writable=writable).checks():
            yield pytest.param(factory, name, id=f"{factory.__name__}-{name}", marks=marks)


@pytest.mark.parametrize(("factory", "name"), [*_cases()])
def test_conforms(factory: Factory, name: str, request: pytest.FixtureRequest) -> None:
    writable, multiple = IMPLEMENTATIONS[factory]
    suite = BlockDeviceConformance(factory(request), writable=writable, size_multiple=multiple)
    dict(suite.checks())[name]()


class _Broken(MemoryDevice):
    """Forgets the last byte of every write."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().write(offset, memoryview(data)[:-1])


def test_the_suite_finds_a_broken_device() -> None:
    with pytest.raises(AssertionError):
        BlockDeviceConformance(_Broken).run()


def test_the_suite_runs_without_a_test_framework() -> None:
    BlockDeviceConformance(lambda content: Guarded(MemoryDevice(content))).run()


def sparse_file(request: pytest.FixtureRequest, content: bytes) -> str:
    """A file with holes where the content has aligned zeros."""
    path = request.getfixturevalue("tmp_path") / "image.raw"
    with open(path, "wb") as file:
        for offset in range(0, len(content), 4096):
            if content[offset : offset + 4096].strip(b"\0"):
                file.seek(offset)
                file.write(content[offset : offset + 4096])
        file.truncate(len(content))
    return str(path)


def _nbdkit(request: pytest.FixtureRequest, *arguments: str) -> Opened:
    start = request.getfixturevalue("nbdkit")

    @contextlib.contextmanager
    def opened(content: bytes) -> Iterator[BlockDevice]:
        with start(*arguments, f"size={len(content)}") as uri, NbdClient.connect(uri) as device:
            if content:
                device.write(0, content)
            yield device

    return opened


class _FragmentingAnswers:
    """Honest answers in an inconvenient form."""

    def __init__(self, content: bytes, replies: Any) -> None:
        self._content = content
        self._replies = replies

    def __call__(self, request: Any) -> bytes:
        spans = list(self._spans(request.offset, request.offset + request.length))
        if request.command == nbd.Command.BLOCK_STATUS:
            return self._status(request.cookie, spans[:20])
        parts = [self._part(request.cookie, at, count) for at, count in reversed(spans)]
        return b"".join(parts) + self._replies.chunk(nbd.CHUNK_NONE, request.cookie)

    def _spans(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for at in range(start, end, 5000):
            yield at, min(5000, end - at)

    def _status(self, cookie: int, spans: list[tuple[int, int]]) -> bytes:
        """The last reaches two bytes beyond what was asked for where that is possible."""
        at, count = spans[-1]
        spans[-1] = at, min(count + 2, len(self._content) - at)
        return self._replies.status(cookie, *((n, 0 if self._any(at, n) else 3) for at, n in spans))

    def _part(self, cookie: int, offset: int, length: int) -> bytes:
        if not self._any(offset, length):
            return self._replies.hole(cookie, offset, length, done=False)
        return self._replies.data(cookie, offset, self._content[offset : offset + length], done=False)

    def _any(self, offset: int, length: int) -> bool:
        return bool(self._content[offset : offset + length].strip(b"\0"))
