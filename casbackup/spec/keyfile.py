"""Key files: a master key, wrapped in one or more ways; ``docs/spec/key-file.md``. JSON, for people to look at.

A wrapping is a way to the key. Each is complete in itself, so that one can be added or taken away without the others.
Nothing in a file vouches for it as a whole: whoever unwraps the key compares its fingerprint with the file's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from casbackup.errors import KeyFileDamaged
from casbackup.limits import (
    MAX_ARGON2_ITERATIONS,
    MAX_ARGON2_LANES,
    MAX_ARGON2_MEMORY_KIB,
    MAX_KEY_COMMENT_CHARACTERS,
    MAX_KEY_FILE_BYTES,
    MAX_KEY_WRAPPINGS,
)

VERSION = 1
SALT_BYTES = 16
SEALED_BYTES = 12 + 32 + 16
"""Nonce, key and tag."""

_FINGERPRINT = re.compile("[0-9a-f]{32}")
_KDF = "argon2id"
_MAX_AGE_BYTES = 16 * 1024
_MAX_RECIPIENT = 8 * 1024
_MAX_TEXT = 1024


@dataclass(frozen=True, slots=True)
class PassphraseWrapping:
    """The key, sealed under what Argon2id makes of a passphrase. ``memory_kib`` is in KiB."""

    salt: bytes
    iterations: int
    memory_kib: int
    lanes: int
    sealed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """:raise ValueError: when the cost is more than may be asked of whoever opens the file, or none at all."""
        if len(self.salt) != SALT_BYTES or len(self.sealed) != SEALED_BYTES:
            raise ValueError("the salt or the sealed key has a wrong length")
        if not 1 <= self.iterations <= MAX_ARGON2_ITERATIONS or not 1 <= self.lanes <= MAX_ARGON2_LANES:
            raise ValueError("the cost of Argon2id is out of range")
        if not 8 * self.lanes <= self.memory_kib <= MAX_ARGON2_MEMORY_KIB:
            raise ValueError("the memory of Argon2id is out of range")


@dataclass(frozen=True, slots=True)
class AgeWrapping:
    """The key as text, encrypted for one recipient: an armoured file that the program ``age`` decrypts."""

    recipient: str
    file: str = field(repr=False)

    def __post_init__(self) -> None:
        """:raise ValueError: when it is too long, or the recipient is not one line."""
        if not self.recipient.isprintable() or not 0 < len(self.recipient) <= _MAX_RECIPIENT:
            raise ValueError("an age recipient is no line of text")
        if not 0 < len(self.file) <= _MAX_AGE_BYTES:
            raise ValueError("an age file has a wrong size")


@dataclass(frozen=True, slots=True)
class PlainWrapping:
    """The key as text, protected by nothing but the file's mode."""

    text: str = field(repr=False)

    def __post_init__(self) -> None:
        """:raise ValueError: when it is too long."""
        if not 0 < len(self.text) <= _MAX_TEXT:
            raise ValueError("a plain key has a wrong size")


Wrapping = PassphraseWrapping | AgeWrapping | PlainWrapping


@dataclass(frozen=True, slots=True)
class KeyFile:
    """The whole of a key file. ``comment`` is for people."""

    fingerprint: str
    created: str
    comment: str
    wrappings: tuple[Wrapping, ...]

    def __post_init__(self) -> None:
        """:raise ValueError: when the fingerprint is none, or there are no wrappings, or too many of them."""
        if not is_fingerprint(self.fingerprint):
            raise ValueError(f"{self.fingerprint!r} is no fingerprint: it has 32 hexadecimal digits")
        if not 1 <= len(self.wrappings) <= MAX_KEY_WRAPPINGS:
            raise ValueError(f"a key is wrapped in 1 to {MAX_KEY_WRAPPINGS} ways, not in {len(self.wrappings)}")
        for text in (self.created, self.comment):
            if len(text) > MAX_KEY_COMMENT_CHARACTERS or not (text.isprintable() or not text):
                raise ValueError(f"a comment has one line and at most {MAX_KEY_COMMENT_CHARACTERS} characters")

    @property
    def is_plain(self) -> bool:
        """Does somebody who can read the file have the key?"""
        return any(isinstance(wrapping, PlainWrapping) for wrapping in self.wrappings)

    @property
    def recipients(self) -> tuple[str, ...]:
        return tuple(wrapping.recipient for wrapping in self.wrappings if isinstance(wrapping, AgeWrapping))


def is_fingerprint(text: str) -> bool:
    return _FINGERPRINT.fullmatch(text) is not None


def sealing_context(fingerprint: str) -> bytes:
    """What a key sealed under a passphrase is bound to."""
    return b"casbackup key file 1 " + fingerprint.encode("ascii")


def encode_key_file(key_file: KeyFile) -> bytes:
    content = {
        "casbackup": "key",
        "version": VERSION,
        "fingerprint": key_file.fingerprint,
        "created": key_file.created,
        "comment": key_file.comment,
        "wrappings": [_to_map(wrapping) for wrapping in key_file.wrappings],
    }
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def decode_key_file(data: bytes, origin: str) -> KeyFile:
    """Parse and check; ``origin`` names the file in errors. No error quotes what the file holds.

    :raise KeyFileDamaged: when it is not understood, or a newer casbackup wrote it.
    """
    if not data.strip():
        raise KeyFileDamaged(f"{origin} is empty")
    if len(data) > MAX_KEY_FILE_BYTES:
        raise KeyFileDamaged(f"{origin} is too long for a key file")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise KeyFileDamaged(f"{origin} is no key file, or cut off") from None
    if not isinstance(content, dict) or content.get("casbackup") != "key":
        raise KeyFileDamaged(f"{origin} is no key file")
    if content.get("version") != VERSION:
        raise KeyFileDamaged(f"{origin} is a key file of a version that this casbackup does not know")
    try:
        return _from_map(content)
    except (TypeError, KeyError) as error:
        raise KeyFileDamaged(f"{origin} is not understood: {type(error).__name__}") from None
    except ValueError as error:
        raise KeyFileDamaged(f"{origin} is not understood: {error}") from None


def _to_map(wrapping: Wrapping) -> dict[str, object]:
    match wrapping:
        case PassphraseWrapping():
            return {
                "kind": "passphrase",
                "kdf": _KDF,
                "salt": wrapping.salt.hex(),
                "iterations": wrapping.iterations,
                "memory_kib": wrapping.memory_kib,
                "lanes": wrapping.lanes,
                "sealed": wrapping.sealed.hex(),
            }
        case AgeWrapping():
            return {"kind": "age", "recipient": wrapping.recipient, "file": wrapping.file}
        case PlainWrapping():
            return {"kind": "plain", "key": wrapping.text}


def _from_map(content: Mapping[str, Any]) -> KeyFile:
    """:raise TypeError, KeyError, ValueError: when something is not what it should be."""
    wrappings = content["wrappings"]
    if not isinstance(wrappings, list):
        raise TypeError
    return KeyFile(
        _typed(content, "fingerprint", str),
        _typed(content, "created", str),
        _typed(content, "comment", str),
        tuple(_wrapping(item) for item in wrappings),
    )


def _wrapping(content: Mapping[str, Any]) -> Wrapping:
    kind = _typed(content, "kind", str)
    if kind == "passphrase" and content["kdf"] == _KDF:
        return PassphraseWrapping(
            _hex(content, "salt"),
            _typed(content, "iterations", int),
            _typed(content, "memory_kib", int),
            _typed(content, "lanes", int),
            _hex(content, "sealed"),
        )
    if kind == "age":
        return AgeWrapping(_typed(content, "recipient", str), _typed(content, "file", str))
    if kind == "plain":
        return PlainWrapping(_typed(content, "key", str))
    raise ValueError("a wrapping is of an unknown kind")


def _typed(content: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    value = content[key]
    if type(value) is not kind:
        raise TypeError
    return value


def _hex(content: Mapping[str, Any], key: str) -> bytes:
    """:raise ValueError: without what it holds."""
    try:
        return bytes.fromhex(_typed(content, key, str))
    except ValueError:
        raise ValueError(f"{key} is not hexadecimal") from None
