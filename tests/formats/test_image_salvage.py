"""qcow2 and VMDK behind damage: verify tells all of it, salvage keeps everything else and makes nothing up."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats import qcow2, vmdk
from casbackup.formats.coverage import ArchiveCoverage
from casbackup.formats.findings import Finding
from casbackup.formats.port import ArchiveFormat, ByteRange, Data, Zeros
from casbackup.formats.qcow2.layout import COPIED, OFFSET_MASK, from_bytes, parse_header
from casbackup.formats.verify import verify
from casbackup.testing.archives import MemorySource, mixed_bytes, random_bytes, sample, write_archive
from casbackup.units import KiB, MiB

CLUSTER = 64 * KiB
CONTENT = (
    b"".join(random_bytes(CLUSTER + n)[:CLUSTER] for n in range(12)) + bytes(8 * CLUSTER) + mixed_bytes(12 * CLUSTER)
)


def written(archive_format: ArchiveFormat, content: bytes = CONTENT, **options: object) -> bytearray:
    assert archive_format.writer is not None
    return bytearray(
        write_archive(archive_format.writer(**options), sample([len(content)], fill=lambda _size: content))
    )


def l2_at(image: bytearray) -> int:
    header = parse_header(bytes(image[:112]))
    assert header is not None
    return from_bytes(image[header.l1_offset : header.l1_offset + 8])[0] & OFFSET_MASK


def findings(archive_format: ArchiveFormat, data: bytearray, *, quick: bool = False) -> list[Finding]:
    return list(verify(archive_format, MemorySource(bytes(data)), quick=quick))


def lost(found: Sequence[Finding]) -> list[ByteRange]:
    return [ByteRange(f.disk_offset, f.length) for f in found if f.disk_offset is not None and f.length is not None]


def salvaged(
    archive_format: ArchiveFormat, data: bytes, content: bytes = CONTENT
) -> tuple[list[ByteRange], list[Finding]]:
    """What does not come, and the findings. All that comes is right."""
    assert archive_format.salvager is not None
    archive = archive_format.salvager().open(MemorySource(data))
    coverage = ArchiveCoverage(archive.head)
    for event in coverage.passing(archive.events()):
        if isinstance(event, Data):
            assert event.data == content[event.offset :][: len(event.data)], event.offset
        else:
            assert isinstance(event, Zeros) and not content[event.offset :][: event.length].strip(b"\0"), event
    return [gap for _, gap in coverage.missing()], list(archive.findings())


# --- qcow2


@pytest.mark.parametrize("quick", [False, True])
def test_every_bad_entry_is_told(quick: bool) -> None:
    image = written(qcow2.FORMAT)
    table = l2_at(image)
    for cluster, entry in ((1, 2**40 | COPIED), (2, COPIED), (5, CLUSTER | 0x1E), (9, CLUSTER + 512)):
        struct.pack_into(">Q", image, table + 8 * cluster, entry)
    found = findings(qcow2.FORMAT, image, quick=quick)
    assert lost(found) == [
        ByteRange(CLUSTER, 2 * CLUSTER),
        ByteRange(5 * CLUSTER, CLUSTER),
        ByteRange(9 * CLUSTER, CLUSTER),
    ]
    assert [f.archive_offset for f in found] == [table + 8 * cluster for cluster in (1, 5, 9)]
    assert all(f.is_error and f.code == "archive-damaged" and f.disk == "memory" for f in found)
    missing, told = salvaged(qcow2.FORMAT, image)
    assert missing == lost(told) == lost(found)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_clusters_that_are_damaged(compression: str) -> None:
    content = b"".join(b"%06d" % n * 3000 + bytes(CLUSTER) for n in range(40))
    content += bytes(-len(content) % 512)
    image = written(qcow2.FORMAT, content, compression=compression)
    for place in (2 * CLUSTER // 3, CLUSTER + 9, CLUSTER + 700):
        image[place] ^= 0xFF
    assert not findings(qcow2.FORMAT, image, quick=True)
    missing, told = salvaged(qcow2.FORMAT, image, content)
    assert missing == lost(told) == lost(findings(qcow2.FORMAT, image))
    assert 0 < sum(gap.length for gap in missing) <= 3 * CLUSTER


def test_an_image_that_was_cut() -> None:
    image = written(qcow2.FORMAT)
    missing, told = salvaged(qcow2.FORMAT, image[: 5 * CLUSTER + 6 * CLUSTER + 100])
    assert missing[0].offset == 6 * CLUSTER
    assert missing == lost(told)


def test_a_table_that_is_gone() -> None:
    content = random_bytes(CLUSTER) + bytes(512 * MiB - CLUSTER) + b"x" * 512
    image = written(qcow2.FORMAT, content)
    header = parse_header(bytes(image[:112]))
    assert header is not None
    struct.pack_into(">Q", image, header.l1_offset, 2**50)
    assert salvaged(qcow2.FORMAT, image, content)[0] == [ByteRange(0, 512 * MiB)]


# --- VMDK


def grain_places(image: bytearray) -> list[int]:
    """Where grains begin."""
    places, position = [], CLUSTER
    while (size := struct.unpack_from("<I", image, position + 8)[0]) != 0:
        places.append(position)
        position += -(-(12 + size) // 512) * 512
    return places


def test_grains_that_are_damaged() -> None:
    image = written(vmdk.FORMAT)
    offsets = []
    for place in grain_places(image)[2:9:3]:
        image[place + 12 + 100] ^= 0xFF
        offsets.append((place, struct.unpack_from("<Q", image, place)[0] * 512))
    assert [(f.archive_offset, f.disk_offset) for f in findings(vmdk.FORMAT, image)] == offsets
    assert not findings(vmdk.FORMAT, image, quick=True)
    missing, told = salvaged(vmdk.FORMAT, image)
    assert missing == sorted(lost(told)) and len(missing) == 3


def test_a_part_that_was_overwritten() -> None:
    """The next grain is found again. What has no grain may have been lost, so it does not pass for zeros."""
    image = written(vmdk.FORMAT)
    places = grain_places(image)
    image[places[3] : places[5] - 512] = random.Random(1).randbytes(places[5] - 512 - places[3])
    found = findings(vmdk.FORMAT, image)
    assert found and all(f.is_error for f in found)
    missing, told = salvaged(vmdk.FORMAT, image)
    assert told
    gone = {struct.unpack_from("<Q", written(vmdk.FORMAT), places[n])[0] * 512 for n in (3, 4)}
    assert all(any(gap.offset <= offset < gap.end for gap in missing) for offset in gone)
    assert sum(gap.length for gap in missing) < len(CONTENT) // 2 + 3 * CLUSTER


def test_a_hole_in_the_middle() -> None:
    """Zeros look like the end of the stream, but the footer has not been."""
    image = written(vmdk.FORMAT)
    places = grain_places(image)
    image[places[3] : places[5]] = bytes(places[5] - places[3])
    missing, told = salvaged(vmdk.FORMAT, image)
    assert [f.archive_offset for f in told] == [places[3] + 512]
    assert sum(gap.length for gap in missing) < len(CONTENT) // 2 + 3 * CLUSTER


def test_damage_without_end_is_not_all_listed() -> None:
    """Three tables in which every other entry is wrong."""
    image = written(qcow2.FORMAT, random_bytes(CLUSTER))
    header = parse_header(bytes(image[:112]))
    assert header is not None
    struct.pack_into(">Q", image, 24, 3 * 512 * MiB)
    struct.pack_into(">I", image, 36, 3)
    for index in range(3):
        struct.pack_into(">Q", image, header.l1_offset + 8 * index, len(image))
        image += struct.pack(">QQ", 2, 0) * 4096
    found = findings(qcow2.FORMAT, image, quick=True)
    assert len(found) == 10_001 and "more damage" in found[-1].text


def test_a_stream_that_was_cut() -> None:
    image = written(vmdk.FORMAT)
    places = grain_places(image)
    missing, told = salvaged(vmdk.FORMAT, image[: places[7] + 40])
    assert len(told) == 1
    assert sum(gap.length for gap in missing) == len(CONTENT) - 7 * CLUSTER


# --- both


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["qcow2", "zlib", "zstd", "vmdk"]))
def test_nothing_is_made_up(data: st.DataObject, kind: str) -> None:
    """Behind the head any sectors are overwritten with noise: what salvage gives is right, or was noise itself."""
    archive_format = vmdk.FORMAT if kind == "vmdk" else qcow2.FORMAT
    image = written(archive_format, **({} if kind in ("vmdk", "qcow2") else {"compression": kind}))
    for _ in range(data.draw(st.integers(1, 5))):
        sector = data.draw(st.integers(1, len(image) // 512 - 1))
        image[sector * 512 : (sector + 1) * 512] = random.Random(sector).randbytes(512)
    assert archive_format.salvager is not None
    try:
        archive = archive_format.salvager().open(MemorySource(bytes(image)))
    except ArchiveDamaged:
        return
    coverage = ArchiveCoverage(archive.head)
    for _event in coverage.passing(archive.events()):
        pass
    if not archive.findings():
        coverage.require_complete()
    list(verify(archive_format, MemorySource(bytes(image))))
    list(verify(archive_format, MemorySource(bytes(image)), quick=True))


@pytest.mark.parametrize("archive_format", [qcow2.FORMAT, vmdk.FORMAT], ids=["qcow2", "vmdk"])
def test_what_cannot_be_rescued(archive_format: ArchiveFormat) -> None:
    assert archive_format.salvager is not None
    data = bytes(written(archive_format))
    with pytest.raises(ArchiveUnsupported):
        archive_format.salvager().open(MemorySource(data, seekable=False))
    with pytest.raises(ArchiveDamaged):
        archive_format.salvager().open(MemorySource(bytes(512) + data[512:]))
