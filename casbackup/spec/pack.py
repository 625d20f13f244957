"""Pack files: a header, records back to back, and - once sealed - a footer that lists them.

Pack header, 64 bytes, little-endian (``docs/spec/pack.md``):

    off len field
      0   8 magic
      8   2 version         1
     10   6 reserved        zero
     16  16 pack id         the file's name
     32  16 session id      who wrote it
     48  16 checksum        BLAKE3-128 of bytes 0..47

Footer: one 48-byte entry a record in file order, then the 64-byte trailer, which ends the file:

    entry: 0 4 offset | 4 4 stored_length | 8 4 plain_length | 12 1 kind | 13 1 flags | 14 2 zero | 16 32 id
    trailer: 0 8 magic | 8 4 count | 12 4 zero | 16 8 footer offset | 24 16 pack id | 40 8 zero
             48 16 checksum: BLAKE3-128 of all entries and trailer bytes 0..47
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import Struct
from typing import NamedTuple

from casbackup.fs import Buffer
from casbackup.ids import BlobId, PackId, SessionId
from casbackup.spec.magic import PACK_HEADER, PACK_TRAILER

HEADER_BYTES = 64
ENTRY_BYTES = 48
TRAILER_BYTES = 64
VERSION = 1
CHECKED_BYTES = 48

_HEADER = Struct("<8sH6x16s16s")
_ENTRY = Struct("<IIIBBH32s")
_TRAILER = Struct("<8sI4xQ16s8x")


class PackEntry(NamedTuple):
    """Where a record lies in its pack. ``offset`` is that of the record's header."""

    offset: int
    stored_length: int
    plain_length: int
    kind: int
    flags: int
    id: BlobId


class PackHeader(NamedTuple):
    pack: PackId
    session: SessionId


class PackTrailer(NamedTuple):
    records: int
    footer_offset: int
    pack: PackId


def pack_header(pack: PackId, session: SessionId) -> bytes:
    """The first 48 bytes; the checksum follows."""
    return _HEADER.pack(PACK_HEADER, VERSION, bytes.fromhex(pack), bytes.fromhex(session))


def parse_header(data: Buffer) -> PackHeader | None:
    """The header of a pack, or None when the bytes are not one."""
    if len(data) < HEADER_BYTES:
        return None
    magic, version, pack, session = _HEADER.unpack_from(data)
    if magic != PACK_HEADER or version != VERSION:
        return None
    return PackHeader(PackId(pack.hex()), SessionId(session.hex()))


def pack_entries(entries: Iterable[PackEntry]) -> bytes:
    return b"".join(_ENTRY.pack(e.offset, e.stored_length, e.plain_length, e.kind, e.flags, 0, e.id) for e in entries)


def parse_entries(data: Buffer) -> Iterator[PackEntry]:
    for offset, stored, plain, kind, flags, _, blob_id in _ENTRY.iter_unpack(data):
        yield PackEntry(offset, stored, plain, kind, flags, BlobId(blob_id))


def pack_trailer(trailer: PackTrailer) -> bytes:
    """The first 48 bytes; the checksum follows."""
    return _TRAILER.pack(PACK_TRAILER, trailer.records, trailer.footer_offset, bytes.fromhex(trailer.pack))


def parse_trailer(data: Buffer) -> PackTrailer | None:
    """The trailer, or None when the 64 bytes are not one."""
    if len(data) < TRAILER_BYTES:
        return None
    magic, records, footer_offset, pack = _TRAILER.unpack_from(data)
    return PackTrailer(records, footer_offset, PackId(pack.hex())) if magic == PACK_TRAILER else None
