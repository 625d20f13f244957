"""Blob to record and back."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import dataclass

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from casbackup.codec.codec import PLAIN
from casbackup.codec.hashing import PUBLIC_KEYS, record_checksum
from casbackup.codec.records import make_record, parse_record
from casbackup.errors import BlobDamaged
from casbackup.limits import MAX_BLOB_BYTES
from casbackup.spec.record import FLAG_ZSTD, BlobKind, Record, pack_checked

kinds = st.sampled_from(list(BlobKind))
plains = st.binary(max_size=500) | st.builds(lambda b, n: b * n, st.binary(min_size=1, max_size=9), st.integers(0, 900))


@dataclass
class Sample:
    name: str
    plain: bytes


SAMPLES = [Sample("raw", random.Random(1).randbytes(40)), Sample("compressed", b"casbackup " * 40)]


def joined(record: Record) -> bytes:
    return record.header + bytes(record.payload)


@given(kinds, plains, st.sampled_from([-5, 1, 2, 9]), st.sampled_from([bytes, bytearray, memoryview]))
def test_round_trip(kind: BlobKind, plain: bytes, level: int, buffer: type[bytes]) -> None:
    record = PLAIN.encode_blob(kind, buffer(plain), level)
    found = parse_record(joined(record), at="here")
    assert (found.id, found.kind, found.flags, found.plain_length) == record[:4]
    assert found.total_bytes == len(joined(record)) == record.total_bytes
    assert bytes(PLAIN.decode(found)) == plain
    assert len(record.payload) <= len(plain), "compression never makes a record longer"


@given(kinds, st.lists(plains.filter(len), max_size=5), st.sampled_from([-5, 1, 2, 9]))
def test_many_records_at_once_are_those_one_by_one(kind: BlobKind, blobs: list[bytes], level: int) -> None:
    many = PLAIN.encode_all(kind, [(PUBLIC_KEYS.id(kind, plain), memoryview(plain)) for plain in blobs], level)
    assert [joined(record) for record in many] == [joined(PLAIN.encode_blob(kind, plain, level)) for plain in blobs]


def test_incompressible_data_is_stored_raw_and_copied() -> None:
    plain = bytearray(random.Random(0).randbytes(8192))
    record = PLAIN.encode_blob(BlobKind.CHUNK, plain, 2)
    before = bytes(plain)
    plain[:] = bytes(8192)
    assert (record.flags, bytes(record.payload)) == (0, before)


def test_compressible_data_is_compressed() -> None:
    record = PLAIN.encode_blob(BlobKind.CHUNK, b"casbackup " * 1000, 2)
    assert record.flags == FLAG_ZSTD
    assert len(record.payload) < 200


@given(plains, plains)
def test_ids_tell_kinds_and_contents_apart(a: bytes, b: bytes) -> None:
    assert len({PUBLIC_KEYS.id(kind, a) for kind in BlobKind}) == 3
    for kind in BlobKind:
        assert (PUBLIC_KEYS.id(kind, a) == PUBLIC_KEYS.id(kind, b)) == (a == b)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_every_flipped_bit_is_noticed(sample: Sample) -> None:
    data = joined(PLAIN.encode_blob(BlobKind.CHUNK, sample.plain, 2))
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlobDamaged):
            PLAIN.decode(parse_record(changed, at="here"))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_every_flipped_bit_of_a_payload_is_noticed_by_the_id_alone(sample: Sample) -> None:
    record = PLAIN.encode_blob(BlobKind.CHUNK, sample.plain, 2)
    for bit in range(len(record.payload) * 8):
        changed = bytearray(record.payload)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = PLAIN.decode(record._replace(payload=changed))
        except BlobDamaged:
            continue
        assert bytes(found) == sample.plain, "a bit that zstd does not use"


@given(st.integers(0, 300), st.binary(max_size=40))
def test_cut_and_lengthened_records(length: int, tail: bytes) -> None:
    data = joined(PLAIN.encode_blob(BlobKind.NODE, SAMPLES[1].plain, 2))
    changed = data[:length] + tail
    if changed != data:
        with pytest.raises(BlobDamaged, match="here"):
            parse_record(changed, at="here")


@given(kinds, st.sampled_from([0, FLAG_ZSTD]), st.integers(0, MAX_BLOB_BYTES), st.binary(max_size=100))
def test_random_payloads(kind: BlobKind, flags: int, plain_length: int, payload: bytes) -> None:
    with pytest.raises(BlobDamaged):
        PLAIN.decode(make_record(PUBLIC_KEYS.id(kind, b"other"), kind, flags, plain_length, payload))


def test_a_record_of_another_blob_is_noticed() -> None:
    plain = b"content"
    for record in (
        PLAIN.encode(BlobKind.CHUNK, PUBLIC_KEYS.id(BlobKind.NODE, plain), plain, 2),
        PLAIN.encode_blob(BlobKind.CHUNK, plain, 2)._replace(plain_length=6),
    ):
        with pytest.raises(BlobDamaged):
            PLAIN.decode(record)


def test_a_claim_of_too_many_bytes_is_refused_before_anything_is_decoded() -> None:
    identity = PUBLIC_KEYS.id(BlobKind.CHUNK, b"")
    with pytest.raises(BlobDamaged, match="claims"):
        PLAIN.decode(make_record(identity, BlobKind.CHUNK, FLAG_ZSTD, MAX_BLOB_BYTES + 1, b""))


def test_a_frame_that_claims_more_than_the_record_is_refused() -> None:
    """The frame's own content size must not be believed: 2**60 bytes cannot be had."""
    frame = zstandard.FRAME_HEADER + bytes([0xE0]) + (2**60).to_bytes(8, "little") + bytes([1, 0, 0])
    checked = pack_checked(BlobKind.CHUNK, FLAG_ZSTD, len(frame), 10, PUBLIC_KEYS.id(BlobKind.CHUNK, bytes(10)))
    record = parse_record(checked + record_checksum(checked, frame) + frame, at="here")
    with pytest.raises(BlobDamaged):
        PLAIN.decode(record)


def test_a_small_frame_of_many_bytes_is_not_unpacked() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(64 * 1024 * 1024))
    tracemalloc.start()
    try:
        with pytest.raises(BlobDamaged):
            PLAIN.decode(make_record(PUBLIC_KEYS.id(BlobKind.CHUNK, b"x"), BlobKind.CHUNK, FLAG_ZSTD, 4096, frame))
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()
