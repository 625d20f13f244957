"""Nodes of the disk tree (``docs/spec/tree.md``). All integers little-endian.

    leaf:  0 1 type = 1 | 1 1 version = 1 | 2 2 count | 4 4 span: bytes of the disk that the leaf covers
           then ``count`` extents of 40 bytes: 0 4 length | 4 4 skip | 8 32 chunk id (zeros: a zero extent)
    inner: 0 1 type = 2 | 1 1 version = 1 | 2 2 count | 4 4 level, 1 for the parents of leaves
           then ``count`` child ids of 32 bytes (zeros: everything below is zero); trailing zero children are left out

A node has one form only: zero extents are merged and have skip 0, neighbouring slices that continue each other are
merged, an all-zero node is not stored at all but named by the zero id. Equal content cut the same way gives the
same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from casbackup.errors import NodeInvalid
from casbackup.fs import Buffer
from casbackup.ids import ID_BYTES, ZERO_ID, BlobId
from casbackup.limits import FANOUT, MAX_BLOB_BYTES, MAX_LEVEL, SEGMENT_BYTES

LEAF = 1
INNER = 2
VERSION = 1
NODE_HEADER_BYTES = 8
EXTENT_BYTES = 40
MAX_EXTENTS = SEGMENT_BYTES // 512
"""Extents of a leaf at the most: one per 512-byte sector."""

_HEADER = Struct("<BBHI")
_EXTENT = Struct("<II32s")
_ZERO = bytes(ID_BYTES)


class Extent(NamedTuple):
    """``length`` bytes of a disk: from byte ``skip`` of chunk ``id``, or zeros when ``id`` is the zero id."""

    length: int
    skip: int
    id: BlobId

    @property
    def is_zero(self) -> bool:
        return self.id == _ZERO


class Leaf(NamedTuple):
    span: int
    extents: list[Extent]


class Inner(NamedTuple):
    level: int
    children: list[BlobId]


def zero_extent(length: int) -> Extent:
    return Extent(length, 0, ZERO_ID)


def encode_leaf(extents: Sequence[Extent]) -> bytes:
    """The bytes of a leaf of normalised, not all-zero ``extents``."""
    span = sum(e.length for e in extents)
    body = b"".join([_EXTENT.pack(*e) for e in extents])
    return _HEADER.pack(LEAF, VERSION, len(extents), span) + body


def encode_inner(level: int, children: Sequence[BlobId]) -> bytes:
    """The bytes of an inner node; ``children`` must not end with the zero id."""
    return _HEADER.pack(INNER, VERSION, len(children), level) + b"".join(children)


def decode_node(data: Buffer) -> Leaf | Inner:
    """Parse and check a node.

    :raise NodeInvalid: when the bytes break any rule of the format.
    """
    if len(data) < NODE_HEADER_BYTES:
        raise NodeInvalid(f"a tree node of {len(data)} bytes is too short")
    kind, version, count, number = _HEADER.unpack_from(data)
    if version != VERSION or kind not in (LEAF, INNER):
        raise NodeInvalid(f"a tree node of type {kind}, version {version} is unknown")
    body = memoryview(data)[NODE_HEADER_BYTES:]
    return _decode_leaf(body, count, number) if kind == LEAF else _decode_inner(body, count, number)


def _decode_leaf(body: memoryview, count: int, span: int) -> Leaf:
    if len(body) != count * EXTENT_BYTES or not 0 < count <= MAX_EXTENTS:
        raise NodeInvalid(f"a leaf of {count} extents has {len(body)} bytes of them")
    extents = [Extent(*fields) for fields in _EXTENT.iter_unpack(body)]
    if sum(e.length for e in extents) != span or not 0 < span <= SEGMENT_BYTES:
        raise NodeInvalid("the extents of a leaf do not add up to its span")
    previous_zero = False
    continuing = b"", 0
    for extent in extents:
        zero = extent.id == _ZERO
        if (extent.id, extent.skip) == continuing:
            raise NodeInvalid("a leaf holds a slice that continues the one before")
        too_long = extent.skip + extent.length > MAX_BLOB_BYTES
        if extent.length == 0 or too_long or (zero and (previous_zero or extent.skip)):
            raise NodeInvalid("a leaf holds an impossible extent")
        previous_zero = zero
        continuing = extent.id, extent.skip + extent.length
    if previous_zero and count == 1:
        raise NodeInvalid("an all-zero leaf is not stored")
    return Leaf(span, extents)


def _decode_inner(body: memoryview, count: int, level: int) -> Inner:
    if len(body) != count * ID_BYTES or not 0 < count <= FANOUT or not 1 <= level <= MAX_LEVEL:
        raise NodeInvalid(f"an inner node of level {level} with {count} children has {len(body)} bytes of them")
    raw = bytes(body)
    children = [BlobId(raw[i : i + ID_BYTES]) for i in range(0, len(raw), ID_BYTES)]
    if children[-1] == _ZERO:
        raise NodeInvalid("an inner node ends with a zero child")
    return Inner(level, children)
