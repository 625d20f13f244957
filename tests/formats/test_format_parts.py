"""What the image formats are made of: mapped streams, zeros in buffers, deflate, reading in order, options."""

from __future__ import annotations

import threading
import zlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.errors import ArchiveDamaged, UsageError
from casbackup.formats import deflate as deflate_module
from casbackup.formats.deflate import BARE, ZLIB_FORMAT, Undecompressable, deflate, inflate
from casbackup.formats.mappedstream import MappedStream, rounded
from casbackup.formats.options import chosen, whole_number
from casbackup.formats.parallel import batch_of, mapped
from casbackup.formats.port import ByteRange
from casbackup.formats.reading import disk_name, drain, read_at, read_exactly, skip
from casbackup.formats.zeroruns import all_zero, runs, zero_buffers
from casbackup.testing.archives import MemorySource, MemoryTarget, random_bytes
from casbackup.units import KiB, MiB

# --- mapped streams

cuts = st.lists(st.integers(0, 4000), max_size=24).map(sorted)


def pieces(numbers: list[int]) -> list[ByteRange]:
    """Ranges of (start, end) pairs, not touching."""
    found: list[ByteRange] = []
    for start, end in zip(numbers[::2], numbers[1::2], strict=False):
        if end > start and not (found and found[-1].end == start):
            found.append(ByteRange(start, end - start))
    return found


@settings(max_examples=300, deadline=None)
@given(map_cuts=cuts, event_cuts=cuts, kinds=st.lists(st.sampled_from("wz-"), min_size=25, max_size=25))
def test_what_is_mapped_is_written_once_in_order(map_cuts: list[int], event_cuts: list[int], kinds: list[str]) -> None:
    ranges = pieces(map_cuts)
    disk = bytearray(4000)
    given_disk = bytearray(4000)
    for piece in ranges:
        disk[piece.offset : piece.end] = b"x" * piece.length
    stream = MappedStream(target := MemoryTarget(seekable=False), ranges)
    for start, end, kind in zip([0, *event_cuts], [*event_cuts, 4000], kinds, strict=False):
        if kind == "w":
            stream.write(start, memoryview(disk)[start:end])
            given_disk[start:end] = disk[start:end]
        elif kind == "z":
            stream.zeros(start, end - start)
    stream.finish()
    assert bytes(target.data) == b"".join(given_disk[piece.offset : piece.end] for piece in ranges)


def test_data_outside_the_map_is_never_dropped() -> None:
    for offset in (0, 99, 200):
        stream = MappedStream(MemoryTarget(), [ByteRange(100, 100)])
        with pytest.raises(ValueError, match="not in the map"):
            stream.write(offset, bytes(50) + b"x" + bytes(50))
            stream.write(offset + 101, b"x" * 100)


def test_the_past_cannot_be_changed() -> None:
    stream = MappedStream(MemoryTarget(), [ByteRange(0, 100)])
    stream.zeros(0, 50)
    with pytest.raises(ValueError, match="come after"):
        stream.write(49, b"x")
    with pytest.raises(ValueError, match="come after"):
        stream.zeros(0, 1)


@given(numbers=cuts, unit=st.sampled_from([1, 7, 64, 512]))
def test_rounded(numbers: list[int], unit: int) -> None:
    units = {n for piece in pieces(numbers) for n in range(piece.offset // unit, -(-piece.end // unit))}
    found = list(rounded(pieces(numbers), unit))
    assert {n for piece in found for n in range(piece.offset // unit, piece.end // unit)} == units
    assert all(a.end < b.offset for a, b in pairwise(found))
    assert all(piece.offset % unit == piece.length % unit == 0 < piece.length for piece in found)


# --- zeros


@given(data=st.lists(st.sampled_from([b"\0" * 10, b"\0" * 9 + b"x", b"\0", b"yy"]), max_size=20).map(b"".join))
def test_runs(data: bytes) -> None:
    found = list(runs(data, 10))
    assert b"".join(data[run.start : run.end] for run in found) == data
    assert all(a.is_zero != b.is_zero for a, b in pairwise(found))
    for run in found:
        blocks = [data[start : min(start + 10, run.end)] for start in range(run.start, run.end, 10)]
        assert all((not block.strip(b"\0")) == run.is_zero for block in blocks)


def test_zeros_of_any_length() -> None:
    for length in (0, 1, 4 * MiB, 4 * MiB + 1, 600 * MiB):
        assert sum(len(buffer) for buffers in zero_buffers(length) for buffer in buffers) == length
    assert all_zero(bytes(9 * MiB)) and not all_zero(bytes(9 * MiB) + b"x") and all_zero(b"")


# --- deflate


@pytest.mark.parametrize("level", [1, 6, 9])
@pytest.mark.parametrize("data", [b"", b"a" * 100_000, random_bytes(70_000)], ids=["empty", "same", "random"])
def test_deflate_is_what_zlib_reads(data: bytes, level: int) -> None:
    assert zlib.decompress(deflate(data, level, ZLIB_FORMAT)) == data
    assert inflate(deflate(memoryview(data), level, -12), max(len(data), 1), BARE) == data


def test_deflate_without_isa_l(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "isal", None)
    deflate_module._fastest.cache_clear()
    try:
        assert deflate(b"abc" * 1000, 1, ZLIB_FORMAT) == zlib.compress(b"abc" * 1000, 1)
    finally:
        deflate_module._fastest.cache_clear()


def test_inflating_is_bounded_and_checked() -> None:
    packed = zlib.compress(bytes(1000))
    assert inflate(packed + b"more", 1000, ZLIB_FORMAT) == bytes(1000)
    for data, most in (
        (packed, 999),
        (packed[:-1], 1000),
        (packed[:-4] + b"\0\0\0\0", 1000),
        (b"rubbish", 10),
        (b"", 1),
    ):
        with pytest.raises(Undecompressable):
            inflate(data, most, ZLIB_FORMAT)


def test_mapping_keeps_the_order_and_uses_threads() -> None:
    together = threading.Barrier(2, timeout=10)

    def work(number: int) -> int:
        if number < 2:
            together.wait()
        return number * number

    assert mapped(work, range(50)) == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        mapped(lambda n: 1 // n, [1, 0, 1])


def test_batches_bound_memory() -> None:
    assert [batch_of(size) for size in (512, 64 * KiB, 2 * MiB)] == [4096, 32, 2]


# --- reading


@pytest.mark.parametrize("seekable", [True, False])
def test_reading_in_order(seekable: bool) -> None:
    source = MemorySource(bytes(range(100)), seekable=seekable)
    assert read_exactly(source, 10, "a") == bytes(range(10))
    skip(source, 80, "b")
    assert read_exactly(source, 10, "c") == bytes(range(90, 100))
    skip(source, 0, "d")
    for failing in (lambda: read_exactly(source, 1, "the end"), lambda: skip(source, 1, "the end")):
        with pytest.raises(ArchiveDamaged, match="ends within the end at byte 100"):
            failing()


def test_reading_at_a_place() -> None:
    source = MemorySource(bytes(range(100)))
    assert read_at(source, 98, 2, "x") == b"bc"
    with pytest.raises(ArchiveDamaged, match="beyond the end"):
        read_at(source, 99, 2, "x")


def test_draining_a_pipe() -> None:
    pipe = MemorySource(bytes(5 * MiB), seekable=False)
    drain(pipe)
    assert pipe.tell() == 5 * MiB
    drain(file := MemorySource(bytes(5)))
    assert file.tell() == 0


@pytest.mark.parametrize(
    ("path", "name"), [("/a/vm-100.qcow2", "vm-100"), ("-", "disk"), ("<stdin>", "stdin"), ("x", "x"), (".raw", ".raw")]
)
def test_the_name_of_a_disk_without_name(path: str, name: str) -> None:
    assert disk_name(MemorySource(b"", name=path)) == name


# --- options


def test_options() -> None:
    assert chosen("o", "b", ("a", "b")) == "b"
    assert whole_number("o", "7", range(1, 10)) == whole_number("o", 7, range(1, 10)) == 7
    for value in ("c", None, 1):
        with pytest.raises(UsageError, match="may be a, b"):
            chosen("o", value, ("a", "b"))
    for value in ("0", "10", "-1", "", "1.5", None, True, "9" * 20):
        with pytest.raises(UsageError, match="may be 1 to 9"):
            whole_number("o", value, range(1, 10))
