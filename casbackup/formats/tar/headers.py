"""Headers of tar members: ustar blocks and PAX records (POSIX.1-2008, ``pax``; GNU tar manual, "Tar Internals")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from struct import Struct
from typing import NamedTuple

BLOCK_BYTES = 512
RECORD_BYTES = 20 * BLOCK_BYTES
"""An archive is filled up to a multiple of this, as tapes want it."""

REGULAR = b"0"
SPARSE = b"S"
"""GNU tar's older sparse member, whose map is in the header."""
PAX = b"x"
PAX_GLOBAL = b"g"
GNU_LONG_NAME = b"L"
GNU_LONG_LINK = b"K"

_LAYOUT = Struct("<100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x")
_CHECKSUM_AT = 148
_MAX_OCTAL = 8**11 - 1
_MODE = b"0000644\0"
_NUMBER_8 = b"0000000\0"


class Header(NamedTuple):
    """A header block. ``size_bytes`` is what follows it in the archive, before any PAX record corrects it."""

    name: bytes
    size_bytes: int
    kind: bytes
    block: bytes


class InvalidHeader(ValueError):
    """A block is not a header."""


def is_header(beginning: bytes) -> bool:
    """Whether the first block is a member's header, of ustar or GNU tar."""
    block = beginning[:BLOCK_BYTES]
    return len(block) == BLOCK_BYTES and block[257:262] == b"ustar" and _checksum_holds(block)


def parse_header(block: bytes) -> Header:
    """:raise InvalidHeader: when the checksum fails or a number is none."""
    if not _checksum_holds(block):
        raise InvalidHeader("no header, its checksum is wrong")
    name, _, _, _, size, _, _, kind, _, magic, _, _, _, _, prefix = _LAYOUT.unpack(block)
    name = name.split(b"\0", 1)[0]
    if magic == b"ustar\x0000" and prefix[0]:
        name = prefix.split(b"\0", 1)[0] + b"/" + name
    return Header(name, parse_number(size), REGULAR if kind in b"\0007" else kind, block)


def parse_number(field: bytes) -> int:
    """Octal digits, or big-endian binary behind a first byte of 0x80 as GNU tar writes large numbers.

    :raise InvalidHeader: when it is neither, or negative.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise InvalidHeader(f"no number: {field!r}")
    return int(digits or b"0", 8)


def encode_member(name: str, size_bytes: int, time_s: int, records: Mapping[str, str]) -> bytes:
    """All header blocks of a regular file of which ``size_bytes`` follow in the archive."""
    records = dict(records)
    if not _fits(name):
        records["path"] = name
    if size_bytes > _MAX_OCTAL:
        records["size"] = str(size_bytes)
    short_name = name.encode("ascii", "replace")[-100:]
    header = _encode_block(short_name, 0 if "size" in records else size_bytes, REGULAR, time_s)
    if not records:
        return header
    body = b"".join(_encode_record(key, value) for key, value in records.items())
    return _encode_block(b"PaxHeaders/" + short_name[-80:], len(body), PAX, time_s) + padded(body) + header


def parse_records(body: bytes) -> Iterator[tuple[str, bytes]]:
    """The records of a PAX header, in order; keys may repeat.

    :raise InvalidHeader: when they contradict themselves.
    """
    position = 0
    while position < len(body):
        blank = body.find(b" ", position, position + 20)
        digits = body[position:blank]
        if blank < 0 or not digits.isdigit():
            raise InvalidHeader("a PAX record without a length")
        end = position + int(digits)
        key, equals, value = body[blank + 1 : end - 1].partition(b"=")
        if end > len(body) or end <= blank + 1 or not equals or body[end - 1 : end] != b"\n":
            raise InvalidHeader("a PAX record with a wrong length")
        yield key.decode("utf-8", "surrogateescape"), value
        position = end


def parse_decimal(digits: bytes) -> int:
    """:raise InvalidHeader: unless it is a number of at most 19 decimal digits."""
    if not digits.isdigit() or len(digits) > 19:
        raise InvalidHeader(f"no number: {digits[:40]!r}")
    return int(digits)


def padding(size_bytes: int) -> int:
    """How many bytes follow ``size_bytes`` up to the next block."""
    return -size_bytes % BLOCK_BYTES


def padded(data: bytes) -> bytes:
    return data + bytes(padding(len(data)))


def _fits(name: str) -> bool:
    return name.isascii() and len(name) <= 100


def _encode_block(name: bytes, size_bytes: int, kind: bytes, time_s: int) -> bytes:
    size = b"%011o\0" % size_bytes
    time = b"%011o\0" % min(max(time_s, 0), _MAX_OCTAL)
    block = _LAYOUT.pack(
        name,
        _MODE,
        _NUMBER_8,
        _NUMBER_8,
        size,
        time,
        b" " * 8,
        kind,
        b"",
        b"ustar\x0000",
        b"",
        b"",
        _NUMBER_8,
        _NUMBER_8,
        b"",
    )
    return block[:_CHECKSUM_AT] + b"%06o\0 " % sum(block) + block[_CHECKSUM_AT + 8 :]


def _encode_record(key: str, value: str) -> bytes:
    """``LENGTH KEY=VALUE`` and a line feed, where the length counts its own digits."""
    rest = b" %s=%s\n" % (key.encode(), value.encode("utf-8", "surrogateescape"))
    length = len(rest) + 1
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def _checksum_holds(block: bytes) -> bool:
    """Of the bytes as unsigned numbers, or signed ones as some old systems summed them."""
    try:
        expected = parse_number(block[_CHECKSUM_AT : _CHECKSUM_AT + 8])
    except InvalidHeader:
        return False
    counted = block[:_CHECKSUM_AT] + b" " * 8 + block[_CHECKSUM_AT + 8 :]
    unsigned = sum(counted)
    return expected in (unsigned, unsigned - 256 * sum(byte > 127 for byte in counted))
