"""Outlines: what the index keeps of each tree node so that accounting opens no pack. A cache: rebuilt from the nodes.

Database ``outlines``: key = node id, value, little-endian:

    leaf:  0 1 type = 1 | 1 4 bytes of the node's record | then 16 bytes for each distinct chunk:
           0 8 first bytes of its id | 8 4 bytes of its record | 12 4 plain bytes
    inner: 0 1 type = 2 | 1 4 bytes of the node's record | then the distinct non-zero child ids, 32 bytes each
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from casbackup.ids import ID_BYTES, ZERO_ID, BlobId
from casbackup.spec.node import INNER, LEAF, Inner

HEADER_BYTES = 5
CHUNK_BYTES = 16

_HEADER = Struct("<BI")
_CHUNK = Struct("<8sII")


def distinct_children(node: Inner) -> list[BlobId]:
    return [child for child in dict.fromkeys(node.children) if child != ZERO_ID]


def encode_inner_outline(record_bytes: int, children: Iterable[BlobId]) -> bytes:
    return _HEADER.pack(INNER, record_bytes) + b"".join(children)


def encode_leaf_outline(record_bytes: int, chunks: Iterable[tuple[BlobId, int, int]]) -> bytes:
    """``chunks`` are (id, bytes of its record, plain bytes), distinct."""
    return _HEADER.pack(LEAF, record_bytes) + b"".join(
        [_CHUNK.pack(chunk[:8], stored, plain) for chunk, stored, plain in chunks]
    )


def decode_head(outline: bytes) -> tuple[int, int]:
    """Type (LEAF or INNER) and bytes of the node's record."""
    kind, record_bytes = _HEADER.unpack_from(outline)
    return kind, record_bytes


def decode_children(outline: bytes) -> list[BlobId]:
    """The children in an inner node's outline."""
    return [BlobId(outline[i : i + ID_BYTES]) for i in range(HEADER_BYTES, len(outline), ID_BYTES)]
