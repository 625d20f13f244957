"""A record: one blob behind a self-describing header. The same bytes lie in packs and go over the wire.

Header, 64 bytes, little-endian (``docs/spec/pack.md``):

    off len field
      0   4 magic
      4   1 kind            1 chunk, 2 tree node, 3 config
      5   1 flags           bit 0: the blob is a zstd frame; bit 1: what is stored is sealed
      6   2 reserved        zero
      8   4 stored_length   bytes of the payload that follows
     12   4 plain_length    bytes of the blob once decoded
     16  32 id              keyed BLAKE3 of the plain bytes
     48  16 checksum        BLAKE3-128 of header bytes 0..47 and the payload
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.spec.magic import RECORD

HEADER_BYTES = 64
CHECKED_BYTES = 48
ID_AT = 16
"""Where the id stands in the header."""
CHECKSUM_BYTES = 16
FLAG_ZSTD = 0x01
FLAG_SEALED = 0x02
KNOWN_FLAGS = FLAG_ZSTD | FLAG_SEALED

_CHECKED = Struct("<4sBBHII32s")


class BlobKind(IntEnum):
    CHUNK = 1
    NODE = 2
    CONFIG = 3


class Record(NamedTuple):
    """One blob as stored. ``header`` is 64 bytes; ``payload`` is ``stored_length`` bytes."""

    id: BlobId
    kind: int
    flags: int
    plain_length: int
    header: bytes
    payload: Buffer

    @property
    def total_bytes(self) -> int:
        return HEADER_BYTES + len(self.payload)


class RecordHeader(NamedTuple):
    """The parsed header. ``checksum`` is not verified by parsing."""

    kind: int
    flags: int
    stored_length: int
    plain_length: int
    id: BlobId
    checksum: bytes


def pack_checked(kind: int, flags: int, stored_length: int, plain_length: int, blob_id: BlobId) -> bytes:
    """The first 48 bytes of a header: what the checksum covers besides the payload."""
    return _CHECKED.pack(RECORD, kind, flags, 0, stored_length, plain_length, blob_id)


def parse_header(header: Buffer) -> RecordHeader | None:
    """The header, or None when the 64 bytes are not one (wrong magic, unknown kind or flag)."""
    magic, kind, flags, reserved, stored, plain, blob_id = _CHECKED.unpack_from(header)
    if magic != RECORD or kind not in (1, 2, 3) or flags & ~KNOWN_FLAGS or reserved:
        return None
    return RecordHeader(kind, flags, stored, plain, BlobId(blob_id), bytes(header[48:64]))
