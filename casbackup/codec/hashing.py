"""Ids and checksums; the only module that knows how they are computed.

An id is the BLAKE3 of the plain bytes keyed by the blob's kind, so that a chunk whose content happens (or is made)
to look like a tree node never has that node's id. The keys are derived from a secret: in an encrypted repository,
whoever lacks it cannot tell what a chunk is by guessing; in a plain one it is a public sentence, and everybody may
compute ids.
"""

from __future__ import annotations

from typing import NamedTuple

from blake3 import blake3

from casbackup.codec.crypto import derived_key
from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.spec.record import CHECKED_BYTES, CHECKSUM_BYTES, BlobKind

_PUBLIC = b"casbackup plain repository"


class IdKeys(NamedTuple):
    """32 bytes for each kind of blob."""

    chunk: bytes
    node: bytes
    config: bytes

    def of(self, kind: int) -> bytes:
        return self[kind - BlobKind.CHUNK]

    def id(self, kind: int, plain: Buffer) -> BlobId:
        """The id of a blob of ``kind`` with these plain bytes."""
        return BlobId(blake3(plain, key=self.of(kind)).digest())


def id_keys(secret: bytes) -> IdKeys:
    return IdKeys(
        derived_key(secret, "casbackup 2026-11-22 chunk id"),
        derived_key(secret, "casbackup 2026-11-22 tree node id"),
        derived_key(secret, "casbackup 2026-11-22 config id"),
    )


PUBLIC_KEYS = id_keys(_PUBLIC)


def record_checksum(checked: Buffer, payload: Buffer) -> bytes:
    """BLAKE3-128 of a record's first 48 header bytes and its payload."""
    return blake3(b"".join((checked[:CHECKED_BYTES], payload))).digest(length=CHECKSUM_BYTES)


def checksum128(data: Buffer) -> bytes:
    return blake3(data).digest(length=CHECKSUM_BYTES)
