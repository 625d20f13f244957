"""VMDK: what QEMU makes of our images, and what we make of QEMU's and of damaged ones."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.errors import ArchiveDamaged, ArchiveError, ArchiveLimit, ArchiveUnsupported, UsageError
from casbackup.formats.port import ArchiveDisk, ArchiveHead, Data, Zeros
from casbackup.formats.target import archive_target
from casbackup.formats.vmdk import FORMAT
from casbackup.formats.vmdk.layout import Header, encode_header, encode_marker, parse_header
from casbackup.formats.vmdk.reader import VmdkReader
from casbackup.formats.vmdk.writer import VmdkWriter
from casbackup.testing.archives import (
    ArchiveConformance,
    MemorySource,
    MemoryTarget,
    mixed_bytes,
    random_bytes,
    read_archive,
    sample,
    write_archive,
)
from casbackup.units import GiB, KiB, MiB, TiB

SUITE = ArchiveConformance(FORMAT, size_multiple=512, keeps_names=False, keeps_identity=False)
needs_qemu = [
    pytest.mark.qemu,
    pytest.mark.skipif(not shutil.which("qemu-img") or not shutil.which("qemu-io"), reason="QEMU's tools are missing"),
]


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in SUITE.checks()])
def test_conformance(check: Callable[[], None]) -> None:
    check()


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


CONTENTS = {
    "mixed": mixed_bytes(9 * MiB + 512),
    "zeros": bytes(3 * MiB),
    "random": random_bytes(1 * MiB + 1024),
    "one sector": b"x" * 512,
    "end of a table": random_bytes(64 * KiB) + bytes(32 * MiB - 128 * KiB) + random_bytes(64 * KiB),
}


def written(data: bytes, seed: int = 0, **options: object) -> bytes:
    return write_archive(VmdkWriter(**options), sample([len(data)], fill=lambda _size: data), seed=seed)


def read(data: bytes, *, seekable: bool = False) -> bytes:
    return read_archive(VmdkReader(), data, seekable=seekable).contents[0]


class TestQemuAccepts:
    pytestmark = needs_qemu

    @pytest.mark.parametrize("level", ["1", "6"])
    @pytest.mark.parametrize("kind", CONTENTS)
    def test_image(self, kind: str, level: str, tmp_path: Path) -> None:
        raw, image, back = tmp_path / "a.raw", tmp_path / "a.vmdk", tmp_path / "b.raw"
        raw.write_bytes(CONTENTS[kind])
        image.write_bytes(written(CONTENTS[kind], seed=5, level=level))
        run("qemu-img", "check", "-q", "-f", "vmdk", image)
        run("qemu-img", "compare", "-q", "-f", "raw", "-F", "vmdk", raw, image)
        run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, back)
        assert back.read_bytes() == CONTENTS[kind]

    def test_what_it_says_of_itself(self, tmp_path: Path) -> None:
        image = tmp_path / "a.vmdk"
        image.write_bytes(written(CONTENTS["mixed"]))
        found = json.loads(run("qemu-img", "info", "--output=json", image))
        details = found["format-specific"]["data"]
        assert found["virtual-size"] == len(CONTENTS["mixed"])
        assert (details["create-type"], details["parent-cid"]) == ("streamOptimized", 0xFFFF_FFFF)
        assert details["cid"] not in (0, 0xFFFF_FFFE, 0xFFFF_FFFF)

    def test_a_large_sparse_disk(self, tmp_path: Path) -> None:
        path, size = tmp_path / "big.vmdk", 2 * TiB - 100 * GiB
        head = ArchiveHead((ArchiveDisk("big", size),))
        with archive_target(str(path)) as target:
            output = VmdkWriter().open(target, head)
            output.write(0, size - 64 * KiB, b"\x5a" * (64 * KiB))
            output.write(0, 1 * TiB, b"\x5b" * (64 * KiB))
            output.zeros(0, 0, 1 * TiB)
            output.zeros(0, 1 * TiB + 64 * KiB, size - 1 * TiB - 128 * KiB)
            output.finish()
        run("qemu-img", "check", "-q", path)
        reads = [f"read -P 0x5a {size - 64 * KiB} 64k", "read -P 0x5b 1T 64k", "read -P 0 100G 1M"]
        run("qemu-io", "-r", "-f", "vmdk", *(part for command in reads for part in ("-c", command)), path)

    @pytest.mark.parametrize("seekable", [True, False])
    @pytest.mark.parametrize("kind", CONTENTS)
    def test_its_own_is_read(self, kind: str, seekable: bool, tmp_path: Path) -> None:
        assert read(self.made(CONTENTS[kind], tmp_path), seekable=seekable) == CONTENTS[kind]

    def test_its_own_cut_short(self, tmp_path: Path) -> None:
        """There is no mark of the end; but the tables in front tell that a grain is missing."""
        data = self.made(CONTENTS["random"], tmp_path)
        for length in (len(data.rstrip(b"\0")) - 1, len(data) - 129 * 512, 128 * 512, 5000, 600):
            with pytest.raises(ArchiveDamaged):
                read(data[:length])

    def test_a_kind_that_is_not_read(self, tmp_path: Path) -> None:
        data = self.made(CONTENTS["random"], tmp_path, "monolithicSparse")
        with pytest.raises(ArchiveUnsupported, match="stream-optimised"):
            read(data)

    def made(self, data: bytes, folder: Path, kind: str = "streamOptimized") -> bytes:
        (folder / "a.raw").write_bytes(data)
        run(
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            f"subformat={kind}",
            folder / "a.raw",
            folder / "q.vmdk",
        )
        return (folder / "q.vmdk").read_bytes()


# --- writing


def test_descriptor() -> None:
    head = ArchiveHead((ArchiveDisk('evil"\nname', 10 * GiB),), uuid=bytes(16), time_s=1)
    VmdkWriter().open(target := MemoryTarget(seekable=False), head)
    text = bytes(target.data[512 : 21 * 512]).rstrip(b"\0").decode("ascii").splitlines()
    assert 'RW 20971520 SPARSE "evil__name.vmdk"' in text
    assert 'ddb.adapterType = "lsilogic"' in text and 'ddb.geometry.cylinders = "1305"' in text
    assert len(target.data) == 64 * KiB


def test_the_content_id_tells_snapshots_apart() -> None:
    def content_id(time_s: int) -> bytes:
        VmdkWriter().open(target := MemoryTarget(), ArchiveHead((ArchiveDisk("d", 512),), time_s=time_s))
        return bytes(target.data).split(b"\nCID=")[1][:8]

    assert content_id(1) == content_id(1) != content_id(2)


@pytest.mark.parametrize(
    "head",
    [
        ArchiveHead(()),
        ArchiveHead((ArchiveDisk("a", 1), ArchiveDisk("b", 1))),
        ArchiveHead((ArchiveDisk("a", 2 * TiB),)),
        ArchiveHead((ArchiveDisk("a", 1, is_vmstate=True),)),
    ],
    ids=["no disk", "two disks", "too large", "vmstate"],
)
def test_what_it_cannot_hold(head: ArchiveHead) -> None:
    with pytest.raises(ArchiveLimit):
        VmdkWriter().check(head)


@pytest.mark.parametrize("level", ["0", "10", "x", -1, None])
def test_levels_that_there_are_not(level: object) -> None:
    with pytest.raises(UsageError):
        VmdkWriter(level)


def test_a_grain_that_comes_twice() -> None:
    output = VmdkWriter().open(MemoryTarget(), ArchiveHead((ArchiveDisk("d", 1 * MiB),)))
    output.write(0, 0, random_bytes(64 * KiB))
    with pytest.raises(ValueError, match="comes twice"):
        output.write(0, 0, random_bytes(64 * KiB))


def test_memory_is_bounded() -> None:
    head = ArchiveHead((ArchiveDisk("d", 64 * GiB),))
    tracemalloc.start()
    try:
        output = VmdkWriter().open(target := MemoryTarget(seekable=False), head)
        position = 0
        for place in range(0, 64 * GiB, 4 * GiB):
            output.zeros(0, position, place - position)
            output.write(0, place, mixed_bytes(1 * MiB))
            position = place + 1 * MiB
        output.zeros(0, position, 64 * GiB - position)
        output.finish()
        assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()
    events = list(VmdkReader().open(MemorySource(bytes(target.data), seekable=False)).events())
    assert sum(len(e.data) if isinstance(e, Data) else e.length for e in events) == 64 * GiB
    assert len([e for e in events if isinstance(e, Zeros)]) < 200


# --- reading what others write

DISK_BYTES = 3 * 64 * KiB + 512
GRAINS = {2: b"b" * (64 * KiB), 0: b"a" * (64 * KiB), 3: b"d" * 512}
CONTENT = b"a" * (64 * KiB) + bytes(64 * KiB) + b"b" * (64 * KiB) + b"d" * 512
HEADER = Header(3, 0x30001, DISK_BYTES // 512, 128, 1, 20, 512, 0, 2**64 - 1, 128, 0, b"\n \r\n", 1)


def grain(sector: int, plain: bytes) -> bytes:
    packed = zlib.compress(plain)
    data = struct.pack("<QI", sector, len(packed)) + packed
    return data + bytes(-len(data) % 512)


def image(
    header: Header = HEADER,
    grains: dict[int, bytes] = GRAINS,
    *,
    named: int = 3,
    tables: int = 1,
    footer: bool = True,
    end: bool = True,
) -> bytes:
    out = io.BytesIO()
    out.write(encode_header(header).ljust(header.overhead * 512, b"\0"))
    out.write(b"".join(grain(number * 128, plain) for number, plain in grains.items()))
    table = struct.pack("<512I", *[200] * named, *[0] * (512 - named))
    out.write((encode_marker(1, 4) + table) * tables)  # type: ignore[arg-type]
    out.write(encode_marker(2, 1) + bytes(512))  # type: ignore[arg-type]
    if footer:
        out.write(encode_marker(3, 1) + encode_header(header._replace(directory_at=300)))  # type: ignore[arg-type]
    if end:
        out.write(bytes(512))
    return out.getvalue()


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        HEADER._replace(version=1),
        HEADER._replace(flags=0x30000, line_ends=bytes(4)),
        HEADER._replace(overhead=24),
        HEADER._replace(directory_at=500),
    ],
    ids=["usual", "version 1", "without test of line ends", "short head", "directory behind the grains"],
)
@pytest.mark.parametrize("seekable", [True, False])
def test_legal_variants(header: Header, seekable: bool) -> None:
    assert read(image(header), seekable=seekable) == CONTENT


def test_zeros_at_the_end_of_the_pipe_are_read_over() -> None:
    source = MemorySource(image() + bytes(5 * MiB), seekable=False)
    list(VmdkReader().open(source).events())
    assert source.read_into(memoryview(bytearray(1))) == 0


def test_smaller_grains() -> None:
    header = HEADER._replace(grain_sectors=8, capacity=24)
    data = encode_header(header).ljust(64 * KiB, b"\0") + grain(8, b"x" * 4096)
    data += encode_marker(1, 4) + struct.pack("<I", 200).ljust(2048, b"\0")  # type: ignore[arg-type]
    data += encode_marker(3, 1) + encode_header(header) + bytes(512)  # type: ignore[arg-type]
    assert read(data) == bytes(4096) + b"x" * 4096 + bytes(4096)


def in_front(table_at: int) -> bytes:
    """A directory at sector 100, with one table."""
    data = bytearray(image(HEADER._replace(directory_at=100)))
    data[100 * 512 : 100 * 512 + 4] = struct.pack("<I", table_at)
    return bytes(data)


DAMAGED = {
    "no magic": b"KDMX" + image()[4:],
    "cut in the header": image()[:100],
    "cut in the descriptor": image()[:5000],
    "without the end": image(end=False),
    "without the footer": image(footer=False),
    "more named than came": image(named=4),
    "fewer named than came": image(named=2),
    "no tables": image(tables=0),
    "a grain lost": image(grains={0: GRAINS[0], 3: GRAINS[3]}),
    "line ends of a text": image(HEADER._replace(line_ends=b"\n \n\n")),
    "capacity absurd": image(HEADER._replace(capacity=2**60)),
    "grains of 3 sectors": image(HEADER._replace(grain_sectors=3)),
    "grains of 2 TiB": image(HEADER._replace(grain_sectors=2**32)),
    "no table entries": image(HEADER._replace(table_entries=0)),
    "no overhead": image()[:64] + bytes(8) + image()[72:],
    "overhead beyond the end": image()[:64] + struct.pack("<Q", 2**40) + image()[72:],
    "directory in front of nothing": image(HEADER._replace(directory_at=100), tables=0),
    "table in front that is none": in_front(2**32 - 1),
    "table in front that overlaps": in_front(1),
    "table in front across the grains": in_front(127),
    "grain beyond the disk": image(grains={**GRAINS, 4: b"x" * (64 * KiB)}, named=4),
    "grain too short": image(grains={**GRAINS, 2: b"x" * (64 * KiB - 1)}),
    "last grain too short": image(grains={**GRAINS, 3: b"x" * 511}),
    "grain too long": image(grains={**GRAINS, 2: b"x" * (64 * KiB + 1)}),
    "grain twice": image()[: 64 * KiB] + grain(0, GRAINS[0]) + image()[64 * KiB :],
    "grain between grains": image()[: 64 * KiB] + grain(1, GRAINS[0]) + image()[64 * KiB :],
    "grain of 4 GiB": image()[: 64 * KiB] + struct.pack("<QI", 0, 2**32 - 1).ljust(512, b"x") + image()[64 * KiB :],
    "a bomb": image(grains={**GRAINS, 2: bytes(50 * MiB)}),
    "rubbish for a grain": image()[: 64 * KiB] + struct.pack("<QI", 128, 400).ljust(512, b"x") + image()[64 * KiB :],
    "unknown marker": image()[: 64 * KiB] + struct.pack("<QII", 1, 0, 9).ljust(512, b"\0") + image()[64 * KiB :],
    "table of 1 TiB": image()[: 64 * KiB] + struct.pack("<QII", 2**31, 0, 1).ljust(512, b"\0") + image()[64 * KiB :],
    "footer of 1 TiB": image()[: 64 * KiB] + struct.pack("<QII", 2**31, 0, 3).ljust(512, b"\0") + image()[64 * KiB :],
}


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told(name: str, seekable: bool) -> None:
    with pytest.raises(ArchiveDamaged):
        read(DAMAGED[name], seekable=seekable)


@pytest.mark.parametrize(
    "header",
    [
        HEADER._replace(flags=1),
        HEADER._replace(flags=0x10001),
        HEADER._replace(version=4),
        HEADER._replace(compression=2),
    ],
    ids=["not compressed", "without markers", "version 4", "other compression"],
)
def test_what_is_not_read(header: Header) -> None:
    with pytest.raises(ArchiveUnsupported):
        read(image(header))


SOUND = written(mixed_bytes(1 * MiB))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seekable=st.booleans())
def test_bytes_that_changed(data: st.DataObject, seekable: bool) -> None:
    damaged = bytearray(SOUND)
    sectors = len(SOUND) // 512
    places = st.one_of(
        st.integers(0, 80), st.integers(0, sectors - 1).map(lambda n: n * 512 + data.draw(st.integers(0, 16)))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(places)] = data.draw(st.integers(0, 255))
    try:
        archive = VmdkReader().open(MemorySource(bytes(damaged), seekable=seekable))
        given_bytes = sum(len(e.data) if isinstance(e, Data) else e.length for e in archive.events())
    except ArchiveError:
        return
    assert given_bytes == archive.head.disks[0].size_bytes


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 200), st.sampled_from(["random", "text", "zero"])), max_size=20),
    seed=st.integers(0, 9),
)
def test_round_trip(pieces: list[tuple[int, str]], seed: int) -> None:
    chance = random.Random(seed)
    make = {"random": chance.randbytes, "text": lambda n: (b"some text" * n)[:n], "zero": bytes}
    content = b"".join(make[kind](count * 2048) for count, kind in pieces)
    data = written(content, seed=seed)
    assert read(data) == content
    assert parse_header(data[:512]) is not None
