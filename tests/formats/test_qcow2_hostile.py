"""qcow2 images that lie. Whatever they say, it ends with an error of casbackup and within bounded memory and time."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.errors import ArchiveDamaged, ArchiveError, ArchiveUnsupported
from casbackup.formats.port import Data
from casbackup.formats.qcow2.layout import COMPRESSED, COPIED, parse_header
from casbackup.formats.qcow2.options import Qcow2Writer
from casbackup.formats.qcow2.reader import Qcow2Reader
from casbackup.testing.archives import (
    MemorySource,
    mixed_bytes,
    read_archive,
    sample,
    write_archive,
)
from casbackup.units import GiB, KiB, MiB, TiB

SOUND = write_archive(Qcow2Writer(), sample([1 * MiB], fill=mixed_bytes))
PACKED = write_archive(Qcow2Writer("zstd"), sample([1 * MiB], fill=mixed_bytes))
HEADER = parse_header(SOUND[:112])
assert HEADER is not None
L1 = HEADER.l1_offset
L2 = int.from_bytes(SOUND[L1 : L1 + 8], "big") & ~COPIED


def changed(offset: int, layout: str, value: int, data: bytes = SOUND) -> bytes:
    size = struct.calcsize(layout)
    return data[:offset] + struct.pack(layout, value) + data[offset + size :]


DAMAGED = {
    "no magic": changed(0, ">I", 0),
    "cut in the header": SOUND[:80],
    "cut in front of the tables": SOUND[: 64 * KiB],
    "cut in the data": SOUND[:-1],
    "clusters too small": changed(20, ">I", 8),
    "clusters too large": changed(20, ">I", 22),
    "clusters absurd": changed(20, ">I", 2**32 - 1),
    "disk absurd": changed(24, ">Q", 2**63),
    "disk larger than its L1 table": changed(24, ">Q", 1 * TiB),
    "L1 table too small": changed(36, ">I", 0),
    "L1 table beyond the end": changed(40, ">Q", 2**40),
    "L1 table at the beginning": changed(40, ">Q", 0),
    "header too short": changed(100, ">I", 103),
    "compression without its bit": changed(104, ">B", 1),
    "L1 entry with reserved bits": changed(L1, ">Q", L2 | 2),
    "L2 table beyond the end": changed(L1, ">Q", 2**40),
    "L2 table between clusters": changed(L1, ">Q", L2 + 512),
    "data beyond the end": changed(L2, ">Q", 2**40),
    "data between clusters": changed(L2, ">Q", 64 * KiB + 512),
    "data at the header": changed(L2, ">Q", COPIED),
    "data with reserved bits": changed(L2, ">Q", 64 * KiB | 2),
    "compressed beyond the end": changed(L2, ">Q", COMPRESSED | 2**40),
    "compressed rubbish": changed(L2, ">Q", COMPRESSED | 2**54 | 0x10),
}
UNSUPPORTED = {
    "version 1": changed(4, ">I", 1),
    "version 4": changed(4, ">I", 4),
    "encrypted": changed(32, ">I", 1),
    "encrypted by LUKS": changed(32, ">I", 2),
    "unknown feature": changed(72, ">Q", 1 << 40),
    "unknown compression": changed(104, ">B", 2, changed(72, ">Q", 8)),
    "backing file": changed(8, ">Q", 200),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told(name: str) -> None:
    with pytest.raises(ArchiveDamaged):
        read_archive(Qcow2Reader(), DAMAGED[name])


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_read(name: str) -> None:
    with pytest.raises(ArchiveUnsupported):
        read_archive(Qcow2Reader(), UNSUPPORTED[name])


def image(size_bytes: int, l1: list[int], tables: bytes, cluster_bits: int = 16) -> bytes:
    """Header in the first cluster, L1 from the second one on, then ``tables``."""
    cluster = 1 << cluster_bits
    header = struct.pack(">4sIQIIQIIQ", b"QFI\xfb", 3, 0, 0, cluster_bits, size_bytes, 0, len(l1), cluster)
    header += struct.pack(">QIIQQQQII", 0, 0, 0, 0, 0, 0, 0, 4, 104)
    table = struct.pack(f">{len(l1)}Q", *l1)
    return header.ljust(cluster, b"\0") + table + bytes(-len(table) % cluster) + tables


def test_one_l2_table_for_everything() -> None:
    """128 KiB that claim to be 16 TiB of data: given up as soon as more is named than the file has."""
    cluster = 64 * KiB
    data = image(16 * TiB, [2 * cluster] * 32_768, struct.pack(">Q", cluster) * 8192)
    with pytest.raises(ArchiveDamaged, match="again and again"):
        for _event in Qcow2Reader().open(MemorySource(data)).events():
            pass


def test_one_compressed_cluster_for_everything() -> None:
    data = image(512 * MiB, [128 * KiB], struct.pack(">Q", COMPRESSED | 1 << 55 | 65_536) * 8192)
    with pytest.raises(ArchiveDamaged):
        for _event in Qcow2Reader().open(MemorySource(data)).events():
            pass


def test_claims_take_no_memory() -> None:
    tracemalloc.start()
    try:
        for bits in (9, 16, 21):
            with pytest.raises(ArchiveDamaged):
                list(
                    Qcow2Reader()
                    .open(MemorySource(changed(20, ">I", bits, changed(36, ">I", 2**32 - 1, changed(24, ">Q", 2**49)))))
                    .events()
                )
        assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()


def test_a_deflate_bomb() -> None:
    """16 MiB packed into one cluster: no more than a cluster is taken out."""
    import zlib

    bomb = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = bomb.compress(bytes(16 * MiB)) + bomb.flush()
    sectors = (len(packed) - 1) // 512
    data = image(
        64 * KiB, [128 * KiB], struct.pack(">Q", COMPRESSED | sectors << 54 | 192 * KiB).ljust(64 * KiB, b"\0") + packed
    )
    with pytest.raises(ArchiveDamaged, match="decompressed"):
        read_archive(Qcow2Reader(), data)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), packed=st.booleans())
def test_fields_that_changed(data: st.DataObject, packed: bool) -> None:
    """Any 8 bytes of the header or the tables become any number; sizes stay such that a test can hold the disk."""
    original = PACKED if packed else SOUND
    header = parse_header(original[:112])
    assert header is not None
    l2 = int.from_bytes(original[header.l1_offset : header.l1_offset + 8], "big") & ~COPIED
    places = st.one_of(
        st.integers(0, 20),
        st.integers(28, 112),
        st.just(header.l1_offset),
        st.integers(0, 16).map(lambda n: l2 + 8 * n),
    )
    damaged = original
    numbers = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 64).map(lambda n: n * 64 * KiB | COPIED))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(places)
        if place not in range(17, 32):
            damaged = changed(place, ">Q", data.draw(numbers), damaged)[: len(original)]
    ends_well(damaged)


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 200), st.sampled_from(["random", "text", "zero"])), max_size=20),
    compression=st.sampled_from(["none", "zlib", "zstd"]),
    seed=st.integers(0, 9),
)
def test_round_trip(pieces: list[tuple[int, str]], compression: str, seed: int) -> None:
    chance = random.Random(seed)
    make = {"random": chance.randbytes, "text": lambda n: (b"some text" * n)[:n], "zero": bytes}
    content = b"".join(make[kind](count * 2048) for count, kind in pieces)
    data = write_archive(Qcow2Writer(compression), sample([len(content)], fill=lambda _size: content), seed=seed)
    assert read_archive(Qcow2Reader(), data).contents[0] == content


def ends_well(damaged: bytes) -> None:
    try:
        archive = Qcow2Reader().open(MemorySource(damaged))
        position = 0
        for event in archive.events():
            assert event.offset == position
            position += len(event.data) if isinstance(event, Data) else event.length
    except ArchiveError:
        return
    assert position == archive.head.disks[0].size_bytes <= 1 * GiB
