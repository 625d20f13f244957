"""A real guest, all of whose disks come from our NBD server, is backed up while it writes."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from casbackup.block.device import read_bytes
from casbackup.block.filters.overlay import Overlay
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.proxy import DiskProxy
from casbackup.block.sparse import SparseMemory
from casbackup.block.spool import Spool
from casbackup.units import MiB

pytestmark = pytest.mark.qemu

BOOT_SECTOR = Path(__file__).parents[1] / "qemu" / "fixtures" / "writer.bin"
DISK_BYTES = 64 * MiB
_STEP = 0x9E3779B1
_INVERSE = pow(_STEP, -1, 2**32)


class Guest:
    """A VM of one boot sector that writes numbered blocks of 4 KiB to two disks in turn.

    Write n goes to disk n % 2; with h = n * 0x9E3779B1 it puts h, h + 1 … into block h >> 18. It tells every 64
    writes how many there were, and "E0" after an error.
    """

    def __init__(self, serial: Path, address: NbdAddress) -> None:
        self._serial = serial
        command = ["qemu-system-x86_64", "-M", "pc", "-m", "16", "-accel", "tcg", "-display", "none", "-nodefaults"]
        command += ["-serial", f"file:{serial}"]
        for number, name in enumerate(("boot", "a", "b"), 1):
            uri = replace(address, export=name)
            command += ["-drive", f"if=none,id={name},format=raw,file={uri}"]
            command += ["-device", f"virtio-blk-pci,drive={name},bootindex={number}"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def written(self) -> int:
        numbers = [line for line in self._text().split() if len(line) == 8]
        return int(numbers[-1], 16) if numbers else 0

    def wait_written(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while self.written() < count:
            assert self.process.poll() is None and time.monotonic() < deadline, f"only {self.written()} writes"
            time.sleep(0.02)

    def saw_errors(self) -> bool:
        return "E0" in self._text()

    def _text(self) -> str:
        return self._serial.read_text(errors="replace") if self._serial.exists() else ""


@pytest.fixture
def guest_of(tmp_path: Path) -> Iterator[Callable[[NbdAddress], Guest]]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    guests = list[Guest]()

    def start(address: NbdAddress) -> Guest:
        guests.append(Guest(tmp_path / "serial", address))
        return guests[-1]

    yield start
    for guest in guests:
        guest.process.kill()
        guest.process.wait()


def check_prefix(first: bytes, second: bytes) -> int:
    """Both disks hold exactly the first N writes. Returns N."""
    count = 0
    for disk in (first, second):
        heads = np.frombuffer(disk, dtype=np.uint32)[::1024].astype(np.uint64)
        count = max(count, int((heads * np.uint64(_INVERSE) % np.uint64(2**32)).max()) + 1)
    expected = [np.zeros((DISK_BYTES // 4096, 1024), dtype=np.uint32) for _ in range(2)]
    words = np.arange(1024, dtype=np.uint32)
    for number in range(count):
        start = np.uint32(number * _STEP % 2**32)
        expected[number & 1][int(start) >> 18] = words + start
    assert first == expected[0].tobytes() and second == expected[1].tobytes(), f"not the first {count} writes"
    return count


class Disks:
    """A consumer that keeps both disks, and takes data at 100 MB/s at the most."""

    def __init__(self) -> None:
        self.disks = {"a": bytearray(DISK_BYTES), "b": bytearray(DISK_BYTES)}

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        time.sleep(len(data) / 100e6)
        self.disks[disk][offset : offset + len(data)] = data

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.disks[disk][offset : offset + length] = bytes(length)


@pytest.fixture
def disks() -> dict[str, SparseMemory]:
    return {name: SparseMemory(DISK_BYTES) for name in ("a", "b")}


@pytest.fixture
def proxy(disks: dict[str, SparseMemory]) -> Iterator[DiskProxy]:
    with DiskProxy(disks, scratch=SparseMemory, limit_bytes=DISK_BYTES) as proxy:
        yield proxy


@pytest.fixture
def address(proxy: DiskProxy, tmp_path: Path) -> Iterator[NbdAddress]:
    content = BOOT_SECTOR.read_bytes().ljust(1 * MiB, b"\0")
    boot = Overlay(MemoryDevice(content, writable=False), SparseMemory(len(content)))
    with NbdServer([Export.of("boot", Guarded(boot)), *proxy.exports]) as server:
        yield server.listen(NbdAddress(socket_path=str(tmp_path / "nbd.sock")))


def test_backups_of_a_running_guest(
    guest_of: Callable[[NbdAddress], Guest], disks: dict[str, SparseMemory], proxy: DiskProxy, address: NbdAddress
) -> None:
    """Each holds both disks after the same number of writes, and the guest notices nothing."""
    guest = guest_of(address)
    guest.wait_written(256)
    pushed = check_prefix(*push(proxy))
    guest.wait_written(pushed + 256)
    pulled = check_prefix(*pull(address, guest))
    guest.wait_written(pulled + 256)
    assert guest.written() > pulled > pushed >= 256
    assert not guest.saw_errors()
    guest.process.kill()
    guest.process.wait()
    check_prefix(*(read_bytes(disk, 0, DISK_BYTES) for disk in disks.values()))


def push(proxy: DiskProxy) -> tuple[bytes, bytes]:
    consumer = Disks()
    spool = Spool(consumer, limit_bytes=8 * MiB)
    proxy.push(spool)
    spool.close()
    return bytes(consumer.disks["a"]), bytes(consumer.disks["b"])


def pull(address: NbdAddress, guest: Guest) -> tuple[bytes, bytes]:
    """The guest writes on between the beginning and the reading."""
    first, second = (NbdClient.connect(replace(address, export=f"{name}@snapshot")) for name in ("a", "b"))
    with first, second:
        guest.wait_written(guest.written() + 256)
        return read_bytes(first, 0, DISK_BYTES), read_bytes(second, 0, DISK_BYTES)
