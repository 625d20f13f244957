"""Decoding and verifying many records together: the same as one by one, for good ones and bad ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from casbackup.codec.codec import PLAIN, Codec, blind_codec, grouped, keyed_codec
from casbackup.codec.master_key import MasterKey
from casbackup.codec.records import make_record
from casbackup.errors import BlobDamaged
from casbackup.ids import BlobId
from casbackup.peer.disk import verified_each
from casbackup.spec.record import FLAG_ZSTD, BlobKind, Record
from casbackup.store.blobstore import Fetched
from casbackup.units import MiB

KEY = MasterKey(bytes(range(32)))
KEYED = keyed_codec(KEY)
BLIND = blind_codec(KEY.fingerprint)
NOISE = random.Random(1).randbytes(5000)

blobs = st.lists(st.one_of(st.binary(max_size=300), st.sampled_from([b"", b"a" * 70_000, NOISE])), max_size=12)
codecs = st.sampled_from([PLAIN, KEYED])


def encoded(codec: Codec, plains: Sequence[bytes]) -> list[Record]:
    return [codec.encode_blob(BlobKind.CHUNK, plain, 1) for plain in plains]


def wrong(plain: bytes) -> list[Record]:
    """Records whose checksum is right and whose content is not what they say."""
    identity = PLAIN.ids.id(BlobKind.CHUNK, plain)
    frame = zstandard.ZstdCompressor().compress(plain)
    other = zstandard.ZstdCompressor().compress(plain[::-1])
    bomb = zstandard.ZstdCompressor().compress(bytes(32 * MiB))
    return [
        make_record(identity, BlobKind.CHUNK, FLAG_ZSTD, length, payload)
        for length, payload in (
            (len(plain), other),
            (len(plain), frame[:-1]),
            (len(plain), b"no frame"),
            (len(plain), bomb),
            (32 * MiB, bomb),
            (len(plain) + 1, frame),
        )
    ]


@given(codecs, blobs)
def test_many_are_decoded_as_one_by_one(codec: Codec, plains: list[bytes]) -> None:
    records = encoded(codec, plains)
    assert [bytes(plain) for plain in codec.decode_all(records)] == plains
    codec.verify_contents(records)


@given(blobs)
def test_without_the_key_only_their_form_is_looked_at(plains: list[bytes]) -> None:
    BLIND.verify_contents(encoded(KEYED, plains))
    if plains:
        with pytest.raises(BlobDamaged, match="not sealed"):
            BLIND.verify_contents(encoded(PLAIN, plains))


@pytest.mark.parametrize("place", [0, 3, 6])
def test_one_bad_record_among_good_ones_is_named(place: int) -> None:
    good = encoded(PLAIN, [bytes([n]) * 10_000 for n in range(6)])
    for bad in wrong(b"0123456789" * 500):
        records = [*good[:place], bad, *good[place:]]
        with pytest.raises(BlobDamaged, match=bad.id.hex()[:16]):
            PLAIN.verify_contents(records)
        with pytest.raises(BlobDamaged, match=bad.id.hex()[:16]):
            PLAIN.decode_all(records)


def test_what_is_bad_does_not_spoil_what_is_fetched_with_it() -> None:
    good = encoded(PLAIN, [bytes([n]) * 10_000 for n in range(6)])
    bad = wrong(b"0123456789" * 500)[0]
    lost = BlobId(bytes(32)), BlobDamaged("gone")
    fetched: list[Fetched] = [*((r.id, r) for r in good[:3]), lost, (bad.id, bad), *((r.id, r) for r in good[3:])]
    found = dict(verified_each(PLAIN, fetched))
    assert set(found) == {blob_id for blob_id, _ in fetched}
    assert [found[record.id] for record in good] == [bytes([n]) * 10_000 for n in range(6)]
    assert isinstance(found[bad.id], BlobDamaged)
    assert found[lost[0]] is lost[1]


@given(st.lists(st.sampled_from([1, 100_000, 600_000, 3_000_000]), max_size=20))
def test_groups_are_small_or_of_one(lengths: list[int]) -> None:
    records = [make_record(BlobId(bytes(32)), BlobKind.CHUNK, FLAG_ZSTD, length, b"") for length in lengths]
    groups = list(grouped(records))
    assert [record for group in groups for record in group] == records
    assert all(len(group) == 1 or sum(r.plain_length for r in group) <= MiB for group in groups)
    assert all(groups)
