"""What the VMA writer promises beyond the conformance suite: limits, layout, memory, and no copies of large data."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.errors import ArchiveIncomplete, ArchiveLimit, ArchiveUnsupported
from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveHead
from casbackup.formats.vma import FORMAT, extent, header, verify, walk
from casbackup.formats.vma import salvage as salvage_module
from casbackup.formats.vma.reader import VmaReader
from casbackup.formats.vma.writer import VmaWriter
from casbackup.fs import Buffer
from casbackup.testing.archives import MemorySource, MemoryTarget, Sample, random_bytes, read_archive, write_archive
from casbackup.units import KiB, MiB

DISK = ArchiveDisk("drive-scsi0", MiB, 1)
PAGE = Path(__file__).parents[2] / "docs" / "spec" / "vma.md"


def disks(count: int) -> tuple[ArchiveDisk, ...]:
    return tuple(ArchiveDisk(f"d{number}", 512) for number in range(count))


def configs(count: int, size: int = 1) -> tuple[ArchiveConfig, ...]:
    return tuple(ArchiveConfig(f"c{number}", bytes(size)) for number in range(count))


# --- limits


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (ArchiveHead(disks(255)), "255 disks; a VMA archive holds 254"),
        (ArchiveHead((DISK,), configs(257)), "257 configs"),
        (ArchiveHead((replace(DISK, name="a/b"),)), "'a/b'"),
        (ArchiveHead((replace(DISK, name=".."),)), r"'\.\.'"),
        (ArchiveHead((replace(DISK, name=""),)), "''"),
        (ArchiveHead((replace(DISK, name="a\0b"),)), r"a\\x00b"),
        (ArchiveHead((replace(DISK, name="a\ud800"),)), "is not text"),
        (ArchiveHead((DISK,), time_s=1 << 63), "more than 64 bits"),
        (ArchiveHead((replace(DISK, name="x" * 65_535),)), "65535 bytes; the limit is 65534"),
        (ArchiveHead((DISK, DISK)), "two disks have the name 'drive-scsi0'"),
        (ArchiveHead((replace(DISK, size_bytes=0),)), "is empty"),
        (ArchiveHead((replace(DISK, size_bytes=(1 << 48) + 1),)), "more than 281474976710656"),
        (ArchiveHead((replace(DISK, name="vmstate"),)), "the VM's state"),
        (ArchiveHead((replace(DISK, is_vmstate=True), ArchiveDisk("s", 1, None, is_vmstate=True))), "two disks"),
        (ArchiveHead((DISK,), (ArchiveConfig("../x", b""),)), r"'\.\./x'"),
        (ArchiveHead((DISK,), (ArchiveConfig("c", b"1"), ArchiveConfig("c", b"2"))), "two configs"),
        (ArchiveHead((DISK,), configs(1, 65_536)), "has 65536 bytes, more than 65535"),
        (ArchiveHead((DISK,), configs(9, 65_535)), "make a header of"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_byte(head: ArchiveHead, message: str) -> None:
    with pytest.raises(ArchiveLimit, match=message):
        VmaWriter().check(head)
    target = MemoryTarget(seekable=False)
    with pytest.raises(ArchiveLimit):
        VmaWriter().open(target, head)
    assert not target.data


@pytest.mark.parametrize(
    "head",
    [
        ArchiveHead(disks(254)),
        ArchiveHead((DISK,), configs(256)),
        ArchiveHead((replace(DISK, name="x" * 65_534),)),
        ArchiveHead((DISK,), configs(7, 65_535)),
        ArchiveHead((DISK,), configs(1, 0)),
    ],
)
def test_what_just_fits_is_read_back(head: ArchiveHead) -> None:
    made = Sample(head, tuple(bytes(disk.size_bytes) for disk in head.disks))
    found = read_archive(VmaReader(), write_archive(VmaWriter(), made))
    assert [disk.name for disk in found.head.disks] == [disk.name for disk in head.disks]
    assert found.head.configs == head.configs


@pytest.mark.parametrize("length", range(500, 520))
def test_every_length_of_a_name_gives_a_readable_header(length: int) -> None:
    """The reference program writes a header of one byte too few when a first name has 509 bytes."""
    head = ArchiveHead((replace(DISK, name="x" * length),))
    assert len(header_of(head)) % 512 == 0
    read = VmaReader().open(MemorySource(header_of(head))).head
    assert read.disks[0].name == "x" * length


# --- identity


def test_ids_are_kept_where_they_can_be() -> None:
    wanted = [7, None, 255, 7, 1, 0]
    head = ArchiveHead(tuple(ArchiveDisk(f"d{i}", 512, device) for i, device in enumerate(wanted)))
    read = VmaReader().open(MemorySource(header_of(head))).head
    ids = {disk.name: disk.device_id for disk in read.disks}
    assert ids == {"d0": 7, "d1": 2, "d2": 3, "d3": 4, "d4": 1, "d5": 5}


def test_uuid_is_derived_from_the_head() -> None:
    head = ArchiveHead((DISK,), configs(1), time_s=5)
    uuid = header_of(head)[8:24]
    assert header_of(head)[8:24] == uuid
    assert uuid[6] >> 4 == 8 and uuid[8] >> 6 == 0b10
    changed = (replace(head, time_s=6), replace(head, configs=()), ArchiveHead((replace(DISK, size_bytes=512),)))
    assert len({uuid, *(header_of(other)[8:24] for other in changed)}) == 4


def test_sizes_are_rounded_up() -> None:
    read = VmaReader().open(MemorySource(header_of(ArchiveHead((replace(DISK, size_bytes=513),))))).head
    assert read.disks[0].size_bytes == 1024


# --- data


class Recording:
    """A target that keeps the buffers it is given."""

    seekable = False

    def __init__(self) -> None:
        self.calls: list[list[Buffer]] = []

    def write(self, buffers: Sequence[Buffer]) -> None:
        self.calls.append(list(buffers))

    def seek(self, offset: int) -> None:
        raise AssertionError("a pipe was asked to seek")

    def tell(self) -> int:
        return sum(len(buffer) for call in self.calls for buffer in call)


def test_head_goes_out_at_once() -> None:
    target = Recording()
    VmaWriter().open(target, ArchiveHead((DISK,)))
    assert target.tell() == 12_800


def test_large_data_is_written_from_where_it_lies() -> None:
    """Of 4 MiB, 58 clusters go out as a view of the caller's buffer; the 6 that are left over are copied."""
    target, lent = Recording(), bytearray(random_bytes(4 * MiB))
    output = VmaWriter().open(target, ArchiveHead((replace(DISK, size_bytes=8 * MiB),)))
    output.write(0, 0, lent)
    views = [b for call in target.calls for b in call if isinstance(b, memoryview) and b.obj is lent]
    assert [len(view) for view in views] == [58 * 64 * KiB]
    output.write(0, 4 * MiB, lent)
    output.finish()
    assert max(len(call) for call in target.calls) < 10


def test_small_data_is_gathered() -> None:
    target = Recording()
    output = VmaWriter().open(target, ArchiveHead((replace(DISK, size_bytes=58 * 64 * KiB),)))
    for cluster in range(58):
        output.write(0, cluster * 64 * KiB, random_bytes(64 * KiB))
    output.finish()
    assert [sum(map(len, call)) for call in target.calls[1:]] == [512 + 58 * 64 * KiB]


def test_zero_blocks_are_left_out() -> None:
    content = bytearray(random_bytes(128 * KiB))
    content[4096:8192] = bytes(4096)
    content[64 * KiB :] = bytes(64 * KiB)
    content[-1] = 1
    made = Sample(ArchiveHead((replace(DISK, size_bytes=128 * KiB),)), (bytes(content),))
    data = write_archive(VmaWriter(), made)
    first, second = struct.unpack_from(">2Q", data, 12_800 + 40)
    assert (first >> 48, second >> 48) == (0xFFFD, 0x8000)
    assert len(data) == 12_800 + 512 + 16 * 4096


def test_state_is_dense_and_in_order() -> None:
    head = ArchiveHead((ArchiveDisk("state", 70_000, 3, is_vmstate=True),))
    target = MemoryTarget(seekable=False)
    output = VmaWriter().open(target, head)
    with pytest.raises(ArchiveUnsupported, match="beginning"):
        output.zeros(0, 64 * KiB, 70_000 - 64 * KiB)
    output.zeros(0, 0, 64 * KiB)
    output.write(0, 64 * KiB, bytes(70_000 - 64 * KiB))
    output.finish()
    slots = struct.unpack_from(">3Q", target.data, 12_800 + 40)
    assert slots == (0xFFFF << 48 | 3 << 32, 0b11 << 48 | 3 << 32 | 1, 0)
    assert read_archive(VmaReader(), bytes(target.data)).head.disks[0].name == "vmstate"


@pytest.mark.parametrize(("offset", "length"), [(1, 64 * KiB), (0, 4096), (0, 2 * MiB), (-65_536, 65_536), (MiB, 4096)])
def test_pieces_must_be_clusters(offset: int, length: int) -> None:
    output = VmaWriter().open(MemoryTarget(seekable=False), ArchiveHead((DISK,)))
    for call in (lambda: output.write(0, offset, bytes(length)), lambda: output.zeros(0, offset, length)):
        with pytest.raises(ValueError, match="not clusters"):
            call()


def test_missing_clusters_are_an_error() -> None:
    output = VmaWriter().open(MemoryTarget(seekable=False), ArchiveHead((DISK,)))
    output.zeros(0, 0, 64 * KiB)
    with pytest.raises(ArchiveIncomplete, match="1 of the 16 clusters of disk 'drive-scsi0'"):
        output.finish()


# --- documentation


def test_codes_of_findings_are_documented() -> None:
    documented = set(re.findall(r"`([a-z]+-[a-z-]+|junk)`", PAGE.read_text(encoding="utf-8")))
    used = set[str]()
    for module in (extent, header, salvage_module, verify, walk):
        assert module.__file__ is not None
        source = Path(module.__file__).read_text(encoding="utf-8")
        used |= set(re.findall(r'"((?!utf-)[a-z]+-[a-z-]+|junk)"', source))
    assert used == documented


def test_format_is_described() -> None:
    assert FORMAT.summary and FORMAT.verifier is not None and FORMAT.salvager is not None


def header_of(head: ArchiveHead) -> bytes:
    target = MemoryTarget(seekable=False)
    VmaWriter().open(target, head)
    return bytes(target.data)
