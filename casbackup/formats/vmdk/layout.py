"""The byte layout of stream-optimised VMDK extents (VMware, "Virtual Disk Format 1.1").

Header, one sector, little-endian (``docs/spec/vmdk.md``):

    off len field
      0   4 magic                 KDMV
      4   4 version               3; older writers: 1 or 2
      8   4 flags
     12   8 capacity              of the disk; this and all that follows in sectors of 512 bytes
     20   8 grain_sectors         128: 64 KiB
     28   8 descriptor_at
     36   8 descriptor_sectors
     44   4 table_entries         grains of a grain table: 512
     48   8 spare_directory_at    of the redundant grain directory
     56   8 directory_at          all ones: at the end, the footer knows
     64   8 overhead              where the first grain may begin
     72   1 unclean
     73   4 line_ends             "\\n \\r\\n": damaged by a transfer as text or not
     77   2 compression           1: deflate
     79 433 padding

Marker, in front of each grain and of each table:

    off len field
      0   8 value                 of a grain: its first sector on the disk; of a table: how many sectors follow
      8   4 size_bytes            of the compressed grain, which follows at once; 0: a table
     12   4 kind                  of a table, which follows in the next sector
"""

from __future__ import annotations

import sys
from array import array
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

from casbackup.formats.single import SECTOR_BYTES
from casbackup.fs import Buffer

MAGIC = b"KDMV"
LINE_ENDS = b"\n \r\n"
HEADER = Struct("<4sIIQQQQIQQQB4sH433x")
MARKER = Struct("<QII")
GRAIN_MARKER = Struct("<QI")

DIRECTORY_AT_END = 2**64 - 1
DEFLATE = 1
ENTRY_BYTES = 4


class Flag(IntFlag):
    LINE_ENDS = 1
    SPARE_DIRECTORY = 2
    COMPRESSED = 1 << 16
    MARKERS = 1 << 17


class Kind(IntEnum):
    END_OF_STREAM = 0
    GRAIN_TABLE = 1
    GRAIN_DIRECTORY = 2
    FOOTER = 3


class Header(NamedTuple):
    """Its fields in the order of the bytes, without the magic."""

    version: int
    flags: int
    capacity: int
    grain_sectors: int
    descriptor_at: int
    descriptor_sectors: int
    table_entries: int
    spare_directory_at: int
    directory_at: int
    overhead: int
    unclean: int
    line_ends: bytes
    compression: int


class Marker(NamedTuple):
    """``kind`` is meaningful where ``size_bytes`` is 0."""

    value: int
    size_bytes: int
    kind: int


def encode_header(header: Header) -> bytes:
    return HEADER.pack(MAGIC, *header)


def parse_header(sector: bytes) -> Header | None:
    """None when the magic is wrong."""
    magic, *fields = HEADER.unpack(sector)
    return Header(*fields) if magic == MAGIC else None


def encode_marker(kind: Kind, sectors: int) -> bytes:
    """Of a table of so many sectors: one sector."""
    return MARKER.pack(sectors, 0, kind).ljust(SECTOR_BYTES, b"\0")


def parse_marker(sector: Buffer) -> Marker:
    return Marker(*MARKER.unpack_from(sector))


def encode_table(entries: array[int]) -> bytes:
    """Little-endian, in whole sectors."""
    data = _swapped(array("I", entries)).tobytes()
    return data + bytes(-len(data) % SECTOR_BYTES)


def parse_table(data: Buffer) -> array[int]:
    entries = array("I")
    entries.frombytes(data)
    return _swapped(entries)


def _swapped(entries: array[int]) -> array[int]:
    if sys.byteorder == "big":
        entries.byteswap()
    return entries
