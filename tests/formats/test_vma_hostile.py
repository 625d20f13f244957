"""Archives that nobody meant to write: nothing crashes, and reader, verify and salvage agree.

The long run: CASBACKUP_FUZZ_S=600 pytest -m slow tests/formats/test_vma_hostile.py
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.errors import ArchiveDamaged, ArchiveLimit, CasbackupError
from casbackup.formats.coverage import ArchiveCoverage
from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveHead, Data
from casbackup.formats.vma import salvage
from casbackup.formats.vma.reader import VmaReader
from casbackup.formats.vma.salvage import VmaSalvager
from casbackup.formats.vma.verify import VmaVerifier
from casbackup.formats.vma.writer import VmaWriter
from casbackup.spec import vma
from casbackup.testing.archives import MemorySource, Sample, mixed_bytes, read_archive, sample, write_archive
from casbackup.units import KiB

# --- any archive that can be written

names = st.text(st.characters(exclude_characters="/\0\n", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..", "vmstate")
)
contents = st.builds(
    lambda size, seed: mixed_bytes(size) if seed else bytes(size), st.integers(1, 300_000), st.integers(0, 3)
)
configs = st.builds(ArchiveConfig, names, st.binary(max_size=2000))


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    disk_names = draw(st.lists(names, max_size=4, unique=True))
    data = [draw(contents) for _ in disk_names]
    ids = draw(st.permutations(range(1, 255)))
    disks = tuple(ArchiveDisk(n, len(d), i) for n, d, i in zip(disk_names, data, sorted(ids[: len(data)]), strict=True))
    blobs = tuple(draw(st.lists(configs, max_size=4, unique_by=lambda config: config.name)))
    uuid = draw(st.binary(min_size=16, max_size=16))
    return Sample(ArchiveHead(disks, blobs, uuid, draw(st.integers(-(2**63), 2**63 - 1))), tuple(data))


@settings(max_examples=60)
@given(samples(), st.integers(0, 1000))
def test_anything_survives_a_round_trip(made: Sample, seed: int) -> None:
    data = write_archive(VmaWriter(), made, seed=seed)
    padded = tuple(content + bytes(-len(content) % 512) for content in made.contents)
    disks = tuple(replace(d, size_bytes=len(c)) for d, c in zip(made.head.disks, padded, strict=True))
    assert read_archive(VmaReader(), data) == Sample(replace(made.head, disks=disks), padded)
    assert not list(VmaVerifier().findings(MemorySource(data)))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.text(max_size=5), st.integers(-5, 2**60), st.booleans()), max_size=5))
def test_any_head_is_taken_or_refused(disks: list[tuple[str, int, bool]]) -> None:
    """``check`` finds all that ``open`` could stumble over."""
    head = ArchiveHead(tuple(ArchiveDisk(name, size, size % 300, is_state) for name, size, is_state in disks))
    try:
        VmaWriter().check(head)
    except ArchiveLimit:
        return
    assert all(size > 0 for _, size, _ in disks)


# --- any damage


def base_archives() -> list[bytes]:
    """Small ones, so that many can be tried: several disks, extents, a state, configs, zeros."""
    made = sample([200 * KiB, 70_000, 512], [ArchiveConfig("a.conf", b"x" * 300)], fill=mixed_bytes)
    disks = (*made.head.disks, ArchiveDisk("vmstate", 150_000, 9, is_vmstate=True))
    with_state = Sample(replace(made.head, disks=disks), (*made.contents, mixed_bytes(150_000)))
    small_extents = sample([64 * KiB * 130], fill=bytes)
    return [write_archive(VmaWriter(), content, seed=4) for content in (made, with_state, small_extents)]


BASES = base_archives()
Change = Callable[[bytearray, random.Random], None]


def flip_a_bit(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def flip_in_a_header(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(min(13_400, len(data)))] ^= 1 << chance.randrange(8)


def change_header_and_checksum(data: bytearray, chance: random.Random) -> None:
    """Fields of the header that matter, set to something, with the right checksum."""
    if len(data) < 12_800:
        return
    place = chance.choice(
        (4, 48, 52, 56, 2044, 2048, 3068, 4128, 4136, 4140, 4160, 4384, 12_256, 12_264, 12_289, 12_300)
    )
    value = chance.choice((0, 1, 15, 12_288, 12_800, 65_535, 0x7FFF_FFFF, 0xFFFF_FFFF, chance.getrandbits(32)))
    struct.pack_into(">I", data, place, value)
    (size,) = struct.unpack_from(">I", data, 56)
    length = size if 12_288 < size <= len(data) else 12_800
    data[32:48] = vma.header_checksum(data[:length])


def change_extent_and_checksum(data: bytearray, chance: random.Random) -> None:
    places = extent_places(data)
    if not places:
        return
    place = chance.choice(places)
    if chance.random() < 0.3:
        data[place + chance.choice((4, 5, 6, 7, 8))] = chance.randrange(256)
    else:
        slot = place + 40 + 8 * chance.randrange(59)
        data[slot + chance.randrange(8)] = chance.choice((0, 1, 2, 9, 254, 255, chance.randrange(256)))
    data[place + 24 : place + 40] = vma.extent_checksum(data[place : place + 512])


def repeat_an_extent(data: bytearray, chance: random.Random) -> None:
    places = extent_places(data)
    if places:
        place = chance.choice(places)
        data[place:place] = data[place : chance.choice([*places, len(data)])]


def lose_bytes(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    del data[start : start + chance.choice((1, 2, 511, 512, 4096, 100_000))]


def insert_bytes(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    length = chance.choice((1, 7, 512, 4096))
    data[start:start] = chance.choice((bytes(length), chance.randbytes(length), b"VMAE" * length, bytes(data[:length])))


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def append_another(data: bytearray, chance: random.Random) -> None:
    data += chance.choice(BASES)


CHANGES: tuple[Change, ...] = (
    flip_a_bit,
    flip_in_a_header,
    change_header_and_checksum,
    change_extent_and_checksum,
    change_extent_and_checksum,
    repeat_an_extent,
    lose_bytes,
    insert_bytes,
    cut,
    append_another,
)


def extent_places(data: bytearray) -> list[int]:
    """Of all that look like one."""
    found, place = [], data.find(b"VMAE")
    while 0 <= place <= len(data) - 512:
        found.append(place)
        place = data.find(b"VMAE", place + 4)
    return found


def damaged(seed: int) -> bytes:
    chance = random.Random(seed)
    data = bytearray(chance.choice(BASES))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        if data:
            chance.choice(CHANGES)(data, chance)
    return bytes(data)


def examine(data: bytes, seed: int) -> None:
    """Read, verify and salvage it; they must agree on what it is."""
    error: CasbackupError | None = None
    read = None
    try:
        read = read_archive(VmaReader(), data, seekable=False)
    except CasbackupError as caught:
        error = caught
    found = list(VmaVerifier().findings(MemorySource(data)))
    errors = [finding for finding in found if finding.is_error]
    assert found == list(VmaVerifier().findings(MemorySource(data, seekable=False))), f"a pipe differs, seed {seed}"
    quick = [f for f in VmaVerifier().findings(MemorySource(data), quick=True) if f.is_error]
    assert quick == errors, f"quick differs, seed {seed}"
    assert error is None or errors, f"verify is less strict than the reader, seed {seed}: {error}"
    refused_by_name = {finding.code for finding in errors} <= {"device-name"}
    assert error is not None or refused_by_name, f"verify is stricter than the reader, seed {seed}: {errors}"
    examine_salvage(data, read, seed)


def examine_salvage(data: bytes, read: Sample | None, seed: int) -> None:
    try:
        salvaged = VmaSalvager().open(MemorySource(data))
    except ArchiveDamaged:
        assert read is None, f"seed {seed}"
        return
    disks = [bytearray(min(disk.size_bytes, 1 << 24)) for disk in salvaged.head.disks]
    coverage = ArchiveCoverage(salvaged.head)
    for event in coverage.passing(salvaged.events()):
        if isinstance(event, Data) and event.offset < len(disks[event.disk]):
            disks[event.disk][event.offset : event.offset + len(event.data)] = event.data
    if read is not None:
        assert (salvaged.head, [bytes(disk) for disk in disks]) == (read.head, list(read.contents)), f"seed {seed}"
    assert read is not None or salvaged.findings(), f"nothing was found wrong, seed {seed}"


@pytest.fixture
def no_mending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying each bit of a header takes a second or two."""
    monkeypatch.setattr(salvage, "_MAX_MENDED_BYTES", 0)


@pytest.mark.usefixtures("no_mending")
@pytest.mark.parametrize("start", range(0, 300, 50))
def test_damaged_archives(start: int) -> None:
    for seed in range(start, start + 50):
        examine(damaged(seed), seed)


def test_damaged_archives_with_mending() -> None:
    for seed in range(1000, 1005):
        examine(damaged(seed), seed)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fuzz(monkeypatch: pytest.MonkeyPatch) -> None:
    """For CASBACKUP_FUZZ_S seconds (20 if it is not set), from a seed that is printed."""
    end = time.monotonic() + float(os.environ.get("CASBACKUP_FUZZ_S", "20"))
    first = seed = int.from_bytes(os.urandom(4), "big")
    while time.monotonic() < end:
        monkeypatch.setattr(salvage, "_MAX_MENDED_BYTES", 0 if seed % 50 else 64 * KiB)
        examine(damaged(seed), seed)
        seed += 1
    print(f"{seed - first} archives from seed {first}")
