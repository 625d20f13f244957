"""The byte layout of qcow2 images (QEMU's docs/interop/qcow2.txt), as far as casbackup reads and writes it.

Header, big-endian (``docs/spec/qcow2.md``):

    off len field
      0   4 magic                 QFI\\xfb
      4   4 version               2 or 3
      8   8 backing_offset        of the name of a backing file; 0: none
     16   4 backing_length
     20   4 cluster_bits          9 to 21
     24   8 size_bytes            of the disk
     32   4 crypt_method          0: none
     36   4 l1_entries
     40   8 l1_offset
     48   8 refcount_offset       of the refcount table
     56   4 refcount_clusters
     60   4 snapshots
     64   8 snapshots_offset
     72   8 incompatible          version 3: feature bits, all of which a reader must know
     80   8 compatible
     88   8 autoclear
     96   4 refcount_order
    100   4 header_length
    104   1 compression           0 zlib, 1 zstd
    105   7 padding
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from enum import IntFlag
from struct import Struct
from typing import NamedTuple

from casbackup.formats.single import SECTOR_BYTES
from casbackup.fs import Buffer

MAGIC = b"QFI\xfb"
HEADER = Struct(">4sIQIIQIIQQIIQQQQIIB7x")
HEADER_BYTES = HEADER.size
V2_HEADER_BYTES = 72
V3_HEADER_BYTES = 104
"""Of version 3 without the byte for the kind of compression."""

ENTRY_BYTES = 8
COPIED = 1 << 63
"""Of an entry: the refcount is exactly 1."""
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
RESERVED_L1 = ~(COPIED | OFFSET_MASK) & (2**64 - 1)
RESERVED_L2 = RESERVED_L1 & ~ZERO

ZLIB, ZSTD = 0, 1


class Incompatible(IntFlag):
    DIRTY = 1
    CORRUPT = 2
    EXTERNAL_DATA = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Header(NamedTuple):
    """Its fields in the order of the bytes, without the magic."""

    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size_bytes: int
    crypt_method: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_length: int
    compression: int


class CompressedEntry(NamedTuple):
    """Where a compressed cluster begins, and how many bytes up to the end of its last sector."""

    offset: int
    length: int


def encode_header(header: Header) -> bytes:
    """Followed by the empty header extension that ends their list."""
    return HEADER.pack(MAGIC, *header) + bytes(8)


def parse_header(data: bytes) -> Header | None:
    """None when the magic is wrong. ``data``: the beginning of the file. Fields that version 2 lacks are 0."""
    if data[:4] != MAGIC or len(data) < V2_HEADER_BYTES:
        return None
    version = int.from_bytes(data[4:8], "big")
    known = data[:HEADER_BYTES]
    if version < 3:
        known = data[:V2_HEADER_BYTES]
    elif int.from_bytes(data[100:104], "big") < HEADER_BYTES:
        known = data[:V3_HEADER_BYTES]
    return Header(*HEADER.unpack(known.ljust(HEADER_BYTES, b"\0"))[1:])


def encode_compressed(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of ``length`` compressed bytes at ``offset``."""
    shift = _sector_shift(cluster_bits)
    more_sectors = (offset + length - 1) // SECTOR_BYTES - offset // SECTOR_BYTES
    return COMPRESSED | more_sectors << shift | offset


def parse_compressed(entry: int, cluster_bits: int) -> CompressedEntry:
    shift = _sector_shift(cluster_bits)
    offset = entry & ((1 << shift) - 1)
    more_sectors = (entry & (COMPRESSED - 1)) >> shift
    return CompressedEntry(offset, (more_sectors + 1) * SECTOR_BYTES - offset % SECTOR_BYTES)


def to_bytes(entries: array[int]) -> bytes:
    """A table as it stands in the file."""
    return _swapped(array(entries.typecode, entries)).tobytes()


def from_bytes(table: Buffer) -> array[int]:
    entries = array("Q")
    entries.frombytes(table)
    return _swapped(entries)


def _swapped(entries: array[int]) -> array[int]:
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def clusters_for(size_bytes: int, cluster_bytes: int) -> int:
    return -(-size_bytes // cluster_bytes)


def _sector_shift(cluster_bits: int) -> int:
    return 62 - (cluster_bits - 8)


def empty_table(entries: int) -> array[int]:
    return array("Q", bytes(ENTRY_BYTES * entries))


def padded_table(entries: Iterable[int], cluster_bytes: int, typecode: str = "Q") -> bytes:
    """A table in the file, filled up to whole clusters."""
    data = _swapped(array(typecode, entries)).tobytes()
    return data + bytes(-len(data) % cluster_bytes)
