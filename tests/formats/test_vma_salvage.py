"""Salvage of VMA archives: every intact cluster comes out, what is lost is told, and nothing is made up."""

from __future__ import annotations

import random
import struct
from functools import lru_cache
from typing import Any, NamedTuple

import pytest

from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats.coverage import ArchiveCoverage
from casbackup.formats.findings import Finding
from casbackup.formats.port import ArchiveDisk, ArchiveHead, Data
from casbackup.formats.vma.reader import VmaReader
from casbackup.formats.vma.salvage import VmaSalvager
from casbackup.formats.vma.writer import VmaWriter
from casbackup.spec import vma
from casbackup.testing.archives import (
    MemorySource,
    MemoryTarget,
    Sample,
    mixed_bytes,
    random_bytes,
    read_archive,
    sample,
    write_archive,
)
from casbackup.units import MiB

HOLE = b"\xa5"
"""What salvage did not give."""


class Salvaged(NamedTuple):
    head: ArchiveHead
    contents: list[bytes]
    findings: list[Finding]

    def codes(self) -> list[str]:
        return [finding.code for finding in self.findings]


@lru_cache(maxsize=100)
def salvage(data: bytes) -> Salvaged:
    salvaged = VmaSalvager().open(MemorySource(data))
    disks = [bytearray(HOLE * disk.size_bytes) for disk in salvaged.head.disks]
    for event in ArchiveCoverage(salvaged.head).passing(salvaged.events()):
        length = len(event.data) if isinstance(event, Data) else event.length
        disks[event.disk][event.offset : event.offset + length] = (
            event.data if isinstance(event, Data) else bytes(length)
        )
    return Salvaged(salvaged.head, [bytes(disk) for disk in disks], list(salvaged.findings()))


def wrong_clusters(expected: Sample, found: Salvaged) -> set[tuple[int, int]]:
    """(device id, cluster) of all clusters that are not as in the undamaged archive."""
    wrong: set[tuple[int, int]] = set()
    contents = {disk.device_id: content for disk, content in zip(found.head.disks, found.contents, strict=True)}
    for disk, content in zip(expected.head.disks, expected.contents, strict=True):
        assert disk.device_id is not None
        got = contents.get(disk.device_id, b"")
        for cluster, start in enumerate(range(0, len(content), vma.CLUSTER_BYTES)):
            end = min(start + vma.CLUSTER_BYTES, len(content))
            if got[start:end] != content[start:end]:
                wrong.add((disk.device_id, cluster))
    return wrong


# --- the fixtures

ALL_OF_EXTENT_0 = {(1, cluster) for cluster in range(17)} | {(2, cluster) for cluster in range(41)}
EXTENT_1 = {(2, cluster) for cluster in range(41, 49)}

LOST: dict[str, set[tuple[int, int]]] = {
    "data-flip.vma": {(1, 0)},
    "data-flip-last.vma": {(2, 48)},
    "ext-cluster-17zero-fixed.vma": {(1, 5)},
    "ext-cluster-64-fixed.vma": {(1, 4)},
    "ext-cluster-eq-end-fixed.vma": {(1, 4)},
    "ext-cluster-max-fixed.vma": {(1, 4)},
    "ext-dev9-fixed.vma": {(1, 4)},
    "ext-dup-cluster-fixed.vma": {(1, 4)},
    "ext-mask-move-fixed.vma": {(1, 1)},
    "ext1-devswap-fixed.vma": {(1, 4)},
    "hole-in-data.vma": {(1, 4), (1, 16), (2, 32), (2, 33), (2, 34), (2, 35)},
    "mask-ffff-last.vma": {(1, 16)},
    "missing-ext0.vma": ALL_OF_EXTENT_0,
    "trunc-012800.vma": ALL_OF_EXTENT_0 | EXTENT_1,
    "trunc-312500.vma": EXTENT_1,
}
"""The clusters that a fixture does not have, or not as in what it was made from: labelled with another number, with
other data, or behind the place where 512 bytes are missing. Of all others, every cluster is intact.
"""

NOT_MADE_FROM_BASIC = ("legal-", "vmstate-", "dev255")
NOTHING_LEFT = ("trunc-000100.vma", "trunc-012287.vma")


def test_intact_clusters_come_out(damaged_vma: Any, basic_vma: bytes) -> None:
    if damaged_vma.name.startswith(NOT_MADE_FROM_BASIC) or damaged_vma.name in NOTHING_LEFT:
        return
    found = salvage(damaged_vma.data)
    expected = read_archive(VmaReader(), basic_vma)
    assert [(disk.device_id, disk.name) for disk in found.head.disks] == [(1, "drive-scsi0"), (2, "drive-virtio1")]
    assert wrong_clusters(expected, found) <= LOST.get(damaged_vma.name, set())


def test_what_can_be_read_is_salvaged_without_errors(damaged_vma: Any) -> None:
    if damaged_vma.facts["reference_extract"][0] == 0:
        found, read = salvage(damaged_vma.data), read_archive(VmaReader(), damaged_vma.data)
        assert (found.head, found.contents) == (read.head, list(read.contents))
        assert not [f for f in found.findings if f.is_error and damaged_vma.name != "vmstate-short.vma"]


def test_lost_ranges_are_told(damaged_vma: Any) -> None:
    """Where nothing came out, and nowhere else, there is a finding."""
    if damaged_vma.name in NOTHING_LEFT or damaged_vma.name.startswith("vmstate-"):
        return
    found = salvage(damaged_vma.data)
    holes = [bytearray(len(content)) for content in found.contents]
    numbers = {disk.name: number for number, disk in enumerate(found.head.disks)}
    for finding in found.findings:
        if finding.code == "missing-data":
            assert finding.disk is not None and finding.disk_offset is not None and finding.length is not None
            end = finding.disk_offset + finding.length
            holes[numbers[finding.disk]][finding.disk_offset : end] = HOLE * finding.length
    for content, hole in zip(found.contents, holes, strict=True):
        for start in range(0, len(content), 512):
            assert (content[start : start + 512] == HOLE * len(content[start : start + 512])) == any(
                hole[start : start + 512]
            )


def test_nothing_to_rescue(damaged_vma: Any) -> None:
    if damaged_vma.name in NOTHING_LEFT:
        with pytest.raises(ArchiveDamaged, match="nothing"):
            salvage(damaged_vma.data)


def test_device_255_comes_out(damaged_vma: Any) -> None:
    """No reader looks at it, but its data is there."""
    if damaged_vma.name == "dev255.vma":
        found = salvage(damaged_vma.data)
        assert [(disk.device_id, disk.name) for disk in found.head.disks] == [(1, "drive-scsi0"), (255, "drive-last")]
        assert not any(HOLE * 512 in content for content in found.contents)


def test_sound_archives_come_out_whole(sound_vma: Any) -> None:
    found, read = salvage(sound_vma.data), read_archive(VmaReader(), sound_vma.data)
    assert (found.head, found.contents, found.findings) == (read.head, list(read.contents), [])


# --- without a header


@pytest.mark.parametrize("lost_bytes", [12_800, 12_801, 6000, 40])
def test_lost_header(lost_bytes: int) -> None:
    """The beginning is cut off: disks get names by their ids, and end with their last cluster."""
    made = sample([9 * MiB, 3 * MiB + 512], fill=mixed_bytes)
    data = write_archive(VmaWriter(), made)
    found = salvage(data[lost_bytes:])
    assert [(d.name, d.device_id, d.size_bytes) for d in found.head.disks] == [
        ("disk1", 1, 9 * MiB),
        ("disk2", 2, 3 * MiB + 64 * 1024),
    ]
    assert (found.head.uuid, found.head.time_s, found.head.configs) == (made.head.uuid, None, ())
    assert wrong_clusters(made, found) == (clusters_of(data, 12_800) if lost_bytes > 12_800 else set())
    assert found.contents[1][3 * MiB + 512 :].strip(b"\0") == b""
    assert "header-truncated" in found.codes() or "header-magic" in found.codes()


def test_overwritten_header() -> None:
    made = sample([5 * MiB], fill=random_bytes)
    data = write_archive(VmaWriter(), made)
    found = salvage(random.Random(1).randbytes(12_800) + data[12_800:])
    assert found.contents == list(made.contents)


def test_majority_of_uuids_decides() -> None:
    """Extents of another archive before those of this one, and no header to tell which is which."""
    few, many = sample([1 * MiB], fill=random_bytes), sample([20 * MiB], fill=mixed_bytes)
    other = Sample(ArchiveHead(few.head.disks, (), bytes(reversed(range(16))), 1), few.contents)
    data = write_archive(VmaWriter(), other)[12_800:] + write_archive(VmaWriter(), many)[12_800:]
    found = salvage(data)
    assert found.head.uuid == many.head.uuid
    assert "extent-uuid" in found.codes()
    assert wrong_clusters(many, found) == set()


@pytest.mark.parametrize("place", [4, 9, 33, 57, 1000, 2046, 4100, 4130, 4132, 12_290, 12_300])
def test_flipped_bit_of_a_header_is_put_right(basic_vma: bytes, place: int) -> None:
    damaged = bytearray(basic_vma)
    damaged[place] ^= 0x10
    found, read = salvage(bytes(damaged)), read_archive(VmaReader(), basic_vma)
    assert (found.head, found.contents) == (read.head, list(read.contents))
    assert found.codes() == ["header-checksum"]


def test_several_flipped_bits_of_a_header(basic_vma: bytes) -> None:
    """They cannot be put right, but most of what the header says can be used."""
    damaged = bytearray(basic_vma)
    for place in (100, 500, 12_350):
        damaged[place] ^= 0xFF
    found, read = salvage(bytes(damaged)), read_archive(VmaReader(), basic_vma)
    assert (found.head.disks, found.contents) == (read.head.disks, list(read.contents))
    assert "header-checksum" in found.codes()


def test_size_that_cannot_be_right(basic_vma: bytes) -> None:
    damaged = bytearray(basic_vma)
    damaged[100] ^= 0xFF
    struct.pack_into(">Q", damaged, 4096 + 32 + 8, 4096)
    found = salvage(bytes(damaged))
    assert found.head.disks[0].size_bytes == 17 * 65_536
    assert wrong_clusters(read_archive(VmaReader(), basic_vma), found) == set()


# --- damaged extents


@pytest.fixture(scope="module")
def long_archive() -> tuple[Sample, bytes]:
    """21 MiB in 7 or more extents."""
    made = sample([21 * MiB], fill=random_bytes)
    return made, write_archive(VmaWriter(), made, seed=5)


@pytest.mark.parametrize("byte", [0, 3, 5, 7, 9, 25, 39, 40, 45, 511])
def test_flipped_bit_of_an_extent_is_put_right(long_archive: tuple[Sample, bytes], byte: int) -> None:
    made, data = long_archive
    damaged = bytearray(data)
    for place in extent_offsets(data):
        damaged[place + byte] ^= 0x80
    found = salvage(bytes(damaged))
    assert found.contents == list(made.contents)
    assert set(found.codes()) == {"extent-checksum"}


@pytest.mark.parametrize("length", [1, 7, 511, 512, 4096, 70_001])
def test_inserted_and_lost_bytes(long_archive: tuple[Sample, bytes], length: int) -> None:
    """Bytes inserted before one extent, and lost within the data of another: only what is behind them is lost."""
    made, data = long_archive
    places = extent_offsets(data)
    hole = places[4] + 512 + 100_000
    damaged = data[: places[2]] + b"\xee" * length + data[places[2] : hole] + data[hole + length :]
    found = salvage(damaged)
    assert wrong_clusters(made, found) <= clusters_of(data, places[4])
    assert {"junk", "extent-short", "shifted-data"} <= set(found.codes())


def test_broken_extent_costs_only_itself(long_archive: tuple[Sample, bytes]) -> None:
    made, data = long_archive
    for place in extent_offsets(data):
        damaged = bytearray(data)
        damaged[place : place + 512] = bytes(512)
        found = salvage(bytes(damaged))
        assert wrong_clusters(made, found) == clusters_of(data, place)
        lost = sum(finding.length or 0 for finding in found.findings if finding.code == "missing-data")
        assert lost == len(clusters_of(data, place)) * vma.CLUSTER_BYTES


def test_cut_anywhere(long_archive: tuple[Sample, bytes]) -> None:
    """All clusters that are before the cut come out."""
    made, data = long_archive
    for length in (13_000, 1_000_000, 4_000_001, len(data) - 1):
        found = salvage(data[:length])
        whole = [place for place in extent_offsets(data) if end_of(data, place) <= length]
        kept = set[tuple[int, int]]().union(*(clusters_of(data, place) for place in whole))
        assert not wrong_clusters(made, found) & kept


def test_archive_within_a_disk_is_not_mistaken(long_archive: tuple[Sample, bytes]) -> None:
    """A disk that holds a file which is a VMA archive: its extents are sound, but not of this archive."""
    _made, inner = long_archive
    content = inner + bytes(-len(inner) % 512)
    outer = Sample(ArchiveHead((ArchiveDisk("d", len(content), 1),), (), b"outer archive id", 7), (content,))
    data = write_archive(VmaWriter(), outer, seed=2)
    for place in extent_offsets(data):
        damaged = bytearray(data)
        damaged[place + 40 : place + 300] = bytes(260)
        found = salvage(bytes(damaged))
        assert wrong_clusters(outer, found) == clusters_of(data, place)


def test_other_archive_behind_is_left_alone(basic_vma: bytes, crafted_vma: bytes) -> None:
    """Of two archives in one file, nothing of the second may fill the gaps of the first."""
    first = basic_vma[: extent_offsets(basic_vma)[1]]
    expected = salvage(first)
    for second in (crafted_vma, crafted_vma[12_800:]):
        found = salvage(first + second)
        assert (found.head, found.contents) == (expected.head, expected.contents)


def test_second_copy_fills_the_gaps(basic_vma: bytes) -> None:
    """An archive that was appended to itself, the first copy damaged."""
    damaged = bytearray(basic_vma + basic_vma)
    damaged[12_800 + 40 : 12_800 + 200] = bytes(160)
    assert salvage(bytes(damaged)).contents == list(read_archive(VmaReader(), basic_vma).contents)


def test_state_stays_in_order() -> None:
    """A lost part of a VM's state comes as zeros in its place, so that any writer can take it; it is told."""
    head = ArchiveHead((ArchiveDisk("vmstate", 9 * MiB, 1, is_vmstate=True),), (), bytes(16), 1)
    made = Sample(head, (random_bytes(9 * MiB),))
    target = MemoryTarget(seekable=False)
    output = VmaWriter().open(target, head)
    for start in range(0, 9 * MiB, MiB):
        output.write(0, start, made.contents[0][start : start + MiB])
    output.finish()
    data = bytearray(target.data)
    place = extent_offsets(bytes(data))[3]
    data[place : place + 512] = bytes(512)
    found = salvage(bytes(data))
    lost = sorted(cluster for _, cluster in clusters_of(bytes(target.data), place))
    start, end = lost[0] * vma.CLUSTER_BYTES, (lost[-1] + 1) * vma.CLUSTER_BYTES
    content = made.contents[0]
    assert found.contents[0] == content[:start] + bytes(end - start) + content[end:]
    missing = [(f.disk_offset, f.length) for f in found.findings if f.code == "missing-data"]
    assert missing == [(start, end - start)]


def test_pipe_is_refused(basic_vma: bytes) -> None:
    with pytest.raises(ArchiveUnsupported, match="pipe"):
        VmaSalvager().open(MemorySource(basic_vma, seekable=False))


# --- helpers


def extent_offsets(data: bytes) -> list[int]:
    (position,) = struct.unpack_from(">I", data, 56)
    found = []
    while position < len(data):
        found.append(position)
        position = end_of(data, position)
    return found


def end_of(data: bytes, place: int) -> int:
    return place + 512 + struct.unpack_from(">H", data, place + 6)[0] * 4096


def clusters_of(data: bytes, place: int) -> set[tuple[int, int]]:
    slots = struct.unpack_from(">59Q", data, place + 40)
    return {(slot >> 32 & 0xFF, slot & 0xFFFF_FFFF) for slot in slots if slot >> 32 & 0xFF}
