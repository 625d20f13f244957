"""tar archives that lie. Whatever they say, it ends with an error of casbackup and within bounded memory."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.errors import ArchiveDamaged, ArchiveError, ArchiveUnsupported
from casbackup.formats.tar.headers import InvalidHeader, encode_member, padded, parse_number, parse_records
from casbackup.formats.tar.reader import TarReader
from casbackup.formats.tar.writer import TarWriter
from casbackup.testing.archives import (
    MemorySource,
    Sample,
    mixed_bytes,
    random_bytes,
    read_archive,
    sample,
    write_archive,
)
from casbackup.units import GiB, KiB, MiB

END = bytes(1024)


def member(name: str, content: bytes, **records: object) -> bytes:
    """A member with these PAX records; ``_`` in their names stands for ``.``."""
    named = {key.replace("_", "."): str(value) for key, value in records.items()}
    return encode_member(name, len(content), 0, named) + padded(content)


def sparse_1_0(numbers: str, data: bytes = b"", size: int = 4096) -> bytes:
    content = padded(numbers.encode()) + data
    records = {"GNU_sparse_major": 1, "GNU_sparse_minor": 0, "GNU_sparse_name": "d.raw", "GNU_sparse_realsize": size}
    return member("GNUSparseFile.0/d.raw", content, **records)


def extension(size: int) -> bytes:
    """The header of a PAX header that claims this size."""
    block = bytearray(member("x", b"")[:512])
    block[124:136] = b"\x80" + size.to_bytes(11, "big")
    block[156:157] = b"x"
    return with_checksum(block)


def global_header(key: str, value: str) -> bytes:
    block = bytearray(member("x", b"", **{key: value})[:-512])
    block[156:157] = b"g"
    return with_checksum(block[:512]) + bytes(block[512:])


def old_sparse(entries: bytes, size: bytes = b"00000010000\0", *, extended: bytes = b"\0") -> bytes:
    block = bytearray(member("d.raw", b"")[:512])
    block[156:157] = b"S"
    block[386 : 386 + len(entries)] = entries
    block[482:483] = extended
    block[483:495] = size
    return with_checksum(block)


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def entry(offset: int, length: int) -> bytes:
    return b"%011o\0%011o\0" % (offset, length)


def manifest(text: str) -> bytes:
    return member("casbackup.json", text.encode())


ONE_DISK = '{"format": "casbackup-tar", "version": 1, "configs": [], "disks": [%s]}'

DAMAGED = {
    "cut in a header": member("d.raw", b"x")[:300],
    "cut in the data": member("d.raw", bytes(5000))[:2000],
    "no mark of the end": member("d.raw", b"x"),
    "rubbish behind a member": member("d.raw", b"x") + random_bytes(512) + END,
    "size without end": encode_member("d.raw", 2**62, 0, {"size": str(2**62)}) + END,
    "size no number": member("d.raw", b"", size="-1") + END,
    "PAX header of 1 TiB": extension(2**40) + END,
    "PAX headers without end": member("d.raw", b"", comment="x" * 3 * MiB)[:-512] * 2,
    "global PAX headers without end": b"".join(global_header(str(n), "x" * 2 * MiB) for n in range(3)),
    "name of 5000 characters": member("d" * 4996 + ".raw", b"x") + END,
    "PAX without its member": member("d.raw", b"", comment="x")[:1024] + END,
    "map of too many": sparse_1_0("999999999999\n") + END,
    "map without line feeds": sparse_1_0("1" * 3000) + END,
    "map of letters": sparse_1_0("x\n1\n2\n") + END,
    "map that goes back": sparse_1_0("2\n512\n512\n0\n512\n", bytes(1024)) + END,
    "map that overlaps": sparse_1_0("2\n0\n512\n511\n513\n", bytes(1025)) + END,
    "map beyond the file": sparse_1_0("1\n4000\n97\n", bytes(97)) + END,
    "map with a number of 100 digits": sparse_1_0("1\n" + "9" * 100 + "\n1\n") + END,
    "map of more than is stored": sparse_1_0("1\n0\n512\n", bytes(100)) + END,
    "map of less than is stored": sparse_1_0("1\n0\n100\n", bytes(512)) + END,
    "map longer than the member": sparse_1_0("300\n" + "1\n" * 100) + END,
    "0.1 with half an entry": member("d.raw", b"", GNU_sparse_map="0,1,2", GNU_sparse_size=10) + END,
    "0.1 without size": member("d.raw", b"x", GNU_sparse_map="0,1") + END,
    "0.1 empty": member("d.raw", b"x", GNU_sparse_map="", GNU_sparse_size=10) + END,
    "old, overlapping": old_sparse(entry(0, 512) + entry(0, 512)) + END,
    "old, going on for ever": old_sparse(entry(0, 0) * 4, extended=b"\1") + (entry(0, 0) * 21 + b"\1" * 8) * 3,
    "old, beyond the file": old_sparse(entry(8**9, 512)) + END,
    "manifest no JSON": manifest("{") + END,
    "manifest of another program": manifest('{"format": "x", "version": 1}') + END,
    "manifest a list": manifest("[]") + END,
    "manifest deep": manifest("[" * 100_000) + END,
    "manifest without disks": manifest('{"format": "casbackup-tar", "version": 1, "configs": []}') + END,
    "disk that is missing": manifest(ONE_DISK % '{"name": "d", "member": "d.raw", "size": 1}') + END,
    "disk of another size": manifest(ONE_DISK % '{"name": "d", "member": "d.raw", "size": 1}')
    + member("d.raw", b"")
    + END,
    "disk of a size that is none": manifest(ONE_DISK % '{"name": "d", "member": "d.raw", "size": -1}') + END,
    "disk of a size that is true": manifest(ONE_DISK % '{"name": "d", "member": "d.raw", "size": true}') + END,
    "uuid too short": manifest('{"format": "casbackup-tar", "version": 1, "uuid": "00", "configs": [], "disks": []}')
    + END,
    "empty": END,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told(name: str) -> None:
    with pytest.raises((ArchiveDamaged, ArchiveUnsupported)):
        read_archive(TarReader(), DAMAGED[name], seekable=True)
    with pytest.raises((ArchiveDamaged, ArchiveUnsupported)):
        read_archive(TarReader(), DAMAGED[name], seekable=False)


def test_sparse_members_of_star_are_refused() -> None:
    with pytest.raises(ArchiveUnsupported, match="star"):
        read_archive(TarReader(), member("d.raw", b"", SCHILY_realsize=10) + END, seekable=True)


def test_sparse_members_of_a_later_version_are_refused() -> None:
    with pytest.raises(ArchiveUnsupported, match="unknown version"):
        read_archive(TarReader(), member("d.raw", b"", GNU_sparse_major=2, GNU_sparse_minor=0) + END, seekable=True)


def test_what_it_claims_takes_no_memory() -> None:
    huge = member("GNUSparseFile.0/d.raw", padded(b"1\n%d\n0\n" % 2**49), GNU_sparse_major=1, GNU_sparse_minor=0,
                  GNU_sparse_name="d.raw", GNU_sparse_realsize=2**49)  # fmt: skip
    tracemalloc.start()
    try:
        archive = TarReader().open(MemorySource(huge + END))
        assert archive.head.disks[0].size_bytes == 2**49
        assert sum(event.length for event in archive.events()) == 2**49  # type: ignore[union-attr]
        assert tracemalloc.get_traced_memory()[1] < 8 * MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field", [b"9999999\0", b"-1\0", b"\xff" * 12, b"0x1\0", b"1 2\0"])
def test_numbers_that_are_none(field: bytes) -> None:
    with pytest.raises(InvalidHeader):
        parse_number(field)


@pytest.mark.parametrize(
    "body", [b"x", b"5 a=b", b"6 a=bX", b"0 a=b\n", b"3 \n\n", b"99 a=b\n", b"6 abcd\n", b" a=b\n", b"1" * 30]
)
def test_records_that_are_none(body: bytes) -> None:
    with pytest.raises(InvalidHeader):
        list(parse_records(body))


SOUND = write_archive(TarWriter(), sample([200_000, 4096], fill=mixed_bytes))


@settings(max_examples=120, deadline=None)
@given(data=st.data(), seekable=st.booleans())
def test_bytes_that_changed(data: st.DataObject, seekable: bool) -> None:
    """Headers that are right as such but say something else: the checksum is made to hold again."""
    damaged = bytearray(SOUND)
    heads = [at for at in range(0, len(SOUND), 512) if SOUND[at + 257 : at + 262] == b"ustar"]
    at = data.draw(st.sampled_from(heads))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[at + data.draw(st.integers(0, 1535))] = data.draw(st.integers(0, 255))
    damaged[at : at + 512] = with_checksum(damaged[at : at + 512])
    ends_well(lambda: read_archive(TarReader(), bytes(damaged), seekable=seekable))


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(st.integers(0, 2**66), max_size=12), size=st.integers(0, 2**66), stored=st.integers(0, 4096))
def test_any_map(numbers: list[int], size: int, stored: int) -> None:
    text = "".join(f"{number}\n" for number in [len(numbers) // 2, *numbers])
    data = sparse_1_0(text, bytes(stored), size) + END
    try:
        archive = TarReader().open(MemorySource(data))
    except ArchiveError:
        return
    length = archive.head.disks[0].size_bytes
    end = 0
    for event in archive.events():
        assert event.offset == end
        end += len(event[2]) if not isinstance(event[2], int) else event[2]
    assert end == length == size


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=30),
    tail=st.integers(0, 511),
    seed=st.integers(0, 9),
)
def test_round_trip(pieces: list[tuple[int, bool]], tail: int, seed: int) -> None:
    chance = random.Random(seed)
    content = b"".join(chance.randbytes(n * 512) if full else bytes(n * 512) for n, full in pieces) + b"\1" * tail
    whole = sample([len(content), 4 * KiB], fill=lambda size: content if size == len(content) else bytes(size))
    data = write_archive(TarWriter(), whole, seed=seed)
    assert read_archive(TarReader(), data, seekable=False) == whole
    assert read_archive(TarReader(), data, seekable=True) == whole


def ends_well(read: Callable[[], Sample]) -> None:
    try:
        found = read()
    except ArchiveError:
        return
    assert sum(map(len, found.contents)) < 1 * GiB
