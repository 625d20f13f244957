"""Every way to wrap a key leads back to it, for those for whom it was made and for nobody else."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.codec.crypto import Argon2Cost
from casbackup.codec.master_key import MasterKey
from casbackup.errors import KeyFileDamaged, PassphraseNeeded, PassphraseWrong, UsageError
from casbackup.keys.age import normal_recipient, parse_identities
from casbackup.keys.making import key_file_of, with_passphrase, with_recipients, without_plain, without_recipients
from casbackup.keys.text import format_key
from casbackup.keys.wrapping import unwrap, wrap_by_passphrase, wrap_for_recipient, wrap_plain
from casbackup.spec.keyfile import AgeWrapping, KeyFile, PlainWrapping, Wrapping, decode_key_file, encode_key_file

KEY = MasterKey(bytes(range(32)))
COST = Argon2Cost(1, 64, 1)
needs_age = pytest.mark.skipif(shutil.which("age") is None, reason="the program age is not installed")
needs_ssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


def file_of(*wrappings: Wrapping, key: MasterKey = KEY) -> KeyFile:
    return KeyFile(key.fingerprint, "", "", wrappings)


def opened(key_file: KeyFile, **ways: Any) -> bytes:
    """The key of a file that has been written and read."""
    return unwrap(decode_key_file(encode_key_file(key_file), "the file"), "the file", **ways).reveal()


@pytest.fixture
def pair() -> tuple[Any, str]:
    """An identity of age and its recipient."""
    import pyrage

    identity = pyrage.x25519.Identity.generate()
    return identity, str(identity.to_public())


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32).map(MasterKey), st.binary(min_size=1, max_size=80), st.binary(min_size=1))
def test_a_passphrase_opens_what_it_wrapped_and_no_other_does(key: MasterKey, passphrase: bytes, other: bytes) -> None:
    key_file = file_of(wrap_by_passphrase(key, passphrase, COST), key=key)
    assert opened(key_file, passphrases=[passphrase]) == key.reveal()
    if other != passphrase:
        with pytest.raises(PassphraseWrong, match=key.fingerprint):
            opened(key_file, passphrases=[other])
        assert opened(key_file, passphrases=[other, passphrase]) == key.reveal()


def test_no_two_wrappings_are_alike() -> None:
    first, second = (wrap_by_passphrase(KEY, b"secret", COST) for _ in range(2))
    assert first.salt != second.salt and first.sealed[:12] != second.sealed[:12]


def test_passphrases_are_not_asked_for_in_vain(pair: tuple[Any, str]) -> None:
    def asked() -> Iterator[bytes]:
        pytest.fail("there is another way")
        yield b""

    by_passphrase = wrap_by_passphrase(KEY, b"secret", COST)
    assert opened(file_of(by_passphrase, wrap_plain(KEY)), passphrases=asked()) == KEY.reveal()
    both = file_of(by_passphrase, wrap_for_recipient(KEY, pair[1]))
    assert opened(both, identities=[pair[0]], passphrases=asked()) == KEY.reveal()
    assert opened(both, passphrases=[b"secret"]) == KEY.reveal()


def test_what_was_not_offered_is_named(pair: tuple[Any, str]) -> None:
    for wrapping in (wrap_by_passphrase(KEY, b"secret", COST), wrap_for_recipient(KEY, pair[1])):
        with pytest.raises(PassphraseNeeded, match=KEY.fingerprint):
            opened(file_of(wrapping))


def test_a_wrapping_of_another_key_is_refused(pair: tuple[Any, str]) -> None:
    """Whoever can write to a key file can wrap a key of their own in it, but not under this fingerprint."""
    other = MasterKey.generate()
    for wrapping in (wrap_plain(other), wrap_for_recipient(other, pair[1])):
        with pytest.raises(KeyFileDamaged, match=other.fingerprint):
            opened(file_of(wrapping), identities=[pair[0]])
    with pytest.raises(PassphraseWrong):
        opened(file_of(wrap_by_passphrase(other, b"secret", COST)), passphrases=[b"secret"])


def test_a_damaged_way_is_said_to_be_damaged(pair: tuple[Any, str]) -> None:
    text = format_key(KEY).replace("\n0", "\n1", 1)
    with pytest.raises(KeyFileDamaged, match="the file"):
        opened(file_of(PlainWrapping(text)))
    with pytest.raises(PassphraseWrong, match=KEY.fingerprint):
        opened(file_of(AgeWrapping(pair[1], "no age file")), identities=[pair[0]])


def test_an_identity_that_is_for_somebody_else(pair: tuple[Any, str]) -> None:
    import pyrage

    with pytest.raises(PassphraseWrong, match="identity"):
        opened(file_of(wrap_for_recipient(KEY, pair[1])), identities=[pyrage.x25519.Identity.generate()])


# --- age itself


@needs_age
def test_age_opens_a_wrapping(tmp_path: Path) -> None:
    identity, recipient = _age_keygen(tmp_path)
    wrapping = wrap_for_recipient(KEY, recipient)
    done = subprocess.run(["age", "-d", "-i", identity], input=wrapping.file.encode(), capture_output=True, check=True)
    assert done.stdout.decode() == format_key(KEY)


@needs_age
def test_what_age_makes_is_opened(tmp_path: Path) -> None:
    identity, recipient = _age_keygen(tmp_path)
    text = format_key(KEY).encode()
    made = subprocess.run(["age", "-a", "-r", recipient], input=text, capture_output=True, check=True).stdout
    identities = parse_identities(identity.read_bytes(), "the identity")
    assert opened(file_of(AgeWrapping(recipient, made.decode())), identities=identities) == KEY.reveal()


@needs_ssh
@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_keys_of_ssh(tmp_path: Path, kind: str) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "jo@host", "-f", tmp_path / "id"], check=True)
    wrapping = wrap_for_recipient(KEY, (tmp_path / "id.pub").read_text())
    assert wrapping.recipient.startswith(f"ssh-{kind} ") and "jo@host" not in wrapping.recipient
    identities = parse_identities((tmp_path / "id").read_bytes(), "the identity")
    assert opened(file_of(wrapping), identities=identities) == KEY.reveal()


def _age_keygen(folder: Path) -> tuple[Path, str]:
    path = folder / "identity.txt"
    subprocess.run(["age-keygen", "-o", path], capture_output=True, check=True)
    shown = subprocess.run(["age-keygen", "-y", path], capture_output=True, check=True, text=True)
    return path, shown.stdout.strip()


@pytest.mark.parametrize("text", ["", "age1foo", "ssh-ed25519 AAAA", "AGE-SECRET-KEY-1XYZ", "ssh-dss AAAA"])
def test_what_is_no_recipient(text: str) -> None:
    with pytest.raises(UsageError, match="recipient"):
        normal_recipient(text)


@pytest.mark.parametrize("data", [b"", b"# a comment\n", b"AGE-SECRET-KEY-1XYZ", b"\xff\xfe", b"-----BEGIN X-----\n"])
def test_what_is_no_identity(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"identity\.txt"):
        parse_identities(data, "identity.txt")


# --- wrapping anew


def test_a_new_passphrase_takes_the_place_of_the_old_one(pair: tuple[Any, str]) -> None:
    before = file_of(wrap_by_passphrase(KEY, b"old", COST), wrap_for_recipient(KEY, pair[1]))
    after = with_passphrase(before, KEY, b"new")
    assert opened(after, passphrases=[b"new"]) == opened(after, identities=[pair[0]]) == KEY.reveal()
    with pytest.raises(PassphraseWrong):
        opened(after, passphrases=[b"old"])
    plain = with_passphrase(after, KEY, None)
    assert plain.is_plain and opened(plain) == KEY.reveal()
    assert not with_passphrase(plain, KEY, b"newer").is_plain


def test_recipients_come_and_go(pair: tuple[Any, str]) -> None:
    identity, recipient = pair
    before = file_of(wrap_by_passphrase(KEY, b"secret", COST))
    after = with_recipients(before, KEY, [recipient, f" {recipient}\n"])
    assert after.recipients == (recipient,)
    assert opened(after, identities=[identity]) == KEY.reveal()
    assert with_recipients(after, KEY, [recipient]).recipients == (recipient,)
    assert without_recipients(after, [recipient]) == before
    with pytest.raises(UsageError, match="not wrapped for"):
        without_recipients(before, [recipient])
    with pytest.raises(UsageError, match="nothing would protect"):
        without_recipients(replace(after, wrappings=after.wrappings[1:]), [recipient])


def test_what_is_given_away_is_not_plain(pair: tuple[Any, str]) -> None:
    key_file = key_file_of(KEY, recipients=[pair[1]], plain=True, comment="of Jo")
    assert key_file.is_plain and not without_plain(key_file).is_plain
    with pytest.raises(UsageError, match="nothing would protect"):
        without_plain(key_file_of(KEY, plain=True))


def test_a_key_must_be_wrapped_in_some_way() -> None:
    with pytest.raises(UsageError, match="ways"):
        key_file_of(KEY)
    with pytest.raises(UsageError, match="line"):
        key_file_of(KEY, plain=True, comment="two\nlines")
