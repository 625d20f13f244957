"""Ways to wrap a master key, and to get it back. Nothing here quotes a secret in an error."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from casbackup.codec.crypto import Argon2Cost, passphrase_key, seal, unseal
from casbackup.codec.master_key import MasterKey
from casbackup.errors import KeyFileDamaged, KeyMistyped, PassphraseNeeded, PassphraseWrong
from casbackup.keys.age import age_decrypted, age_encrypted, normal_recipient
from casbackup.keys.text import format_key, parse_key
from casbackup.spec.keyfile import (
    SALT_BYTES,
    AgeWrapping,
    KeyFile,
    PassphraseWrapping,
    PlainWrapping,
    sealing_context,
)

if TYPE_CHECKING:
    from casbackup.keys.age import Identity


def wrap_by_passphrase(key: MasterKey, passphrase: bytes, cost: Argon2Cost | None = None) -> PassphraseWrapping:
    """:raise ValueError: when the cost is out of range."""
    cost = cost or Argon2Cost()
    salt = os.urandom(SALT_BYTES)
    sealed = seal(passphrase_key(passphrase, salt, cost), key.reveal(), sealing_context(key.fingerprint))
    return PassphraseWrapping(salt, *cost, sealed)


def wrap_for_recipient(key: MasterKey, recipient: str) -> AgeWrapping:
    """:raise UsageError: when it is no recipient of age."""
    return AgeWrapping(normal_recipient(recipient), age_encrypted(format_key(key).encode(), recipient))


def wrap_plain(key: MasterKey) -> PlainWrapping:
    return PlainWrapping(format_key(key))


def unwrap(
    key_file: KeyFile, origin: str, *, identities: Sequence[Identity] = (), passphrases: Iterable[bytes] = ()
) -> MasterKey:
    """The key, by the way that asks least of people: as it is, by an identity of age, by a passphrase.

    ``passphrases`` are tried in turn, and taken only if none of the other ways leads there.

    :raise PassphraseNeeded: when nothing was offered that might fit. :raise PassphraseWrong: when nothing did.
    :raise KeyFileDamaged: when what is wrapped is not the key that the file says it is.
    """
    found = next(_found(key_file, origin, identities, passphrases), None)
    if found is None:
        raise PassphraseWrong(f"no passphrase or identity that was given opens key {key_file.fingerprint}")
    if found.fingerprint != key_file.fingerprint:
        raise KeyFileDamaged(f"{origin} says that it has key {key_file.fingerprint}, and has {found.fingerprint}")
    return found


def _found(
    key_file: KeyFile, origin: str, identities: Sequence[Identity], passphrases: Iterable[bytes]
) -> Iterator[MasterKey]:
    for wrapping in key_file.wrappings:
        if isinstance(wrapping, PlainWrapping):
            yield _parsed(wrapping.text, origin)
    for wrapping in key_file.wrappings:
        if isinstance(wrapping, AgeWrapping) and identities:
            text = age_decrypted(wrapping.file, identities)
            if text is not None:
                yield _parsed(text.decode("ascii", "replace"), origin)
    wrappings = _by_passphrase(key_file)
    offered = bool(identities and key_file.recipients)
    for passphrase in passphrases if wrappings else ():
        offered = True
        for wrapping in wrappings:
            secret = _opened(wrapping, passphrase, key_file.fingerprint)
            if secret is not None:
                yield MasterKey(secret)
    if not offered:
        way = "by a passphrase" if wrappings else "for recipients of age"
        raise PassphraseNeeded(f"key {key_file.fingerprint} is wrapped {way}, and none was given")


def _parsed(text: str, origin: str) -> MasterKey:
    """:raise KeyFileDamaged: when it is no key."""
    try:
        return parse_key(text, origin)
    except KeyMistyped as error:
        raise KeyFileDamaged(f"the key in {origin} is damaged: {error}") from None


def _by_passphrase(key_file: KeyFile) -> list[PassphraseWrapping]:
    return [wrapping for wrapping in key_file.wrappings if isinstance(wrapping, PassphraseWrapping)]


def _opened(wrapping: PassphraseWrapping, passphrase: bytes, fingerprint: str) -> bytes | None:
    cost = Argon2Cost(wrapping.iterations, wrapping.memory_kib, wrapping.lanes)
    return unseal(passphrase_key(passphrase, wrapping.salt, cost), wrapping.sealed, sealing_context(fingerprint))
