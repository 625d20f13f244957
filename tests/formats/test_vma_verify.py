"""Verifying VMA archives: every damage is found, at least as strictly as by the reference program's ``extract``."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from casbackup.errors import ArchiveDamaged, CasbackupError
from casbackup.formats.findings import Finding
from casbackup.formats.port import ArchiveDisk, ArchiveHead
from casbackup.formats.vma.reader import VmaReader
from casbackup.formats.vma.verify import VmaVerifier
from casbackup.formats.vma.writer import VmaWriter
from casbackup.spec import vma
from casbackup.testing.archives import MemorySource, Sample, random_bytes, read_archive, sample, write_archive
from casbackup.units import MiB


def findings(data: bytes, *, quick: bool = False, seekable: bool = True) -> list[Finding]:
    return list(VmaVerifier().findings(MemorySource(data, seekable=seekable), quick=quick))


def codes(data: bytes) -> list[str]:
    return [finding.code for finding in findings(data)]


# --- the fixtures

EXPECTED = {
    "concat-two.vma": {"second-archive"},
    "dev255.vma": {"device-slot", "unknown-device"},
    "ext-bc-plus-fixed.vma": {"extent-blocks"},
    "ext-binfo-res-fixed.vma": {"slot-reserved"},
    "ext-cluster-17zero-fixed.vma": {"beyond-end", "missing-data"},
    "ext-cluster-64-fixed.vma": {"beyond-end", "missing-data"},
    "ext-cluster-eq-end-fixed.vma": {"beyond-end", "missing-data"},
    "ext-cluster-max-fixed.vma": {"beyond-end", "missing-data"},
    "ext-dev9-fixed.vma": {"unknown-device", "missing-data"},
    "ext-dup-cluster-fixed.vma": {"duplicate-cluster", "missing-data"},
    "ext-magic-flip.vma": {"extent-checksum"},
    "ext-uuid-fixed.vma": {"extent-uuid", "missing-data"},
    "ext1-devswap-fixed.vma": {"beyond-end", "missing-data"},
    "gap-512.vma": {"junk"},
    "hdr-blob-flip.vma": {"header-checksum"},
    "hdr-cfgdata-zero-fixed.vma": {"config-slot"},
    "hdr-cfgptr-bad-fixed.vma": {"config-pointer"},
    "hdr-devsize-huge-fixed.vma": {"device-size", "missing-data"},
    "hdr-md5-flip.vma": {"header-checksum"},
    "hdr-reserved-flip.vma": {"header-checksum", "reserved-bytes"},
    "hdr-reserved-set-fixed.vma": {"reserved-bytes"},
    "hdr-size-neg.vma": {"header-size", "header-checksum"},
    "hdr-size-small-fixed.vma": {"header-size", "header-checksum"},
    "hdr-uuid-flip.vma": {"header-checksum", "extent-uuid", "missing-data"},
    "hdr-uuid-flip-fixed.vma": {"extent-uuid", "missing-data"},
    "hole-in-data.vma": {"extent-short", "missing-data"},
    "mask-ffff-last.vma": {"slack"},
    "missing-ext0.vma": {"missing-data"},
    "slack-nonzero.vma": {"slack"},
    "trail-4096.vma": {"trailing-data"},
    "trail-511.vma": {"trailing-data"},
    "trunc-000100.vma": {"header-truncated"},
    "trunc-012287.vma": {"header-truncated"},
    "trunc-012800.vma": {"missing-data"},
    "trunc-312500.vma": {"extent-damaged", "missing-data"},
    "trunc-316927.vma": {"extent-truncated", "missing-data"},
    "vmstate-over.vma": {"state-length"},
    "vmstate-short.vma": {"state-length"},
}
"""The codes for each fixture; none for those that are not listed, which are legal or undetectable."""


def test_damage_is_found(damaged_vma: Any) -> None:
    found = findings(damaged_vma.data)
    assert {finding.code for finding in found} == EXPECTED.get(damaged_vma.name, set())
    if damaged_vma.facts["reference_extract"][0] != 0:
        assert any(finding.is_error for finding in found)


def test_what_the_reference_extracts_has_no_error(damaged_vma: Any) -> None:
    if damaged_vma.facts["reference_extract"][0] == 0:
        assert not [finding for finding in findings(damaged_vma.data) if finding.is_error]


def test_reader_is_as_strict_as_the_reference(damaged_vma: Any) -> None:
    if damaged_vma.facts["reference_extract"][0] == 0:
        read_archive(VmaReader(), damaged_vma.data)
    else:
        with pytest.raises(CasbackupError):
            read_archive(VmaReader(), damaged_vma.data)


def test_pipe_shows_the_same(damaged_vma: Any) -> None:
    assert findings(damaged_vma.data, seekable=False) == findings(damaged_vma.data)


def test_quick_shows_the_same_errors(damaged_vma: Any) -> None:
    errors = [finding for finding in findings(damaged_vma.data) if finding.is_error]
    for seekable in (True, False):
        quick = findings(damaged_vma.data, quick=True, seekable=seekable)
        assert [finding for finding in quick if finding.is_error] == errors


def test_sound_archives_have_no_findings(sound_vma: Any) -> None:
    odd = {"slack"} if sound_vma.name == "crafted-slack-nonzero.vma" else set()
    assert set(codes(sound_vma.data)) == odd


# --- where it is


def test_finding_is_located(basic_vma: bytes) -> None:
    """Cluster 4 of device 1, renumbered to 17, is beyond the end; 4 is missing then."""
    data = with_slot(basic_vma, 12_800, lambda slot: slot + 13 if slot & 0xFF_FFFF_FFFF == 1 << 32 | 4 else slot)
    beyond, missing = findings(data)
    assert (beyond.code, beyond.archive_offset) == ("beyond-end", 12_800)
    assert (beyond.disk, beyond.device_id, beyond.cluster) == ("drive-scsi0", 1, 17)
    assert (beyond.disk_offset, beyond.length) == (17 * 65_536, 65_536)
    assert (missing.code, missing.disk, missing.cluster) == ("missing-data", "drive-scsi0", 4)
    assert (missing.disk_offset, missing.length) == (4 * 65_536, 65_536)


def test_missing_end_of_a_disk_ends_with_it(damaged_vma: Any) -> None:
    if damaged_vma.name == "trunc-012800.vma":
        assert [(f.disk_offset, f.length) for f in findings(damaged_vma.data)] == [(0, 1_060_864), (0, 3_147_264)]


def test_all_of_several_damages_are_found() -> None:
    """Five extents; one header broken for good, one with a flipped bit, one with a wrong uuid, junk at the end."""
    made = sample([17 * MiB], fill=random_bytes)
    data = bytearray(write_archive(VmaWriter(), made, seed=1))
    places = extent_offsets(bytes(data))
    slots = [slots_at(data, place) for place in places]
    data[places[1] + 50 : places[1] + 90] = bytes(40)
    data[places[2] + 300] ^= 4
    data[places[3] + 8] ^= 1
    fix_extent(data, places[3])
    data += b"junk"
    found = findings(bytes(data))
    located = [(finding.code, finding.archive_offset) for finding in found if finding.code != "missing-data"]
    assert located == [
        ("extent-damaged", places[1]),
        ("extent-checksum", places[2]),
        ("extent-uuid", places[3]),
        ("trailing-data", len(data) - 4),
    ]
    lost = sum(finding.length or 0 for finding in found if finding.code == "missing-data")
    assert lost == (slots[1] + slots[3]) * 65_536


def test_stored_zeros_are_suspicious() -> None:
    made = sample([2 * MiB], fill=random_bytes)
    data = bytearray(write_archive(VmaWriter(), made, seed=1))
    place = extent_offsets(bytes(data))[0] + 512 + 8192
    data[place : place + 12_288] = bytes(12_288)
    (finding,) = findings(bytes(data))
    assert (finding.code, finding.is_error) == ("stored-zeros", False)
    assert findings(bytes(data), quick=True) == []


def test_zeros_of_a_state_are_not() -> None:
    head = ArchiveHead((ArchiveDisk("vmstate", 300_000, 1, is_vmstate=True),))
    data = write_archive(VmaWriter(), Sample(head, (bytes(300_000),)))
    assert len(data) > 300_000
    assert findings(data) == []


def test_damaged_compression_is_a_finding(basic_vma: bytes) -> None:
    class Breaking(MemorySource):
        """Says after half of the data that what it decompresses is damaged."""

        def read_into(self, buffer: memoryview) -> int:
            if self.tell() >= 150_000:
                raise ArchiveDamaged("the zstd stream is damaged")
            return super().read_into(buffer)

    found = list(VmaVerifier().findings(Breaking(basic_vma, seekable=False)))
    assert "source-damaged" in [finding.code for finding in found]
    assert "missing-data" in [finding.code for finding in found]


# --- headers


def test_header_of_two_gibibytes_is_refused_unread(basic_vma: bytes) -> None:
    data = bytearray(basic_vma)
    struct.pack_into(">I", data, 56, 0x7FFF_FF00)
    with pytest.raises(CasbackupError, match="2147483392"):
        VmaReader().open(MemorySource(bytes(data), seekable=False))
    assert codes(bytes(data))[0] == "header-size"


def test_large_header_is_read(basic_vma: bytes) -> None:
    """The reference program has no limit; it was tried with one more mebibyte."""
    data = bytearray(basic_vma[:12_800] + bytes(MiB) + basic_vma[12_800:])
    struct.pack_into(">I", data, 56, 12_800 + MiB)
    fix_header(data, 12_800 + MiB)
    expected = read_archive(VmaReader(), basic_vma)
    assert read_archive(VmaReader(), bytes(data), seekable=False) == expected
    assert codes(bytes(data)) == []


def test_two_devices_of_one_name(basic_vma: bytes) -> None:
    """The reference program fails when it renames what it extracted."""
    data = bytearray(basic_vma)
    data[4096 + 2 * 32 : 4096 + 2 * 32 + 4] = data[4096 + 32 : 4096 + 32 + 4]
    fix_header(data, 12_800)
    found = findings(bytes(data))
    assert [(finding.code, finding.is_error) for finding in found] == [("device-name", True)]


def test_unknown_version(basic_vma: bytes) -> None:
    data = bytearray(basic_vma)
    data[7] = 2
    fix_header(data, 12_800)
    with pytest.raises(CasbackupError, match="version 2"):
        read_archive(VmaReader(), bytes(data))
    assert codes(bytes(data)) == ["header-version"]


@pytest.mark.parametrize("size", [0, 12_288, 100_000_000, 0xFFFF_FFFF])
def test_second_archive_whose_header_is_no_good(basic_vma: bytes, size: int) -> None:
    second = bytearray(basic_vma)
    struct.pack_into(">I", second, 56, size)
    assert codes(basic_vma + bytes(second))[0] == "junk"


# --- helpers


def extent_offsets(data: bytes) -> list[int]:
    (position,) = struct.unpack_from(">I", data, 56)
    found = []
    while position < len(data):
        found.append(position)
        (blocks,) = struct.unpack_from(">H", data, position + 6)
        position += 512 + blocks * 4096
    return found


def slots_at(data: bytes | bytearray, offset: int) -> int:
    slots = struct.unpack_from(">59Q", data, offset + 40)
    return sum(1 for slot in slots if slot)


def fix_extent(data: bytearray, offset: int) -> None:
    data[offset + 24 : offset + 40] = vma.extent_checksum(data[offset : offset + 512])


def fix_header(data: bytearray, length: int) -> None:
    data[32:48] = vma.header_checksum(data[:length])


def with_slot(data: bytes, offset: int, change: Any) -> bytes:
    """The archive with ``change`` applied to each slot of the extent at ``offset``."""
    changed = bytearray(data)
    slots = struct.unpack_from(">59Q", changed, offset + 40)
    struct.pack_into(">59Q", changed, offset + 40, *map(change, slots))
    fix_extent(changed, offset)
    return bytes(changed)
