"""Key files: what they hold comes back, and whatever was done to one is noticed or harmless."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casbackup.codec.crypto import Argon2Cost
from casbackup.codec.master_key import MasterKey
from casbackup.errors import EncryptionError, KeyFileDamaged
from casbackup.keys.wrapping import unwrap, wrap_by_passphrase, wrap_plain
from casbackup.limits import MAX_ARGON2_ITERATIONS, MAX_ARGON2_LANES, MAX_ARGON2_MEMORY_KIB, MAX_KEY_WRAPPINGS
from casbackup.spec.keyfile import (
    AgeWrapping,
    KeyFile,
    PassphraseWrapping,
    PlainWrapping,
    Wrapping,
    decode_key_file,
    encode_key_file,
)

KEY = MasterKey(bytes(range(32)))
COST = Argon2Cost(1, 64, 1)
WRAPPED = KeyFile(KEY.fingerprint, "2026-11-24T12:00:00.000Z", "of Jo", (wrap_by_passphrase(KEY, b"secret", COST),))
LINE = st.text(st.characters(categories=("L", "N", "P")), max_size=40)

passphrase_wrappings = st.builds(
    PassphraseWrapping,
    st.binary(min_size=16, max_size=16),
    st.integers(1, MAX_ARGON2_ITERATIONS),
    st.integers(8 * MAX_ARGON2_LANES, MAX_ARGON2_MEMORY_KIB),
    st.integers(1, MAX_ARGON2_LANES),
    st.binary(min_size=60, max_size=60),
)
other_wrappings = st.builds(AgeWrapping, LINE.filter(bool), LINE.filter(bool)) | st.builds(
    PlainWrapping, LINE.filter(bool)
)
wrappings: st.SearchStrategy[Wrapping] = passphrase_wrappings | other_wrappings
key_files = st.builds(
    KeyFile,
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    LINE,
    LINE,
    st.lists(wrappings, min_size=1, max_size=5).map(tuple),
)


@given(key_files)
def test_it_comes_back(key_file: KeyFile) -> None:
    assert decode_key_file(encode_key_file(key_file), "the file") == key_file


def test_a_file_that_was_cut_off_is_refused_at_any_length() -> None:
    data = encode_key_file(WRAPPED)
    for length in range(len(data) - 2):
        with pytest.raises(KeyFileDamaged, match=r"half\.json"):
            decode_key_file(data[:length], "half.json")


@given(st.integers(0, len(encode_key_file(WRAPPED)) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed_or_harmless(place: int, change: int) -> None:
    data = bytearray(encode_key_file(WRAPPED))
    data[place] ^= change
    try:
        found = decode_key_file(bytes(data), "the file")
        if any(w.memory_kib > 1024 or w.iterations > 4 for w in found.wrappings if isinstance(w, PassphraseWrapping)):
            return  # it would only take longer
        assert unwrap(found, "the file", passphrases=[b"secret"]).reveal() == KEY.reveal()
    except EncryptionError:
        pass


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(KeyFileDamaged):
        decode_key_file(data, "the file")


def changed(**changes: Any) -> bytes:
    """The file with other values in its wrapping."""
    content = json.loads(encode_key_file(WRAPPED))
    content["wrappings"][0].update(changes)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_kib": MAX_ARGON2_MEMORY_KIB + 1},
        {"memory_kib": 2**60},
        {"memory_kib": 7},
        {"memory_kib": True},
        {"iterations": MAX_ARGON2_ITERATIONS + 1},
        {"iterations": 0},
        {"iterations": 1.0},
        {"lanes": MAX_ARGON2_LANES + 1},
        {"lanes": -1},
        {"salt": "00"},
        {"salt": "xy" * 16},
        {"sealed": "00" * 59},
        {"kdf": "scrypt"},
        {"kind": "telepathy"},
        {"kind": None},
    ],
    ids=str,
)
def test_what_would_exhaust_the_machine_or_is_unknown_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(KeyFileDamaged):
        decode_key_file(changed(**changes), "the file")


@pytest.mark.parametrize(
    "content",
    [
        {"version": 2},
        {"casbackup": "repository"},
        {"fingerprint": "00"},
        {"fingerprint": KEY.fingerprint.upper()},
        {"wrappings": []},
        {"wrappings": {}},
        {"wrappings": ["plain"]},
        {"comment": "two\nlines"},
        {"comment": None},
        {"created": "x" * 1000},
    ],
    ids=str,
)
def test_other_contents_that_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(KeyFileDamaged):
        decode_key_file(json.dumps({**json.loads(encode_key_file(WRAPPED)), **content}).encode(), "the file")


def test_too_many_wrappings() -> None:
    one = WRAPPED.wrappings[0]
    assert len(replace(WRAPPED, wrappings=(one,) * MAX_KEY_WRAPPINGS).wrappings) == MAX_KEY_WRAPPINGS
    with pytest.raises(ValueError, match="ways"):
        replace(WRAPPED, wrappings=(one,) * (MAX_KEY_WRAPPINGS + 1))


def test_no_repr_has_a_secret() -> None:
    plain = replace(WRAPPED, wrappings=(wrap_plain(KEY), *WRAPPED.wrappings))
    groups = wrap_plain(KEY).text.split()
    assert not [group for group in groups if len(group) == 5 and group in repr(plain)]
    assert KEY.reveal().hex() not in repr(KEY) + repr(plain)
