"""Blob to record and back. Compression contexts are kept one per thread (they are not thread-safe)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from casbackup.codec.hashing import blob_id, record_checksum
from casbackup.errors import BlobDamaged
from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.limits import MAX_BLOB_BYTES
from casbackup.spec.record import CHECKED_BYTES, FLAG_ZSTD, HEADER_BYTES, BlobKind, Record, pack_checked, parse_header

if TYPE_CHECKING:
    import zstandard

_SMALLEST_GAIN = 32
"""A frame that saves fewer bytes is not worth decompressing."""


class _Contexts(threading.local):
    """zstandard is imported when the first blob needs it: a backup that finds nothing new never does (saves 25 ms)."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor: zstandard.ZstdDecompressor | None = None

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        compressor = self.compressors.get(level)
        if compressor is None:
            import zstandard  # noqa: PLC0415

            compressor = self.compressors[level] = zstandard.ZstdCompressor(level=level)
        return compressor

    def decompress(self, data: Buffer, plain_length: int) -> bytes:
        if self.decompressor is None:
            import zstandard  # noqa: PLC0415

            self.decompressor = zstandard.ZstdDecompressor()
        return self.decompressor.decompress(data, max_output_size=plain_length)


_contexts = _Contexts()


def encode_record(kind: int, identity: BlobId, plain: Buffer, level: int) -> Record:
    """The record of a blob whose id is known. ``plain`` is not kept: an incompressible payload is copied."""
    return _record(kind, identity, plain, _contexts.compressor(level).compress(plain))


def encode_records(kind: int, blobs: Sequence[tuple[BlobId, Buffer]], level: int) -> list[Record]:
    """``encode_record`` for many blobs at once: all are compressed in one call, without the GIL.

    The payloads share memory: it is free once none of the records is in use.
    """
    if not blobs:
        return []
    frames = _contexts.compressor(level).multi_compress_to_buffer([plain for _, plain in blobs])
    return [
        # Segments are buffers, though their type does not say so.
        _record(kind, identity, plain, memoryview(cast("bytes", frames[number])))
        for number, (identity, plain) in enumerate(blobs)
    ]


def _record(kind: int, identity: BlobId, plain: Buffer, frame: Buffer) -> Record:
    payload, flags, plain_length = frame, FLAG_ZSTD, len(plain)
    if len(payload) + _SMALLEST_GAIN > plain_length:
        payload, flags = bytes(plain), 0
    checked = pack_checked(kind, flags, len(payload), plain_length, identity)
    return Record(identity, kind, flags, plain_length, checked + record_checksum(checked, payload), payload)


def encode_blob(kind: BlobKind, plain: Buffer, level: int) -> Record:
    """The record of a blob, its id computed here."""
    return encode_record(kind, blob_id(kind, plain), plain, level)


def parse_record(data: Buffer, *, at: str) -> Record:
    """The record that ``data`` holds, exactly, its checksum verified; ``at`` names the place in errors.

    :raise BlobDamaged: when the header is none, the length differs, or the checksum fails.
    """
    view = memoryview(data)
    header = parse_header(view) if len(view) >= HEADER_BYTES else None
    if header is None or header.stored_length != len(view) - HEADER_BYTES:
        raise BlobDamaged(f"no valid record at {at}")
    payload = view[HEADER_BYTES:]
    if record_checksum(view, payload) != header.checksum:
        raise BlobDamaged(f"record of blob {header.id.hex()[:16]} at {at} fails its checksum")
    return Record(header.id, header.kind, header.flags, header.plain_length, bytes(view[:HEADER_BYTES]), payload)


def is_sound(
    data: bytes, start: int, kind: int, flags: int, stored_length: int, plain_length: int, identity: BlobId
) -> bool:
    """Is the record at ``start`` of ``data`` the one described, its checksum right, and its content that of its id?

    The quick way to a yes. Why not, ``parse_record`` and ``decode_record`` say.
    """
    checked = pack_checked(kind, flags, stored_length, plain_length, identity)
    end = start + HEADER_BYTES
    if data[start : start + CHECKED_BYTES] != checked:
        return False
    payload = data[end : end + stored_length]
    if record_checksum(checked, payload) != data[start + CHECKED_BYTES : end]:
        return False
    try:
        decode_payload(identity, kind, flags, plain_length, payload)
    except BlobDamaged:
        return False
    return True


def decode_payload(identity: BlobId, kind: int, flags: int, plain_length: int, payload: Buffer) -> Buffer:
    """The plain bytes, verified against the id, which covers everything: no other check is needed for content.

    :raise BlobDamaged: when the payload does not decode to bytes of that id.
    """
    if plain_length > MAX_BLOB_BYTES:
        raise BlobDamaged(f"blob {identity.hex()[:16]} claims {plain_length} bytes")
    plain = payload
    if flags & FLAG_ZSTD:
        import zstandard  # noqa: PLC0415

        try:
            # A damaged frame may claim any size, and zstandard would believe it.
            if zstandard.frame_content_size(payload) != plain_length:
                raise BlobDamaged(f"the frame of blob {identity.hex()[:16]} states another length")
            plain = _contexts.decompress(payload, plain_length)
        except zstandard.ZstdError as error:
            raise BlobDamaged(f"blob {identity.hex()[:16]} does not decompress: {error}") from error
    if len(plain) != plain_length or blob_id(kind, plain) != identity:
        raise BlobDamaged(f"the bytes of blob {identity.hex()[:16]} do not have that id")
    return plain


def decode_record(record: Record) -> Buffer:
    """The plain bytes of a record, verified against its id.

    :raise BlobDamaged: when they do not have it.
    """
    return decode_payload(record.id, record.kind, record.flags, record.plain_length, record.payload)


def verified_plain(record: Record) -> Buffer:
    """The plain bytes of a record that shall be stored as it is, for which its checksum must be right as well.

    :raise BlobDamaged: when it is not, or when the bytes do not have the id.
    """
    if record_checksum(record.header, record.payload) != record.header[CHECKED_BYTES:]:
        raise BlobDamaged(f"the record of blob {record.id.hex()[:16]} fails its checksum")
    return decode_record(record)
