"""Codecs with a key, and without the key that they would need."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casbackup.codec.codec import PLAIN, Codec, blind_codec, keyed_codec
from casbackup.codec.crypto import NONCE_BYTES, SEAL_BYTES, TAG_BYTES, derived_key, keyed_hash, scrambler, seal, unseal
from casbackup.codec.hashing import PUBLIC_KEYS
from casbackup.codec.master_key import MasterKey
from casbackup.codec.records import make_record, parse_record
from casbackup.errors import BlobDamaged, KeyMissing
from casbackup.spec.record import FLAG_SEALED, FLAG_ZSTD, HEADER_BYTES, BlobKind, Record

KEY = MasterKey(bytes(range(32)))
KEYED = keyed_codec(KEY)
BLIND = blind_codec(KEY.fingerprint)
OTHER = keyed_codec(MasterKey(bytes(32)))
TEXT = b"the quick brown fox jumps over the lazy dog, and again. " * 200
NOISE = random.Random(1).randbytes(5000)

sealed_kinds = st.sampled_from([BlobKind.CHUNK, BlobKind.CONFIG])
plains = st.one_of(st.binary(max_size=300), st.sampled_from([b"", b"a" * 5000, NOISE, TEXT]))


def joined(record: Record) -> bytearray:
    return bytearray(record.header) + record.payload


# --- primitives


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=2000), st.binary(max_size=100))
def test_what_was_sealed_is_unsealed(key: bytes, plain: bytes, associated: bytes) -> None:
    sealed = seal(key, plain, associated)
    assert len(sealed) == len(plain) + SEAL_BYTES
    assert unseal(key, sealed, associated) == unseal(key, memoryview(sealed), associated) == plain


@given(st.binary(max_size=60), st.data())
def test_no_bit_of_a_seal_can_be_changed(plain: bytes, data: st.DataObject) -> None:
    key, associated = bytes(32), b"associated"
    sealed = bytearray(seal(key, plain, associated))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    assert unseal(key, sealed, associated) is None


@given(st.binary(max_size=60), st.integers(0, 100))
def test_a_cut_seal_is_none(plain: bytes, length: int) -> None:
    sealed = seal(bytes(32), plain, b"")
    assert unseal(bytes(32), sealed[:length], b"") == (plain if length >= len(sealed) else None)


def test_a_seal_is_for_one_key_and_one_place() -> None:
    sealed = seal(bytes(32), b"plain", b"here")
    assert unseal(b"\1" * 32, sealed, b"here") is None
    assert unseal(bytes(32), sealed, b"there") is None


def test_aes_gcm_is_the_one_of_its_inventors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test case 14 of McGrew and Viega: key, nonce and plain text of zeros."""
    monkeypatch.setattr("os.urandom", bytes)
    sealed = seal(bytes(32), bytes(16), b"")
    assert sealed[:NONCE_BYTES] == bytes(12)
    assert sealed[NONCE_BYTES:-TAG_BYTES].hex() == "cea7403d4d606b6e074ec5d3baf39d18"
    assert sealed[-TAG_BYTES:].hex() == "d0d1c8a799996bf0265b98b5d48ab919"


def test_the_scrambler_is_aes_256() -> None:
    """FIPS 197, appendix C.3; each 16 bytes by themselves."""
    block = bytes.fromhex("00112233445566778899aabbccddeeff")
    scrambled = scrambler(bytes(range(32)))(block * 3)
    assert scrambled.hex() == "8ea2b7ca516745bfeafc49904b496089" * 3


def test_blake3_is_the_one_of_its_inventors() -> None:
    """The first vectors of the reference implementation, for the empty input."""
    assert keyed_hash(b"whats the Elvish word for friend", b"").hex() == (
        "92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26"
    )
    assert derived_key(b"", "BLAKE3 2019-12-27 16:29:52 test vectors context").hex() == (
        "2cc39783c223154fea8dfb7c1b1660f2ac2dcbd1c1de8277b0b0dd39b7e50d7d"
    )


# --- the master key


def test_a_master_key_is_not_shown() -> None:
    secret = KEY.reveal()
    assert secret.hex() not in repr(KEY) + str(KEY) + KEY.fingerprint
    assert repr(secret) not in repr(KEY)
    with pytest.raises(TypeError):
        __import__("pickle").dumps(KEY)


def test_keys_are_unlike_each_other() -> None:
    assert MasterKey.generate().fingerprint != MasterKey.generate().fingerprint
    assert KEY.derived("one context") != KEY.derived("another context")
    with pytest.raises(ValueError, match="32 bytes"):
        MasterKey(bytes(31))


# --- blobs


@given(sealed_kinds, plains, st.sampled_from([-5, 1, 2, 9]))
def test_round_trip(kind: BlobKind, plain: bytes, level: int) -> None:
    record = KEYED.encode_blob(kind, plain, level)
    assert record.flags & FLAG_SEALED
    assert bytes(KEYED.decode(parse_record(joined(record), at="here"))) == plain
    assert record.total_bytes <= len(plain) + 96
    if len(plain) >= 16:
        assert plain not in bytes(joined(record))


def test_tree_nodes_are_readable_but_have_secret_ids() -> None:
    record = KEYED.encode_blob(BlobKind.NODE, TEXT, 2)
    assert not record.flags & FLAG_SEALED
    assert bytes(BLIND.decode(record)) == bytes(KEYED.decode(record)) == TEXT
    assert record.id != PUBLIC_KEYS.id(BlobKind.NODE, TEXT)


@given(sealed_kinds, plains)
def test_ids_depend_on_the_key(kind: BlobKind, plain: bytes) -> None:
    """So nobody without it finds out, by guessing, whether a chunk is stored."""
    assert len({codec.ids.id(kind, plain) for codec in (PLAIN, KEYED, OTHER)}) == 3


def test_no_nonce_comes_twice_and_no_key_stream_is_used_twice() -> None:
    """Also when the same chunk is compressed anew, at the same level or another one."""
    records = [KEYED.encode_blob(BlobKind.CHUNK, NOISE, level) for level in (-5, 1, 2, 2, 3, 9) * 50]
    payloads = [bytes(record.payload) for record in records]
    assert len({record.id for record in records}) == 1
    assert len({payload[:NONCE_BYTES] for payload in payloads}) == len(records)
    # NOISE does not compress, so all seal the same bytes: the same key stream would give the same cipher text.
    assert len({payload[NONCE_BYTES : NONCE_BYTES + 16] for payload in payloads}) == len(records)


def test_each_blob_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with one and the same nonce the key streams differ."""
    monkeypatch.setattr("os.urandom", bytes)
    streams = set()
    for seed in range(100):
        plain = random.Random(seed).randbytes(64)
        payload = bytes(KEYED.encode_blob(BlobKind.CHUNK, plain, 2).payload)[NONCE_BYTES:-TAG_BYTES]
        streams.add(bytes(a ^ b for a, b in zip(plain, payload, strict=True)))
    assert len(streams) == 100


@pytest.mark.parametrize("plain", [NOISE[:64], TEXT[:200] * 3, b""], ids=["noise", "text", "empty"])
def test_every_changed_bit_is_noticed_even_with_a_right_checksum(plain: bytes) -> None:
    """Whoever can write to the repository can compute checksums."""
    record = KEYED.encode_blob(BlobKind.CHUNK, plain, 2)
    for bit in range(len(record.payload) * 8):
        payload = bytearray(record.payload)
        payload[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BlobDamaged):
            KEYED.decode(make_record(record.id, record.kind, record.flags, record.plain_length, payload))


def test_no_field_of_the_header_can_be_changed() -> None:
    record = KEYED.encode_blob(BlobKind.CHUNK, TEXT, 2)
    other = KEYED.encode_blob(BlobKind.CHUNK, NOISE, 2)
    assert record.flags == FLAG_ZSTD | FLAG_SEALED
    for identity, kind, flags, plain_length in (
        (other.id, record.kind, record.flags, record.plain_length),
        (record.id, BlobKind.CONFIG, record.flags, record.plain_length),
        (record.id, BlobKind.NODE, record.flags, record.plain_length),
        (record.id, record.kind, FLAG_SEALED, record.plain_length),
        (record.id, record.kind, FLAG_ZSTD, record.plain_length),
        (record.id, record.kind, 0, record.plain_length),
        (record.id, record.kind, record.flags, record.plain_length - 1),
    ):
        with pytest.raises(BlobDamaged):
            KEYED.decode(make_record(identity, kind, flags, plain_length, record.payload))


def test_blobs_that_were_swapped_are_noticed() -> None:
    one, two = (KEYED.encode_blob(BlobKind.CHUNK, plain, 2) for plain in (b"one" * 100, b"two" * 100))
    with pytest.raises(BlobDamaged, match="seal"):
        KEYED.decode(make_record(one.id, one.kind, two.flags, two.plain_length, two.payload))


def test_with_another_key_nothing_opens() -> None:
    with pytest.raises(BlobDamaged, match="seal"):
        OTHER.decode(KEYED.encode_blob(BlobKind.CHUNK, TEXT, 2))
    with pytest.raises(BlobDamaged, match="do not have that id"):
        OTHER.decode(KEYED.encode_blob(BlobKind.NODE, TEXT, 2))


@pytest.mark.parametrize("codec", [KEYED, BLIND], ids=["keyed", "blind"])
def test_what_is_not_sealed_is_refused_where_all_is(codec: Codec) -> None:
    """A client that forgot to encrypt, or somebody who plants a chunk."""
    record = make_record(KEYED.ids.id(BlobKind.CHUNK, TEXT), BlobKind.CHUNK, 0, len(TEXT), TEXT)
    for refused in (codec.verify, codec.decode):
        with pytest.raises(BlobDamaged, match="not sealed"):
            refused(record)


def test_what_is_sealed_is_refused_where_nothing_is() -> None:
    with pytest.raises(BlobDamaged, match="is sealed"):
        PLAIN.verify(KEYED.encode_blob(BlobKind.CHUNK, TEXT, 2))


# --- without the key


def test_without_the_key_checksums_are_verified() -> None:
    for kind in BlobKind:
        record = KEYED.encode_blob(kind, TEXT, 2)
        data = bytes(joined(record))
        BLIND.verify(record)
        fields = (record.kind, record.flags, len(record.payload), record.plain_length, record.id)
        assert BLIND.is_sound(data, 0, *fields)
        for at in (0, HEADER_BYTES - 1, HEADER_BYTES, len(data) - 1):
            changed = bytearray(data)
            changed[at] ^= 1
            assert not BLIND.is_sound(bytes(changed), 0, *fields)


def test_a_damaged_node_is_noticed_without_the_key() -> None:
    record = KEYED.encode_blob(BlobKind.NODE, NOISE, 2)
    with pytest.raises(BlobDamaged, match="checksum"):
        BLIND.decode(record._replace(payload=NOISE[::-1]))


def test_without_the_key_nothing_is_opened_or_named() -> None:
    with pytest.raises(KeyMissing, match=KEY.fingerprint):
        BLIND.decode(KEYED.encode_blob(BlobKind.CHUNK, TEXT, 2))
    with pytest.raises(KeyMissing, match=KEY.fingerprint):
        BLIND.encode_blob(BlobKind.CHUNK, TEXT, 2)
