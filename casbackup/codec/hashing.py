"""Ids and checksums; the only module that knows how they are computed.

An id is the BLAKE3 of the plain bytes keyed by the blob's kind, so that a chunk whose content happens (or is made)
to look like a tree node never has that node's id. The keys are derived from a public sentence: in a plain
repository everybody may compute ids.
"""

from __future__ import annotations

from blake3 import blake3

from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.spec.record import CHECKED_BYTES, CHECKSUM_BYTES, BlobKind

_PUBLIC = b"casbackup plain repository"


def _derive(context: str) -> bytes:
    return blake3(_PUBLIC, derive_key_context=context).digest()


CHUNK_KEY = _derive("casbackup 2026-11-22 chunk id")
NODE_KEY = _derive("casbackup 2026-11-22 tree node id")
CONFIG_KEY = _derive("casbackup 2026-11-22 config id")

_KEYS: dict[int, bytes] = {BlobKind.CHUNK: CHUNK_KEY, BlobKind.NODE: NODE_KEY, BlobKind.CONFIG: CONFIG_KEY}


def blob_id(kind: int, plain: Buffer) -> BlobId:
    """The id of a blob of ``kind`` with these plain bytes."""
    return BlobId(blake3(plain, key=_KEYS[kind]).digest())


def record_checksum(checked: Buffer, payload: Buffer) -> bytes:
    """BLAKE3-128 of a record's first 48 header bytes and its payload."""
    return blake3(b"".join((checked[:CHECKED_BYTES], payload))).digest(length=CHECKSUM_BYTES)


def checksum128(data: Buffer) -> bytes:
    return blake3(data).digest(length=CHECKSUM_BYTES)
