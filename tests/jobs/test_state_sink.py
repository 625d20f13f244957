"""The memory of a VM as it is stored: the stream comes back as it was, and shares chunks with that of other times."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from casbackup.block.device import read_bytes
from casbackup.block.memory import MemoryDevice
from casbackup.errors import BlobDamaged
from casbackup.ids import DEFAULT_NAMESPACE, BlobId, DiskName, VmName
from casbackup.jobs.assembler import Assembler
from casbackup.jobs.backup import parked_on_error
from casbackup.jobs.restore import RestoreOptions, restore_disk
from casbackup.jobs.segment_store import SegmentStore
from casbackup.jobs.state_sink import StateSink
from casbackup.limits import ASSEMBLER_BYTES, MAX_DISK_BYTES, SEGMENT_BYTES
from casbackup.peer.disk import SnapshotDisk
from casbackup.peer.local import LocalPeer
from casbackup.progress import NoProgress
from casbackup.repository.repository import Repository
from casbackup.spec.manifest import VMSTATE, DiskRecord, Manifest
from casbackup.tree.builder import TreeBuilder
from tests.qemu.test_ram_stream import PAGE_BYTES, record

MiB = 1024 * 1024
PAGES = 3000


@pytest.fixture
def peer(repository: Repository) -> LocalPeer:
    return LocalPeer(repository)


def memory(seed: int) -> list[bytes | None]:
    """Pages, some of them zero."""
    rng = random.Random(seed)
    return [None if rng.random() < 0.2 else rng.randbytes(PAGE_BYTES) for _ in range(PAGES)]


def stream(pages: Sequence[bytes | None], lead: int = 100) -> bytes:
    records = [record(number, page, first=number == 0) for number, page in enumerate(pages)]
    return b"QEVM" + random.Random(lead).randbytes(lead) + b"".join(records) + b"\0" * 7 + b"\x10" + bytes(70_001)


def saved(peer: LocalPeer, data: bytes, time_ms: int, budget_bytes: int = ASSEMBLER_BYTES) -> Manifest:
    with parked_on_error(peer, DEFAULT_NAMESPACE, VmName("vm/1"), None) as session:
        store = SegmentStore(session, peer.config, peer.codec, NoProgress())
        leaves = TreeBuilder()
        with Assembler([MAX_DISK_BYTES], StateSink(store, [leaves], [None]), budget_bytes=budget_bytes) as assembler:
            for offset in range(0, len(data), 1_000_000):
                assembler.put(0, offset, data[offset : offset + 1_000_000])
            assembler.end_stream(0, len(data))
            assembler.finish(partial=True)
        root = leaves.finish(len(data), store.nodes)
        disk = DiskRecord(DiskName("vmstate"), len(data), root, role=VMSTATE)
        manifest = Manifest(DEFAULT_NAMESPACE, VmName("vm/1"), time_ms, 0, (disk,), stats=store.stats(0))
        return session.commit(manifest).manifest


def restored(peer: LocalPeer, manifest: Manifest) -> bytes:
    disk = manifest.disks[0]
    device = MemoryDevice(disk.size_bytes)
    report = restore_disk(peer, disk, device, RestoreOptions(target_is_zero=True))
    assert report.written_bytes + report.zero_bytes == disk.size_bytes
    return read_bytes(device, 0, disk.size_bytes)


@pytest.mark.parametrize("length", [5, SEGMENT_BYTES - 1, SEGMENT_BYTES, 2 * SEGMENT_BYTES, None])
def test_the_stream_comes_back(peer: LocalPeer, length: int | None) -> None:
    data = stream(memory(1))[:length]
    manifest = saved(peer, data, 1)
    assert manifest.stats.zero_bytes + manifest.stats.reused_bytes + manifest.stats.new_bytes == len(data)
    assert restored(peer, manifest) == data
    buffer = bytearray(len(data))
    SnapshotDisk(peer, manifest.disks[0]).read_into(0, memoryview(buffer))
    assert buffer == data


def test_with_little_memory(peer: LocalPeer) -> None:
    data = stream(memory(2))
    assert restored(peer, saved(peer, data, 1, budget_bytes=9 * MiB)) == data


def test_what_did_not_change_is_stored_once(peer: LocalPeer) -> None:
    pages = memory(3)
    first = saved(peer, stream(pages), 1)
    assert first.stats.new_bytes > 9 * MiB
    for number in range(0, PAGES, 300):
        pages[number] = random.Random(number).randbytes(PAGE_BYTES)
    data = stream([*random.Random(9).choices(pages, k=20), *pages], lead=777)
    second = saved(peer, data, 2)
    assert second.stats.new_bytes < 2 * MiB
    assert restored(peer, second) == data


def test_memory_shares_chunks_with_disks(peer: LocalPeer) -> None:
    pages = [page for page in memory(4) if page is not None]
    saved(peer, b"".join(pages), 1)  # no records: cut as a disk is
    assert saved(peer, stream(pages), 2).stats.new_bytes < 1 * MiB


def test_around_damage(peer: LocalPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a segment that cannot be had whole, everything else is."""
    data = stream(memory(5))
    disk = saved(peer, data, 1).disks[0]
    victims: list[BlobId] = []
    fetch = peer.fetch

    def damaged(ids: Sequence[BlobId]) -> Iterator[Any]:
        if len(ids) > 3 and not victims:
            victims.append(sorted(ids)[0])
        for chunk, found in fetch(ids):
            yield chunk, BlobDamaged("damaged") if chunk in victims else found

    monkeypatch.setattr(peer, "fetch", damaged)
    device = MemoryDevice(disk.size_bytes)
    report = restore_disk(peer, disk, device, RestoreOptions(target_is_zero=True, best_effort=True))
    assert report.lost
    expected = bytearray(data)
    for item in report.lost:
        expected[item.offset : item.offset + item.length] = bytes(item.length)
    assert read_bytes(device, 0, disk.size_bytes) == expected
    assert sum(item.length for item in report.lost) <= 256 * 1024
    with pytest.raises(BlobDamaged):
        restore_disk(peer, disk, MemoryDevice(disk.size_bytes), RestoreOptions(target_is_zero=True))
