"""VMA under the conformance suite, and the reference program's archives read and written again."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import pytest
from dissect.archive.vma import VMA

from casbackup.formats.port import ArchiveDisk, ArchiveHead, Data
from casbackup.formats.vma import FORMAT
from casbackup.formats.vma.reader import VmaReader
from casbackup.formats.vma.writer import VmaWriter
from casbackup.spec.vma import CLUSTER_BYTES
from casbackup.testing.archives import (
    ArchiveConformance,
    MemorySource,
    MemoryTarget,
    Sample,
    mixed_bytes,
    random_bytes,
    read_archive,
    sample,
    write_archive,
)
from casbackup.units import GiB, KiB, MiB

SUITE = ArchiveConformance(FORMAT, size_multiple=512)


@pytest.mark.parametrize(("check"), [pytest.param(check, id=name) for name, check in SUITE.checks()])
def test_conformance(check: Callable[[], None]) -> None:
    check()


# --- the reference program's archives


def test_reference_archive_is_read(sound_vma: Any) -> None:
    found = read_archive(VmaReader(), sound_vma.data, seekable=False)
    facts = sound_vma.facts
    assert (found.head.uuid, found.head.time_s) == (bytes.fromhex(facts["uuid"]), facts["time_s"])
    configs = [[c.name, len(c.content), sha256(c.content).hexdigest()] for c in found.head.configs]
    assert configs == facts["configs"]
    disks = {str(d.device_id): [d.name, d.size_bytes] for d in found.head.disks}
    assert disks == {number: known[:2] for number, known in facts["disks"].items()}
    for disk, content in zip(found.head.disks, found.contents, strict=True):
        extracted = content if not disk.is_vmstate else as_reference_extracts_state(content)
        assert sha256(extracted).hexdigest() == facts["disks"][str(disk.device_id)][3], disk.name


def test_large_reference_archive(many_extents_vma: Any) -> None:
    """Its clusters are in order, so its disk can be hashed as it comes."""
    content, position = sha256(), 0
    for event in VmaReader().open(MemorySource(many_extents_vma.data, seekable=False)).events():
        assert event.offset == position
        data = event.data if isinstance(event, Data) else bytes(event.length)
        content.update(data)
        position += len(data)
    assert content.hexdigest() == many_extents_vma.facts["disks"]["1"][3]


def as_reference_extracts_state(content: bytes) -> bytes:
    """The reference program drops blocks of zeros from a VM's state."""
    blocks = (content[start : start + 4096] for start in range(0, len(content), 4096))
    return b"".join(block for block in blocks if block.strip(b"\0"))


@pytest.mark.parametrize("seed", [1, 2])
def test_reference_archive_survives_rewriting(sound_vma: Any, seed: int) -> None:
    read = read_archive(VmaReader(), sound_vma.data)
    rewritten = write_archive(VmaWriter(), read, seed=seed)
    assert read_archive(VmaReader(), rewritten) == read
    if not any(disk.is_vmstate for disk in read.head.disks):
        assert len(rewritten) == len(sound_vma.data)


def test_same_clusters_in_the_same_order_are_the_same_bytes(sound_vma: Any) -> None:
    """The reference program's order is that of its coroutines; given that, its archives are rebuilt exactly."""
    if sound_vma.name in NOT_REBUILT:
        return
    read = read_archive(VmaReader(), sound_vma.data)
    disks = {disk.device_id: number for number, disk in enumerate(read.head.disks)}
    target = MemoryTarget(seekable=False)
    output = VmaWriter().open(target, read.head)
    for device, cluster in cluster_order(sound_vma.data):
        offset = cluster * CLUSTER_BYTES
        output.write(disks[device], offset, read.contents[disks[device]][offset : offset + CLUSTER_BYTES])
    output.finish()
    assert target.data == sound_vma.data


NOT_REBUILT = {
    "crafted-legal-59-shuffled.vma": "made by hand: 59 clusters in an extent",
    "crafted-slack-nonzero.vma": "made by hand: data behind a disk's end",
    "vmstate.vma": "we store the zeros of a state",
}


def cluster_order(data: bytes) -> Iterator[tuple[int, int]]:
    """(device id, cluster) as the extents list them."""
    (position,) = struct.unpack_from(">I", data, 56)
    while position < len(data):
        (blocks,) = struct.unpack_from(">H", data, position + 6)
        for (slot,) in struct.iter_unpack(">Q", data[position + 40 : position + 512]):
            if slot >> 32 & 0xFF:
                yield slot >> 32 & 0xFF, slot & 0xFFFFFFFF
        position += 512 + blocks * 4096


# --- an independent reader


def test_independent_reader_agrees(sound_vma: Any) -> None:
    compare_with_dissect(read_archive(VmaReader(), sound_vma.data), sound_vma.data)


@pytest.mark.parametrize("seed", range(4))
def test_independent_reader_agrees_on_what_is_written(seed: int) -> None:
    made = sample([3 * MiB + 4096 * seed, 70_144, 512, 5 * MiB], fill=mixed_bytes)
    data = write_archive(VmaWriter(), made, seed=seed)
    compare_with_dissect(made, data)


def compare_with_dissect(expected: Sample, data: bytes) -> None:
    archive = VMA(io.BytesIO(data))
    assert archive.uuid.bytes == expected.head.uuid
    assert archive.configs() == {config.name: config.content for config in expected.head.configs}
    assert [(d.id, d.name, d.size) for d in archive.devices()] == [
        (d.device_id, d.name, d.size_bytes) for d in expected.head.disks
    ]
    for device, content in zip(archive.devices(), expected.contents, strict=True):
        assert device.open().read(device.size) == content


# --- events


def test_neighbouring_clusters_are_one_event() -> None:
    made = sample([12 * MiB], fill=random_bytes)
    data = write_in_order(made)
    lengths = [len(e.data) for e in VmaReader().open(MemorySource(data)).events() if isinstance(e, Data)]
    assert sum(lengths) == 12 * MiB
    assert len(lengths) <= 12 * MiB // (58 * 64 * KiB) + 3


def test_sparse_disk_is_cheap() -> None:
    """64 GiB of zeros: 18,079 headers, as many events, no data."""
    size = 64 * GiB
    target = MemoryTarget(seekable=False)
    output = VmaWriter().open(target, ArchiveHead((ArchiveDisk("d", size),)))
    output.zeros(0, 0, size)
    output.finish()
    assert len(target.data) == 12_800 + -(-(size // (64 * KiB)) // 58) * 512
    events = VmaReader().open(MemorySource(bytes(target.data), seekable=False)).events()
    assert sum(event.length for event in events if not isinstance(event, Data)) == size


def write_in_order(made: Sample) -> bytes:
    target = MemoryTarget(seekable=False)
    output = VmaWriter().open(target, made.head)
    for number, content in enumerate(made.contents):
        for start in range(0, len(content), 4 * MiB):
            output.write(number, start, content[start : start + 4 * MiB])
    output.finish()
    return bytes(target.data)
