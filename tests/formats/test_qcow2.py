"""qcow2: what QEMU makes of our images, and what we make of QEMU's."""

from __future__ import annotations

import json
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from casbackup.errors import ArchiveDamaged, ArchiveLimit, ArchiveUnsupported, UsageError
from casbackup.formats import deflate
from casbackup.formats.port import ArchiveDisk, ArchiveHead, ByteRange, Data, Zeros
from casbackup.formats.qcow2 import FORMAT
from casbackup.formats.qcow2.options import Qcow2Writer
from casbackup.formats.qcow2.reader import Qcow2Reader
from casbackup.formats.qcow2.writer import planned_tables
from casbackup.formats.source import archive_source
from casbackup.formats.target import archive_target
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
from casbackup.units import GiB, KiB, MiB, TiB

needs_qemu = [
    pytest.mark.qemu,
    pytest.mark.skipif(not shutil.which("qemu-img") or not shutil.which("qemu-io"), reason="QEMU's tools are missing"),
]
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "zlib": {"compression": "zlib"},
    "zlib 6": {"compression": "zlib", "level": "6"},
    "zstd": {"compression": "zstd"},
}
CHECKS = [
    pytest.param(check, id=f"{kind}-{name}")
    for kind in ("plain", "zlib", "zstd")
    for name, check in ArchiveConformance(
        FORMAT, options=OPTIONS[kind], size_multiple=512, keeps_names=False, keeps_identity=False
    ).checks()
]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def far_repeats(size: int) -> bytes:
    """Text that repeats at a distance of 8 KiB: beyond the window that QEMU decompresses with."""
    return (random_bytes(8 * KiB) * (size // (8 * KiB) + 1))[:size]


def text(size: int) -> bytes:
    """Compresses so well that many clusters share one."""
    return b"".join(b"%08d the quick brown fox\n" % n for n in range(size // 28 + 1))[:size]


CONTENTS = {
    "mixed": mixed_bytes(9 * MiB + 512),
    "zeros": bytes(3 * MiB),
    "random": random_bytes(1 * MiB + 1024),
    "text": text(3 * MiB),
    "far repeats": far_repeats(2 * MiB),
    "by turns": b"".join(random_bytes(64 * KiB) + text(64 * KiB) + bytes(64 * KiB) for _ in range(40)),
    "empty": b"",
}


def content_of(data: bytes) -> Sample:
    return sample([len(data)], fill=lambda _size: data)


# --- ours, read by QEMU


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", CONTENTS)
class TestQemuAccepts:
    pytestmark = needs_qemu

    def test_image(self, kind: str, options: str, tmp_path: Path) -> None:
        raw, image = tmp_path / "a.raw", tmp_path / "a.qcow2"
        raw.write_bytes(CONTENTS[kind])
        image.write_bytes(write_archive(Qcow2Writer(**OPTIONS[options]), content_of(CONTENTS[kind]), seed=4))
        found = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", image))
        assert found["check-errors"] == 0 and "leaks" not in found and "corruptions" not in found
        run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, image)

    def test_guest_can_write_to_it(self, kind: str, options: str, tmp_path: Path) -> None:
        """Refcounts and flags are right: QEMU allocates, overwrites and discards without damaging anything."""
        image = tmp_path / "a.qcow2"
        data = bytearray(CONTENTS[kind])
        data += random_bytes(2 * MiB)
        image.write_bytes(write_archive(Qcow2Writer(**OPTIONS[options]), content_of(bytes(data))))
        commands = ["write -P 0x11 1M 100k", "write -z 300k 64k", "discard 0 128k", "write -P 0x22 65000 1000"]
        run("qemu-io", "-f", "qcow2", *(part for command in commands for part in ("-c", command)), image)
        run("qemu-img", "check", "-q", "-f", "qcow2", image)
        data[1 * MiB : 1 * MiB + 100 * KiB] = b"\x11" * (100 * KiB)
        data[300 * KiB : 364 * KiB] = bytes(64 * KiB)
        data[: 128 * KiB] = bytes(128 * KiB)
        data[65_000:66_000] = b"\x22" * 1000
        assert read_archive(Qcow2Reader(), image.read_bytes()).contents[0] == data


@pytest.mark.qemu
@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}], ids=["plain", "zstd"])
def test_qemu_accepts_a_disk_of_many_tables(options: dict[str, object], tmp_path: Path) -> None:
    """8 TiB with data at its ends and across the border of an L2 table."""
    path, size = tmp_path / "big.qcow2", 8 * TiB
    places = [0, 512 * MiB - 64 * KiB, 3 * TiB, size - 128 * KiB]
    writer = Qcow2Writer(**options)
    with archive_target(str(path)) as target:
        ranges = [ByteRange(place, 128 * KiB) for place in places]
        head = ArchiveHead((ArchiveDisk("big", size),))
        output = writer.open(target, head, [ranges] if writer.capabilities.needs_map else None)
        position = 0
        for place in places:
            output.zeros(0, position, place - position)
            output.write(0, place, random_bytes(128 * KiB))
            position = place + 128 * KiB
        output.finish()
    assert path.stat().st_size < 6 * MiB
    run("qemu-img", "check", "-q", path)
    data = [e for e in json.loads(run("qemu-img", "map", "--output=json", path)) if e["data"]]
    assert sum(extent["length"] for extent in data) == 4 * 128 * KiB
    with archive_source(str(path)) as source:
        found = [(e.offset, bytes(e.data)) for e in Qcow2Reader().open(source).events() if isinstance(e, Data)]
    assert b"".join(data for _, data in found) == random_bytes(128 * KiB) * 4
    assert [offset for offset, _ in found if offset in places] == places


# --- QEMU's, read by us

VARIANTS = {
    "version 2": ["-o", "compat=0.10"],
    "version 3": [],
    "zlib": ["-c"],
    "zlib, version 2": ["-c", "-o", "compat=0.10"],
    "zstd": ["-c", "-o", "compression_type=zstd"],
    "small clusters": ["-o", "cluster_size=512"],
    "large clusters": ["-o", "cluster_size=2M"],
    "small compressed clusters": ["-c", "-o", "cluster_size=4k"],
    "large compressed clusters": ["-c", "-o", "cluster_size=2M"],
    "preallocated": ["-S", "0", "-o", "preallocation=metadata"],
    "lazy refcounts": ["-o", "lazy_refcounts=on"],
    "refcounts of 1 bit": ["-o", "refcount_bits=1"],
}


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., Path]:
    """Makes an image of content with ``qemu-img convert``."""

    def make(data: bytes, *options: str) -> Path:
        raw, image = tmp_path / "source.raw", tmp_path / "made.qcow2"
        raw.write_bytes(data)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, image)
        return image

    return make


class TestImagesOfQemu:
    pytestmark = needs_qemu

    @pytest.mark.parametrize("kind", ["mixed", "by turns", "zeros", "random"])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_variant(self, variant: str, kind: str, images: Callable[..., Path]) -> None:
        image = images(CONTENTS[kind], *VARIANTS[variant])
        assert read_archive(Qcow2Reader(), image.read_bytes()).contents[0] == CONTENTS[kind]

    def test_zero_clusters(self, images: Callable[..., Path]) -> None:
        data = random_bytes(1 * MiB)
        image = images(data)
        run("qemu-io", "-f", "qcow2", "-c", "write -z 128k 256k", "-c", "write -z -u 512k 128k", image)
        expected = bytearray(data)
        expected[128 * KiB : 384 * KiB] = bytes(256 * KiB)
        expected[512 * KiB : 640 * KiB] = bytes(128 * KiB)
        assert read_archive(Qcow2Reader(), image.read_bytes()).contents[0] == expected

    def test_internal_snapshots_are_left_alone(self, images: Callable[..., Path]) -> None:
        data = random_bytes(1 * MiB)
        image = images(data)
        run("qemu-img", "snapshot", "-c", "before", image)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", image)
        expected = data[: 64 * KiB] + b"\7" * (64 * KiB) + data[128 * KiB :]
        assert read_archive(Qcow2Reader(), image.read_bytes()).contents[0] == expected

    def test_data_that_lies_together_is_read_at_once(self, images: Callable[..., Path]) -> None:
        image = images(random_bytes(8 * MiB))
        with archive_source(str(image)) as source:
            events = list(map(type, Qcow2Reader().open(source).events()))
        assert events == [Data] * 8

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["-o", "extended_l2=on"], "extended L2"),
            (["-o", "data_file=DATA"], "another file"),
            (["-B", "BASE", "-F", "raw"], "backing file"),
        ],
        ids=["extended L2", "external data", "backing file"],
    )
    def test_refused(self, options: list[str], reason: str, images: Callable[..., Path], tmp_path: Path) -> None:
        (tmp_path / "base.raw").write_bytes(bytes(1 * MiB))
        names = {"DATA": str(tmp_path / "data.raw"), "BASE": str(tmp_path / "base.raw")}
        filled = [option.replace("DATA", names["DATA"]).replace("BASE", names["BASE"]) for option in options]
        image = images(random_bytes(1 * MiB), *filled)
        with pytest.raises(ArchiveUnsupported, match=reason):
            read_archive(Qcow2Reader(), image.read_bytes())

    def test_marked_as_corrupt(self, images: Callable[..., Path]) -> None:
        data = bytearray(images(random_bytes(1 * MiB)).read_bytes())
        data[79] |= 2
        with pytest.raises(ArchiveDamaged, match="corrupt"):
            read_archive(Qcow2Reader(), bytes(data))

    def test_not_closed_cleanly(self, images: Callable[..., Path]) -> None:
        data = bytearray(images(CONTENTS["mixed"]).read_bytes())
        data[79] |= 1
        assert read_archive(Qcow2Reader(), bytes(data)).contents[0] == CONTENTS["mixed"]


# --- writing


def test_without_isa_l(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deflate, "_fastest", lambda: deflate.zlib)
    content = content_of(CONTENTS["by turns"])
    data = write_archive(Qcow2Writer("zlib"), content)
    assert read_archive(Qcow2Reader(), data).contents == content.contents
    assert len(data) < len(CONTENTS["by turns"]) // 2


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_zero_takes_nothing(options: str) -> None:
    head = ArchiveHead((ArchiveDisk("d", 100 * GiB),))
    output = Qcow2Writer(**OPTIONS[options]).open(target := MemoryTarget(), head, [[]])
    output.zeros(0, 0, 100 * GiB)
    output.finish()
    assert len(target.data) == 4 * 64 * KiB  # header, refcount table and block, L1 table
    assert read_zeros(bytes(target.data)) == 100 * GiB


def read_zeros(data: bytes) -> int:
    events = list(Qcow2Reader().open(MemorySource(data)).events())
    assert all(isinstance(event, Zeros) for event in events)
    return sum(event.length for event in events if isinstance(event, Zeros))


def test_refcounts_count_themselves() -> None:
    for other_clusters in (0, 1, 32_764, 32_765, 100 * 32_768, 2**28):
        tables = planned_tables(8 * TiB, other_clusters)
        assert (tables.clusters + other_clusters) <= tables.refcount_blocks * 32_768
        assert tables.refcount_blocks <= tables.refcount_table * 8192
        assert tables.refcount_blocks * 32_768 < tables.clusters + other_clusters + 2 * 32_768


def test_a_map_that_does_not_end_on_clusters() -> None:
    head = ArchiveHead((ArchiveDisk("d", 300 * KiB),))
    ranges = [ByteRange(1000, 10), ByteRange(60 * KiB, 8 * KiB), ByteRange(260 * KiB, 512)]
    output = Qcow2Writer().open(target := MemoryTarget(seekable=False), head, [ranges])
    output.write(0, 0, random_bytes(128 * KiB))
    output.write(0, 256 * KiB, random_bytes(44 * KiB))
    output.finish()
    expected = random_bytes(128 * KiB) + bytes(128 * KiB) + random_bytes(44 * KiB)
    assert read_archive(Qcow2Reader(), bytes(target.data)).contents[0] == expected


def test_a_cluster_that_comes_twice() -> None:
    output = Qcow2Writer("zlib").open(MemoryTarget(), ArchiveHead((ArchiveDisk("d", 1 * MiB),)))
    output.write(0, 0, random_bytes(64 * KiB))
    with pytest.raises(ValueError, match="comes twice"):
        output.write(0, 0, random_bytes(64 * KiB))


def test_an_unfinished_compressed_image_is_none() -> None:
    output = Qcow2Writer("zlib").open(target := MemoryTarget(), ArchiveHead((ArchiveDisk("d", 64 * KiB),)))
    output.write(0, 0, random_bytes(64 * KiB))
    assert not FORMAT.recognises(bytes(target.data[:1024]))


@pytest.mark.parametrize(
    "head",
    [
        ArchiveHead(()),
        ArchiveHead((ArchiveDisk("a", 1), ArchiveDisk("b", 1))),
        ArchiveHead((ArchiveDisk("a", 65 * TiB),)),
        ArchiveHead((ArchiveDisk("a", 1, is_vmstate=True),)),
    ],
    ids=["no disk", "two disks", "too large", "vmstate"],
)
def test_what_it_cannot_hold(head: ArchiveHead) -> None:
    with pytest.raises(ArchiveLimit):
        Qcow2Writer().check(head)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzma"},
        {"compression": "zlib", "level": "10"},
        {"compression": "zstd", "level": 0},
        {"compression": "zlib", "level": "fast"},
        {"compression": "zlib", "level": "²"},
    ],
)
def test_options_that_there_are_not(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Qcow2Writer(**options)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A disk most of which is zero takes no more than a few tables."""
    head = ArchiveHead((ArchiveDisk("d", 16 * GiB),))
    ranges = [ByteRange(n * GiB, 64 * KiB) for n in range(16)]
    path = tmp_path / "d.qcow2"
    tracemalloc.start()
    try:
        with archive_target(str(path)) as target:
            output = Qcow2Writer().open(target, head, [ranges])
            for piece in ranges:
                output.write(0, piece.offset, random_bytes(64 * KiB))
            output.finish()
        with archive_source(str(path)) as source:
            kinds = [type(event) for event in Qcow2Reader().open(source).events()]
        assert tracemalloc.get_traced_memory()[1] < 8 * MiB
    finally:
        tracemalloc.stop()
    assert kinds == [Data, Zeros] * 16
