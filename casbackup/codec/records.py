"""Frames and records as such. Compression contexts are kept one per thread (they are not thread-safe)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from casbackup.codec.hashing import record_checksum
from casbackup.errors import BlobDamaged
from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.limits import MAX_BLOB_BYTES
from casbackup.spec.record import CHECKED_BYTES, FLAG_ZSTD, HEADER_BYTES, Record, pack_checked, parse_header

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
        return self._decompressor().decompress(data, max_output_size=plain_length)

    def decompress_all(self, frames: list[Buffer]) -> list[Buffer]:
        plains = self._decompressor().multi_decompress_to_buffer(frames)
        # Segments are buffers, though their type does not say so.
        return [memoryview(cast("bytes", plains[number])) for number in range(len(frames))]

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        if self.decompressor is None:
            import zstandard  # noqa: PLC0415

            self.decompressor = zstandard.ZstdDecompressor()
        return self.decompressor


_contexts = _Contexts()


def compressed(plains: Sequence[Buffer], level: int) -> list[Buffer]:
    """A zstd frame of each, made in one call without the GIL.

    The frames share memory: it is free once none of them is in use.
    """
    if len(plains) == 1:
        return [_contexts.compressor(level).compress(plains[0])]
    frames = _contexts.compressor(level).multi_compress_to_buffer(list(plains))
    # Segments are buffers, though their type does not say so.
    return [memoryview(cast("bytes", frames[number])) for number in range(len(plains))]


def smaller(plain: Buffer, frame: Buffer) -> tuple[Buffer, int]:
    """What to store of a blob and its frame, and the flags that say which. ``plain`` itself is not kept."""
    if len(frame) + _SMALLEST_GAIN > len(plain):
        return bytes(plain), 0
    return frame, FLAG_ZSTD


class Packed(NamedTuple):
    """A blob as its record has it, without the seal."""

    id: BlobId
    plain_length: int
    payload: Buffer
    flags: int


def decompressed(blob: Packed) -> Buffer:
    """The plain bytes of a blob. Not verified against the id.

    :raise BlobDamaged: when it has another length, or none.
    """
    _require_length(blob)
    return _unframed(blob) if blob.flags & FLAG_ZSTD else blob.payload


def decompressed_together(blobs: Sequence[Packed]) -> list[Buffer]:
    """``decompressed`` for many, in one call without the GIL: several threads that do this take an eighth less of the
    processors' time. The results share memory, which is free once none of them is in use.
    """
    for blob in blobs:
        _require_length(blob)
    framed = [blob for blob in blobs if blob.flags & FLAG_ZSTD]
    plains = iter(_unframed_together(framed) if len(framed) > 1 else [_unframed(blob) for blob in framed])
    return [next(plains) if blob.flags & FLAG_ZSTD else blob.payload for blob in blobs]


def _unframed(blob: Packed) -> Buffer:
    import zstandard  # noqa: PLC0415

    try:
        return _contexts.decompress(blob.payload, blob.plain_length)
    except zstandard.ZstdError as error:
        raise BlobDamaged(f"blob {blob.id.hex()[:16]} does not decompress: {error}") from error


def _unframed_together(blobs: Sequence[Packed]) -> list[Buffer]:
    import zstandard  # noqa: PLC0415

    try:
        return _contexts.decompress_all([blob.payload for blob in blobs])
    except zstandard.ZstdError:
        return [_unframed(blob) for blob in blobs]  # says which of them it is


def _require_length(blob: Packed) -> None:
    """A damaged frame may claim any size, and zstandard would believe it."""
    if blob.plain_length > MAX_BLOB_BYTES:
        raise BlobDamaged(f"blob {blob.id.hex()[:16]} claims {blob.plain_length} bytes")
    if (_stated_length(blob) if blob.flags & FLAG_ZSTD else len(blob.payload)) != blob.plain_length:
        raise BlobDamaged(f"the bytes of blob {blob.id.hex()[:16]} are not as many as it says")


def _stated_length(blob: Packed) -> int:
    import zstandard  # noqa: PLC0415

    try:
        return zstandard.frame_content_size(blob.payload)
    except zstandard.ZstdError as error:
        raise BlobDamaged(f"blob {blob.id.hex()[:16]} does not decompress: {error}") from error


def make_record(identity: BlobId, kind: int, flags: int, plain_length: int, payload: Buffer) -> Record:
    """The record with this payload, its checksum computed here."""
    checked = pack_checked(kind, flags, len(payload), plain_length, identity)
    return Record(identity, kind, flags, plain_length, checked + record_checksum(checked, payload), payload)


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


def require_checksum(record: Record) -> None:
    """:raise BlobDamaged: when the record's checksum is not right."""
    if record_checksum(record.header, record.payload) != record.header[CHECKED_BYTES:]:
        raise BlobDamaged(f"the record of blob {record.id.hex()[:16]} fails its checksum")


def intact_payload(
    data: bytes, start: int, kind: int, flags: int, stored_length: int, plain_length: int, identity: BlobId
) -> bytes | None:
    """The payload of the record at ``start`` of ``data`` if it is the one described, its checksum right."""
    checked = pack_checked(kind, flags, stored_length, plain_length, identity)
    end = start + HEADER_BYTES
    if data[start : start + CHECKED_BYTES] != checked:
        return None
    payload = data[end : end + stored_length]
    return payload if record_checksum(checked, payload) == data[start + CHECKED_BYTES : end] else None
