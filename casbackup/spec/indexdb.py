"""Values of the LMDB index (``docs/spec/index.md``). Everything here but sessions can be rebuilt from packs and
manifests.

Database ``blobs``: key = 32-byte blob id, value = 32 bytes, little-endian:

    off len field
      0   4 pack            number of the pack in database ``packs``; 0: nowhere (a lost blob)
      4   4 offset          of the record's header in the pack
      8   4 stored_length   payload bytes
     12   4 plain_length
     16   4 session         number of the session that stored it
     20   4 verified_s      Unix time of the last full verification, 0: never
     24   4 dying_epoch     GC epoch in which it was marked as garbage, 0: alive
     28   1 kind
     29   1 flags           of the record
     30   1 state           bits, 0: sound
     31   1 reserved        zero

Database ``packs``: key = 4-byte big-endian number, value = msgpack ``[pack id, session number, sealed, bytes]``.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

import msgpack

from casbackup.ids import PackId

DATABASES = (b"blobs", b"packs", b"snapshots", b"sessions", b"outlines", b"meta")

BLOB_VALUE = Struct("<7I4B")
STATE_OFFSET = 30
EPOCH_OFFSET = 24
VERIFIED_OFFSET = 20
_TIME = Struct("<I")

STATE_DAMAGED = 0x01
"""The stored bytes fail their check, or are gone."""
STATE_SUSPECT = 0x02
"""A tree node with something damaged below it; sent again, it is checked again."""
STATE_TOLD_BY_KEY = 0x04
"""Besides ``STATE_DAMAGED``: found with the key of an encrypted repository, so a look without it changes nothing."""

NO_PACK = 0


class BlobEntry(NamedTuple):
    """The index entry of a blob."""

    pack: int
    offset: int
    stored_length: int
    plain_length: int
    session: int
    verified_s: int
    dying_epoch: int
    kind: int
    flags: int
    state: int
    reserved: int = 0

    @property
    def is_present(self) -> bool:
        """May a session be told that this blob is stored? Not if it is damaged, suspect or dying."""
        return self.state == 0 and self.dying_epoch == 0

    def encode(self) -> bytes:
        return BLOB_VALUE.pack(*self)


class PackRow(NamedTuple):
    """A pack known to the index."""

    pack: PackId
    session: int
    sealed: bool
    size_bytes: int

    def encode(self) -> bytes:
        data: bytes = msgpack.packb(list(self))
        return data


def verified_at(value: bytes | memoryview, now_s: int, *, with_key: bool = True) -> bytes:
    """A blob's value with the time of its verification, and no longer damaged; the rest as it is.

    ``with_key``: its content was verified, not only the checksum of something that is sealed.
    """
    cleared = STATE_DAMAGED | STATE_TOLD_BY_KEY
    if not with_key and value[STATE_OFFSET] & STATE_TOLD_BY_KEY:
        cleared = 0
    state = bytes((value[STATE_OFFSET] & ~cleared,))
    return b"".join(
        (value[:VERIFIED_OFFSET], _TIME.pack(now_s), value[EPOCH_OFFSET:STATE_OFFSET], state, value[STATE_OFFSET + 1 :])
    )


def decode_entry(value: bytes | memoryview) -> BlobEntry:
    return BlobEntry(*BLOB_VALUE.unpack(value))


def decode_pack_row(value: bytes | memoryview) -> PackRow:
    pack, session, sealed, size = msgpack.unpackb(value)
    return PackRow(PackId(pack), session, sealed, size)


def pack_key(number: int) -> bytes:
    return number.to_bytes(4, "big")
