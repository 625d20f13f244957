"""A real guest, all of whose disks come from our NBD server, is backed up while it writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

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
from tests.boot_guest import BOOT_DISK, DISK_BYTES, BootGuest, check_prefix

pytestmark = pytest.mark.qemu


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
    boot = Overlay(MemoryDevice(BOOT_DISK, writable=False), SparseMemory(len(BOOT_DISK)))
    with NbdServer([Export.of("boot", Guarded(boot)), *proxy.exports]) as server:
        yield server.listen(NbdAddress(socket_path=str(tmp_path / "nbd.sock")))


@pytest.fixture
def guest(address: NbdAddress, tmp_path: Path) -> Iterator[BootGuest]:
    options: list[str] = []
    for number, name in enumerate(("boot", "a", "b"), 1):
        options += ["-drive", f"if=none,id={name},format=raw,file={replace(address, export=name)}"]
        options += ["-device", f"virtio-blk-pci,drive={name},bootindex={number}"]
    guest = BootGuest(tmp_path, options)
    yield guest
    guest.kill()


def test_backups_of_a_running_guest(
    guest: BootGuest, disks: dict[str, SparseMemory], proxy: DiskProxy, address: NbdAddress
) -> None:
    """Each holds both disks after the same number of writes, and the guest notices nothing."""
    guest.wait_written(256)
    pushed = check_prefix(*push(proxy))
    guest.wait_written(256)
    pulled = check_prefix(*pull(address, guest))
    guest.wait_written(256)
    assert guest.written() > pulled > pushed >= 256
    assert not guest.saw_errors()
    guest.kill()
    check_prefix(*(read_bytes(disk, 0, DISK_BYTES) for disk in disks.values()))


def push(proxy: DiskProxy) -> tuple[bytes, bytes]:
    consumer = Disks()
    spool = Spool(consumer, limit_bytes=8 * MiB)
    proxy.push(spool)
    spool.close()
    return bytes(consumer.disks["a"]), bytes(consumer.disks["b"])


def pull(address: NbdAddress, guest: BootGuest) -> tuple[bytes, bytes]:
    """The guest writes on between the beginning and the reading."""
    first, second = (NbdClient.connect(replace(address, export=f"{name}@snapshot")) for name in ("a", "b"))
    with first, second:
        guest.wait_written(256)
        return read_bytes(first, 0, DISK_BYTES), read_bytes(second, 0, DISK_BYTES)
