"""A master key as text that is safe to type: groups of five characters, the last of which checks the group.

    -----BEGIN CASBACKUP KEY-----
    fingerprint 7e26 c9c2 ...
    0GQ4K 1ZX0B ...
    -----END CASBACKUP KEY-----

The alphabet has 32 characters and leaves out I, L, O and U; o is read as 0, i and l as 1. The 256 bits are 13 groups of
four, 20 bits each, most significant first, and four zero bits. A group's check character is a sum over GF(32) of its
four with different weights and of the group's number: so every wrong character, every two exchanged in a group, and
every two groups exchanged are noticed, and the error names the group.
"""

from __future__ import annotations

import re

from casbackup.codec.crypto import KEY_BYTES
from casbackup.codec.master_key import MasterKey
from casbackup.errors import KeyMistyped
from casbackup.spec.keyfile import is_fingerprint

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
GROUPS = 13
GROUP_CHARACTERS = 5
BEGIN = "-----BEGIN CASBACKUP KEY-----"
END = "-----END CASBACKUP KEY-----"

_BITS = 5
_POLYNOMIAL = 0b100101
"""x^5 + x^2 + 1, which makes GF(32)."""
_WEIGHTS = (2, 4, 8, 16)
_SPARE_BITS = GROUPS * (GROUP_CHARACTERS - 1) * _BITS - KEY_BYTES * 8
_MARKED = re.compile(r"BEGIN CASBACKUP KEY\W+(.*?)(\W*END CASBACKUP KEY|\Z)", re.IGNORECASE | re.DOTALL)
_FINGERPRINT_LINE = re.compile(r"^\W*fingerprint\b(.*)$", re.IGNORECASE | re.MULTILINE)
_SEPARATORS = re.compile(r"[\s:;,-]+")
_VALUES = {character: value for value, character in enumerate(ALPHABET)} | {"O": 0, "I": 1, "L": 1}
_VALUES |= {character.lower(): value for character, value in _VALUES.items()}
_READ_AS = str.maketrans("oil", "011")
_PER_LINE = 5
_LINE_END = "/"
"""Of lines in a QR code."""


def format_key(key: MasterKey) -> str:
    """The text, with its first and last line."""
    groups = key_groups(key)
    lines = [" ".join(groups[start : start + _PER_LINE]) for start in range(0, GROUPS, _PER_LINE)]
    return "\n".join([BEGIN, f"fingerprint {spaced(key.fingerprint)}", *lines, END]) + "\n"


def code_text(key: MasterKey) -> str:
    """The same for a QR code: in one line of the characters that need least room there."""
    lines = ["BEGIN CASBACKUP KEY", f"FINGERPRINT {key.fingerprint.upper()}", " ".join(key_groups(key))]
    return _LINE_END.join(lines)


def parse_key(text: str, origin: str) -> MasterKey:
    """What ``format_key`` or ``code_text`` made, also when it was typed anew: with anything around it, or without first
    and last line or fingerprint, in lower case, with other spacing.

    :raise KeyMistyped: when it was mistyped; the message says in which group, and quotes none.
    """
    body = _between(text)
    found = _FINGERPRINT_LINE.search(body)
    words = [word for word in _SEPARATORS.split(_FINGERPRINT_LINE.sub("", body)) if word]
    key = MasterKey(_secret(words, origin))
    if found is not None and _fingerprint(found[1], origin) != key.fingerprint:
        raise KeyMistyped(
            f"{origin} has the key {key.fingerprint}, but says that it has another fingerprint: one was mistyped"
        )
    return key


def key_groups(key: MasterKey) -> list[str]:
    number = int.from_bytes(key.reveal(), "big") << _SPARE_BITS
    values = [(number >> shift) & 31 for shift in range((GROUPS * 4 - 1) * _BITS, -1, -_BITS)]
    return [_group(index, values[index * 4 : index * 4 + 4]) for index in range(GROUPS)]


def spaced(fingerprint: str) -> str:
    """In groups of four, for people to compare."""
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))


def _between(text: str) -> str:
    marked = _MARKED.search(text)
    return (marked[1] if marked is not None else text).replace(_LINE_END, "\n")


def _fingerprint(text: str, origin: str) -> str:
    fingerprint = "".join(_SEPARATORS.split(text)).lower().translate(_READ_AS)
    if not is_fingerprint(fingerprint):
        raise KeyMistyped(f"the fingerprint in {origin} has not 32 hexadecimal digits")
    return fingerprint


def _secret(words: list[str], origin: str) -> bytes:
    values = [value for index, word in enumerate(words) for value in _checked(index, word, origin)]
    if len(words) != GROUPS:
        raise KeyMistyped(f"{origin} has {len(words)} groups of characters instead of {GROUPS}")
    number = 0
    for value in values:
        number = number << _BITS | value
    if number & ((1 << _SPARE_BITS) - 1):
        raise KeyMistyped(f"group {GROUPS} in {origin} is mistyped")
    return (number >> _SPARE_BITS).to_bytes(KEY_BYTES, "big")


def _checked(index: int, word: str, origin: str) -> list[int]:
    """The values of a group, without that of its check character."""
    place = f"group {index + 1} in {origin}"
    if index >= GROUPS:
        raise KeyMistyped(f"{place} is one too many: there are {GROUPS}")
    if len(word) != GROUP_CHARACTERS:
        raise KeyMistyped(f"{place} has {len(word)} characters instead of {GROUP_CHARACTERS}")
    values = [_VALUES.get(character, -1) for character in word]
    if -1 in values or values.pop() != _check_value(index, values):
        raise KeyMistyped(f"{place} is mistyped")
    return values


def _group(index: int, values: list[int]) -> str:
    return "".join(ALPHABET[value] for value in [*values, _check_value(index, values)])


def _check_value(index: int, values: list[int]) -> int:
    total = index + 1
    for weight, value in zip(_WEIGHTS, values, strict=True):
        total ^= _product(weight, value)
    return total


def _product(first: int, second: int) -> int:
    """In GF(32)."""
    total = 0
    while second:
        if second & 1:
            total ^= first
        first <<= 1
        if first & 32:
            first ^= _POLYNOMIAL
        second >>= 1
    return total
