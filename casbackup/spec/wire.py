"""What goes between client and server besides JSON (``docs/spec/wire.md``). Integers are little-endian.

ids        32 bytes each, back to back
flags      a bit for each id of the question, the first in the lowest bit of the first byte; rest of the last byte zero
records    as in packs: header of 64 bytes and payload, back to back
lost       stands for a record that cannot be had, and is parsed like one:
           0 4 magic | 4 4 zero | 8 4 length of the message | 12 4 zero | 16 32 id | 48 16 code of the error, ASCII,
           filled with zeros; then the message, UTF-8
snapshots  each 0 4 length of the manifest | 4 4 length of the rest; then the manifest as in its file, and the sidecar
           as in its file. Without a manifest the snapshot is damaged, and the rest is a message, UTF-8. A length of
           the manifest of ff ff ff ff: it was refused, and the rest is a problem document
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from struct import Struct
from typing import NamedTuple

from casbackup.errors import (
    BlobDamaged,
    BlobMissing,
    DataDamage,
    ManifestDamaged,
    NodeInvalid,
    PackDamaged,
    ServerProtocolError,
)
from casbackup.fs import Buffer
from casbackup.ids import ID_BYTES, ZERO_ID, BlobId
from casbackup.limits import MAX_BLOB_BYTES, MAX_MANIFEST_BYTES
from casbackup.spec.magic import LOST
from casbackup.spec.record import HEADER_BYTES, Record, parse_header

VERSION = "v1"
"""The first part of every path."""

BINARY = "application/octet-stream"
PROBLEM = "application/problem+json"
LINES = "application/x-ndjson"

ATTACHMENT_HEADER = "Casbackup-Attachment"
"""Names who is attached to a session: 32 hexadecimal digits that the client chose."""
READING_HEADER = "Casbackup-Reading"
"""Names the reading that a fetch belongs to."""

_LENGTH = Struct("<8xI")
_LOST = Struct("<4s4xI4x32s16s")
_SNAPSHOT = Struct("<II")
_REFUSED = 0xFFFF_FFFF
_LOSSES: dict[str, type[DataDamage]] = {e.code: e for e in (BlobMissing, BlobDamaged, PackDamaged, NodeInvalid)}
_MAX_MESSAGE_BYTES = 4096


class SnapshotFrame(NamedTuple):
    """A snapshot on its way: the bytes of its files. ``sidecar`` is empty if there is none."""

    manifest: bytes
    sidecar: bytes


class RefusedFrame(NamedTuple):
    """Stands for a snapshot that was refused: the bytes of a problem document."""

    problem: bytes


def pack_ids(ids: Iterable[BlobId]) -> bytes:
    return b"".join(ids)


def unpack_ids(data: Buffer) -> list[BlobId]:
    """:raise ServerProtocolError: when they are cut off, or one is the zero id."""
    raw = bytes(data)
    if len(raw) % ID_BYTES:
        raise ServerProtocolError(f"{len(raw)} bytes are no list of ids")
    ids = [BlobId(raw[i : i + ID_BYTES]) for i in range(0, len(raw), ID_BYTES)]
    if ZERO_ID in ids:
        raise ServerProtocolError("the zero id is no blob's")
    return ids


def pack_flags(flags: Sequence[bool]) -> bytes:
    if not flags:
        return b""
    bits = "".join(["1" if flag else "0" for flag in reversed(flags)])
    return int(bits, 2).to_bytes(-(-len(flags) // 8), "little")


def unpack_flags(data: bytes, count: int) -> list[bool]:
    """:raise ServerProtocolError: when they are not ``count`` flags."""
    number = int.from_bytes(data, "little")
    if len(data) != -(-count // 8) or number >> count:
        raise ServerProtocolError(f"{len(data)} bytes are not {count} flags")
    return [bit == "1" for bit in reversed(f"{number:0{count}b}")] if count else []


def encode_lost(blob_id: BlobId, damage: DataDamage) -> bytes:
    code = damage.code if damage.code in _LOSSES else BlobDamaged.code
    message = str(damage).encode()[:_MAX_MESSAGE_BYTES]
    return _LOST.pack(LOST, len(message), blob_id, code.encode()) + message


class FrameParser:
    """Records and lost ones out of pieces of any size. Nothing is verified but that they are frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[BlobId, Record | DataDamage]]:
        """All that ends within ``data``. Records keep its memory.

        :raise ServerProtocolError: when something is not a frame.
        """
        if self._rest:
            data = self._rest + data
        view = memoryview(data)
        position, size = 0, len(data)
        while size - position >= HEADER_BYTES:
            (length,) = _LENGTH.unpack_from(data, position)
            if length > MAX_BLOB_BYTES:
                raise ServerProtocolError(f"a record of {length} bytes is too long")
            end = position + HEADER_BYTES + length
            if end > size:
                break
            yield _frame(view[position:end])
            position = end
        self._rest = data[position:]

    def end(self) -> None:
        """:raise ServerProtocolError: when the last frame was cut off."""
        if self._rest:
            raise ServerProtocolError("a record was cut off")


def parse_frames(data: Buffer) -> Iterator[memoryview]:
    """The bytes of each record of ``data``.

    :raise ServerProtocolError: when the last one is cut off.
    """
    view = memoryview(data)
    position, size = 0, len(data)
    while position < size:
        if size - position < HEADER_BYTES:
            raise ServerProtocolError("a record was cut off")
        (length,) = _LENGTH.unpack_from(data, position)
        end = position + HEADER_BYTES + length
        if end > size:
            raise ServerProtocolError("a record was cut off")
        yield view[position:end]
        position = end


def encode_snapshot(manifest: bytes, sidecar: bytes) -> bytes:
    return b"".join((_SNAPSHOT.pack(len(manifest), len(sidecar)), manifest, sidecar))


def encode_damaged_snapshot(damage: ManifestDamaged) -> bytes:
    message = str(damage).encode()[:_MAX_MESSAGE_BYTES]
    return _SNAPSHOT.pack(0, len(message)) + message


def encode_refused_snapshot(problem: bytes) -> bytes:
    return _SNAPSHOT.pack(_REFUSED, len(problem)) + problem


def decode_snapshots(data: bytes) -> Iterator[SnapshotFrame | RefusedFrame | ManifestDamaged]:
    """:raise ServerProtocolError: when it is cut off or too long."""
    position, size = 0, len(data)
    while position < size:
        if size - position < _SNAPSHOT.size:
            raise ServerProtocolError("a snapshot was cut off")
        manifest, rest = _SNAPSHOT.unpack_from(data, position)
        is_refused, manifest = manifest == _REFUSED, 0 if manifest == _REFUSED else manifest
        middle = position + _SNAPSHOT.size + manifest
        position = middle + rest
        if position > size or manifest > MAX_MANIFEST_BYTES:
            raise ServerProtocolError("a snapshot was cut off")
        if is_refused:
            yield RefusedFrame(data[middle:position])
        elif manifest:
            yield SnapshotFrame(data[middle - manifest : middle], data[middle:position])
        else:
            yield ManifestDamaged(data[middle:position].decode(errors="replace"))


def _frame(data: memoryview) -> tuple[BlobId, Record | DataDamage]:
    header = parse_header(data)
    if header is not None:
        return header.id, Record(
            header.id, header.kind, header.flags, header.plain_length, bytes(data[:HEADER_BYTES]), data[HEADER_BYTES:]
        )
    magic, _, blob_id, code = _LOST.unpack_from(data)
    loss = _LOSSES.get(code.rstrip(b"\0").decode(errors="replace"))
    if magic != LOST or loss is None:
        raise ServerProtocolError("something that is no record")
    return BlobId(blob_id), loss(bytes(data[HEADER_BYTES:]).decode(errors="replace"))
