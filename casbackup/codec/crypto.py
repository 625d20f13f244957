"""Every cryptographic primitive that encryption uses, and no other (``docs/spec/encryption.md`` has vectors).

AES-256-GCM seals, AES-256-ECB scrambles the samples that chunks are cut by, BLAKE3 derives keys, Argon2id makes a key
of a passphrase. ``cryptography`` is imported when one of them is first needed: plain repositories never do.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from casbackup.fs import Buffer

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
SEAL_BYTES = NONCE_BYTES + TAG_BYTES
"""What sealing adds: the nonce before, the tag behind."""


class Argon2Cost(NamedTuple):
    """``memory_kib`` is in KiB. The defaults are the second choice of RFC 9106, section 4."""

    iterations: int = 3
    memory_kib: int = 64 * 1024
    lanes: int = 4


def derived_key(secret: bytes, context: str) -> bytes:
    """32 bytes for one purpose, which ``context`` names."""
    return blake3(secret, derive_key_context=context).digest()


def keyed_hash(key: bytes, data: Buffer) -> bytes:
    return blake3(data, key=key).digest()


def seal(key: bytes, plain: Buffer, associated: bytes) -> bytes:
    """A random nonce, then AES-256-GCM of ``plain``, its tag last. ``associated`` is not in it, but vouched for."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, associated)


def unseal(key: bytes, sealed: Buffer, associated: bytes) -> bytes | None:
    """What was sealed; None when that was not done with this key and ``associated``, or has been changed since."""
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

    view = memoryview(sealed)
    if len(view) < SEAL_BYTES:
        return None
    try:
        return AESGCM(key).decrypt(bytes(view[:NONCE_BYTES]), view[NONCE_BYTES:], associated)
    except InvalidTag:
        return None


def scrambler(key: bytes) -> Callable[[Buffer], bytes]:
    """A function that sends each 16 bytes through AES-256. Safe from several threads."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # noqa: PLC0415

    cipher = Cipher(algorithms.AES(key), modes.ECB())  # a permutation is wanted; nothing is hidden by it
    return lambda data: cipher.encryptor().update(data)


def passphrase_key(passphrase: bytes, salt: bytes, cost: Argon2Cost) -> bytes:
    """:raise ValueError: when the cost is out of range."""
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id  # noqa: PLC0415

    return Argon2id(
        salt=salt, length=KEY_BYTES, iterations=cost.iterations, lanes=cost.lanes, memory_cost=cost.memory_kib
    ).derive(passphrase)
