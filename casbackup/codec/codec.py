"""Blob to record and back, as one repository wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from casbackup.codec.crypto import SEAL_BYTES, keyed_hash, scrambler, seal, unseal
from casbackup.codec.hashing import PUBLIC_KEYS, IdKeys, id_keys
from casbackup.codec.master_key import MasterKey
from casbackup.codec.records import (
    Packed,
    compressed,
    decompressed,
    decompressed_together,
    intact_payload,
    make_record,
    require_checksum,
    smaller,
)
from casbackup.errors import BlobDamaged, KeyMissing
from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.spec.record import FLAG_SEALED, BlobKind, Record, pack_checked
from casbackup.units import MiB

_GROUP_BYTES = 1 * MiB


class Codec:
    """Immutable, so any number of threads may share it.

    There are three kinds of it:

    * ``PLAIN``: everybody may compute ids, nothing is sealed;
    * ``keyed_codec``: ids are those of the master key, chunks and configs are sealed;
    * ``blind_codec``: for an encrypted repository without its key. It tells no ids and opens nothing; what comes is
      vouched for by its checksum alone. Tree nodes are never sealed: they can be read.
    """

    def __init__(self, fingerprint: str, ids: IdKeys | None, master: MasterKey | None) -> None:
        """``fingerprint`` of the key; empty: not encrypted. ``ids`` None: blind."""
        self._fingerprint = fingerprint
        self._ids = ids
        self._seals = None if master is None else master.derived("casbackup 2026-11-24 blob seal")
        self.scramble: Callable[[Buffer], bytes] | None = (
            None if master is None else scrambler(master.derived("casbackup 2026-11-24 chunk boundaries"))
        )
        """What the samples of blocks go through before they decide where chunks end; None: nothing."""

    @property
    def is_blind(self) -> bool:
        return self._ids is None

    @property
    def ids(self) -> IdKeys:
        """What ids are computed with.

        :raise KeyMissing: when it is blind.
        """
        if self._ids is None:
            raise KeyMissing(f"this needs the key {self._fingerprint}")
        return self._ids

    def encode(self, kind: int, identity: BlobId, plain: Buffer, level: int) -> Record:
        """The record of a blob whose id is known, compressed at zstd ``level``. ``plain`` is not kept."""
        return self.encode_all(kind, [(identity, plain)], level)[0]

    def encode_all(self, kind: int, blobs: Sequence[tuple[BlobId, Buffer]], level: int) -> list[Record]:
        """``encode`` for many blobs at once. The payloads may share memory: it is free once no record is in use."""
        if not blobs:
            return []
        frames = compressed([plain for _, plain in blobs], level)
        return [self._record(kind, blob[0], blob[1], frame) for blob, frame in zip(blobs, frames, strict=True)]

    def encode_blob(self, kind: BlobKind, plain: Buffer, level: int) -> Record:
        """The record of a blob, its id computed here."""
        return self.encode(kind, self.ids.id(kind, plain), plain, level)

    def decode(self, record: Record) -> Buffer:
        """The plain bytes, verified against the id, which covers everything: no other check is needed for content.

        Without a key: those of a tree node, verified by its checksum.

        :raise BlobDamaged: when they are not what the record says. :raise KeyMissing: when it is sealed and there is
        no key.
        """
        if self._ids is None:
            require_checksum(record)
        return self._decoded(record.id, record.kind, record.flags, record.plain_length, record.payload)

    def decode_all(self, records: Sequence[Record]) -> list[Buffer]:
        """``decode`` for many at once, which takes less time. The results share memory: it is free once none of them is
        in use.
        """
        if self._ids is None:
            return [self.decode(record) for record in records]
        blobs = [self._packed(r.id, r.kind, r.flags, r.plain_length, r.payload) for r in records]
        plains = decompressed_together(blobs)
        for record, plain in zip(records, plains, strict=True):
            self._require_id(record.id, record.kind, plain)
        return plains

    def verify(self, record: Record) -> None:
        """Verify what is to be stored as it is: its checksum, and as much of its content as can be.

        :raise BlobDamaged: when something about it is wrong.
        """
        require_checksum(record)
        self.verify_content(record)

    def verify_content(self, record: Record) -> None:
        """``verify`` for a record whose checksum has been verified.

        :raise BlobDamaged: when something about it is wrong.
        """
        self._verify(record.id, record.kind, record.flags, record.plain_length, record.payload)

    def verify_contents(self, records: Sequence[Record]) -> None:
        """``verify_content`` for many."""
        if self._ids is None:
            for record in records:
                self.verify_content(record)
            return
        for group in grouped(records):
            self.decode_all(group)

    def is_sound(
        self,
        data: bytes,
        start: int,
        kind: int,
        flags: int,
        stored_length: int,
        plain_length: int,
        identity: BlobId,
    ) -> bool:
        """Is the record at ``start`` of ``data`` the one described, and would ``verify`` have nothing to say?

        The quick way to a yes. Why not, ``parse_record`` and ``verify`` say.
        """
        payload = intact_payload(data, start, kind, flags, stored_length, plain_length, identity)
        if payload is None:
            return False
        try:
            self._verify(identity, kind, flags, plain_length, payload)
        except BlobDamaged:
            return False
        return True

    def _record(self, kind: int, identity: BlobId, plain: Buffer, frame: Buffer) -> Record:
        payload, flags = smaller(plain, frame)
        plain_length = len(plain)
        if self._seals is not None and kind != BlobKind.NODE:
            flags |= FLAG_SEALED
            header = pack_checked(kind, flags, len(payload) + SEAL_BYTES, plain_length, identity)
            payload = seal(keyed_hash(self._seals, identity), payload, header)
        return make_record(identity, kind, flags, plain_length, payload)

    def _verify(self, identity: BlobId, kind: int, flags: int, plain_length: int, payload: Buffer) -> None:
        if self._ids is None and kind != BlobKind.NODE:
            self._require_form(identity, kind, flags)
        else:
            self._decoded(identity, kind, flags, plain_length, payload)

    def _decoded(self, identity: BlobId, kind: int, flags: int, plain_length: int, payload: Buffer) -> Buffer:
        plain = decompressed(self._packed(identity, kind, flags, plain_length, payload))
        if self._ids is not None:
            self._require_id(identity, kind, plain)
        return plain

    def _packed(self, identity: BlobId, kind: int, flags: int, plain_length: int, payload: Buffer) -> Packed:
        self._require_form(identity, kind, flags)
        if flags & FLAG_SEALED:
            payload = self._unsealed(identity, kind, flags, plain_length, payload)
        return Packed(identity, plain_length, payload, flags)

    def _require_id(self, identity: BlobId, kind: int, plain: Buffer) -> None:
        if self.ids.id(kind, plain) != identity:
            raise BlobDamaged(f"the bytes of blob {identity.hex()[:16]} do not have that id")

    def _unsealed(self, identity: BlobId, kind: int, flags: int, plain_length: int, payload: Buffer) -> bytes:
        if self._seals is None:
            raise KeyMissing(f"blob {identity.hex()[:16]} is sealed; the key {self._fingerprint} opens it")
        header = pack_checked(kind, flags, len(payload), plain_length, identity)
        opened = unseal(keyed_hash(self._seals, identity), payload, header)
        if opened is None:
            raise BlobDamaged(f"the seal of blob {identity.hex()[:16]} is broken")
        return opened

    def _require_form(self, identity: BlobId, kind: int, flags: int) -> None:
        """In an encrypted repository all but tree nodes are sealed, elsewhere nothing is."""
        sealed = bool(flags & FLAG_SEALED)
        if sealed != (bool(self._fingerprint) and kind != BlobKind.NODE):
            raise BlobDamaged(f"blob {identity.hex()[:16]} is {'' if sealed else 'not '}sealed, against the rule here")


def grouped(records: Iterable[Record]) -> Iterator[list[Record]]:
    """As many together as are worth decoding at once: about 1 MiB of plain bytes, or one that has more."""
    group: list[Record] = []
    size = 0
    for record in records:
        if size and size + record.plain_length > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(record)
        size += record.plain_length
    if group:
        yield group


PLAIN = Codec("", PUBLIC_KEYS, None)


def keyed_codec(key: MasterKey) -> Codec:
    return Codec(key.fingerprint, id_keys(key.derived("casbackup 2026-11-24 blob ids")), key)


def blind_codec(fingerprint: str) -> Codec:
    return Codec(fingerprint, None, None)


def codec_without_key(key_fingerprint: str) -> Codec:
    """For a repository whose key has this fingerprint; empty: it has none."""
    return blind_codec(key_fingerprint) if key_fingerprint else PLAIN
