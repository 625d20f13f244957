"""Reading packs without an index: by their footer, or, when that is missing or damaged, record by record.

A scan never trusts a length that it has not checked: after damage it looks for the next record magic whose checksum
holds, so one flipped bit costs one record (the idea of VMA's uuid markers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from casbackup.codec.hashing import checksum128
from casbackup.codec.records import parse_record
from casbackup.errors import BlobDamaged, PackDamaged
from casbackup.ids import PackId, SessionId
from casbackup.spec import pack as spec
from casbackup.spec.magic import RECORD
from casbackup.spec.record import HEADER_BYTES, Record, RecordHeader
from casbackup.spec.record import parse_header as parse_record_header
from casbackup.store.packstorage import PackStorage

_WINDOW_BYTES = 8 * 1024 * 1024


class Damage(NamedTuple):
    """Bytes of a pack that hold no valid record."""

    offset: int
    length: int
    reason: str


class Found(NamedTuple):
    """A record and where its header starts."""

    offset: int
    record: Record


def encode_header(pack: PackId, session: SessionId) -> bytes:
    checked = spec.pack_header(pack, session)
    return checked + checksum128(checked)


def encode_footer(pack: PackId, entries: Sequence[spec.PackEntry], footer_offset: int) -> bytes:
    """What seals a pack whose records end at ``footer_offset``."""
    listing = spec.pack_entries(entries)
    checked = spec.pack_trailer(spec.PackTrailer(len(entries), footer_offset, pack))
    return listing + checked + checksum128(listing + checked)


def read_header(storage: PackStorage, pack: PackId) -> spec.PackHeader | None:
    """The verified header of a pack; None when it has none (too short, or damaged)."""
    try:
        data = storage.read(pack, 0, spec.HEADER_BYTES)
    except PackDamaged:
        return None
    header = spec.parse_header(data)
    return header if data[spec.CHECKED_BYTES :] == checksum128(data[: spec.CHECKED_BYTES]) else None


def read_footer(storage: PackStorage, pack: PackId) -> list[spec.PackEntry] | None:
    """The verified listing of a sealed pack; None when it was never sealed or the footer is damaged."""
    found = _footer(storage, pack, storage.size_bytes(pack))
    return None if found is None else list(spec.parse_entries(found[1]))


def has_footer(storage: PackStorage, pack: PackId) -> bool:
    """Does the pack end with a sound footer?"""
    return _footer(storage, pack, storage.size_bytes(pack)) is not None


def _footer(storage: PackStorage, pack: PackId, size: int) -> tuple[int, bytes] | None:
    """Where the verified footer begins, and its listing."""
    if size < spec.HEADER_BYTES + spec.TRAILER_BYTES:
        return None
    tail = storage.read(pack, size - spec.TRAILER_BYTES, spec.TRAILER_BYTES)
    trailer = spec.parse_trailer(tail)
    if trailer is None or trailer.pack != pack:
        return None
    length = size - spec.TRAILER_BYTES - trailer.footer_offset
    if length < 0 or length != trailer.records * spec.ENTRY_BYTES:
        return None
    listing = storage.read(pack, trailer.footer_offset, length)
    if tail[spec.CHECKED_BYTES :] != checksum128(listing + tail[: spec.CHECKED_BYTES]):
        return None
    return trailer.footer_offset, listing


def scan(storage: PackStorage, pack: PackId) -> Iterator[Found | Damage]:
    """Every record of a pack whose checksum holds, and every stretch that is none, in file order.

    A sound footer is skipped; a damaged one is not believed, and reported like any other damage. Memory: one
    window of 8 MiB, or the largest record.
    """
    size = storage.size_bytes(pack)
    footer = _footer(storage, pack, size)
    end = size if footer is None else footer[0]
    offset = spec.HEADER_BYTES
    if read_header(storage, pack) is None:
        yield Damage(0, min(size, spec.HEADER_BYTES), "the pack's header is damaged")
    while offset < end:
        found = _record_at(storage, pack, offset, end)
        if isinstance(found, Record):
            yield Found(offset, found)
            offset += found.total_bytes
            continue
        resumed = _next_record(storage, pack, offset + 1, end)
        yield Damage(offset, resumed - offset, found)
        offset = resumed


def _record_at(storage: PackStorage, pack: PackId, offset: int, end: int) -> Record | str:
    if end - offset < HEADER_BYTES:
        return "cut off in a record's header"
    header = parse_record_header(storage.read(pack, offset, HEADER_BYTES))
    if header is None:
        return "no record's header"
    if offset + HEADER_BYTES + header.stored_length > end:
        return "a record is cut off, or its length is damaged"
    try:
        return parse_record(storage.read(pack, offset, HEADER_BYTES + header.stored_length), at=f"{pack}:{offset}")
    except BlobDamaged:
        return f"blob {header.id.hex()[:16]} fails its checksum"


def _next_record(storage: PackStorage, pack: PackId, offset: int, end: int) -> int:
    """Where the next valid record starts, or ``end``."""
    while offset < end:
        window = storage.read(pack, offset, min(_WINDOW_BYTES, end - offset))
        at = window.find(RECORD)
        while at >= 0:
            if isinstance(_record_at(storage, pack, offset + at, end), Record):
                return offset + at
            at = window.find(RECORD, at + 1)
        if offset + len(window) >= end:
            break
        offset += len(window) - len(RECORD) + 1
    return end


def headers(storage: PackStorage, pack: PackId) -> Iterator[tuple[int, RecordHeader]]:
    """Headers and offsets of all records, from the footer if there is a good one, else by a scan."""
    listing = read_footer(storage, pack)
    if listing is not None:
        for entry in listing:
            yield (
                entry.offset,
                RecordHeader(entry.kind, entry.flags, entry.stored_length, entry.plain_length, entry.id, b""),
            )
        return
    for item in scan(storage, pack):
        if isinstance(item, Found):
            record = item.record
            yield (
                item.offset,
                RecordHeader(
                    record.kind, record.flags, len(record.payload), record.plain_length, record.id, record.header[48:]
                ),
            )
