"""The members of an archive one after the other, with long names and sparse maps resolved; from a pipe too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats.port import ByteRange, ByteSource, Event, Zeros
from casbackup.formats.reading import read_data, read_exactly, skip
from casbackup.formats.tar.headers import (
    BLOCK_BYTES,
    GNU_LONG_LINK,
    GNU_LONG_NAME,
    PAX,
    PAX_GLOBAL,
    REGULAR,
    SPARSE,
    Header,
    InvalidHeader,
    padding,
    parse_decimal,
    parse_header,
    parse_records,
)
from casbackup.formats.tar.sparse import SparseMap, parse_leading_map, parse_numbers, parse_old_map
from casbackup.units import MiB

_MAX_EXTENSION_BYTES = 4 * MiB
"""Of all extended headers of a member. Sparse maps of the forms 0.0 and 0.1 need 70 and 20 bytes a range."""
_MAX_NAME_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Member:
    """``offset``: of its first header block. ``size_bytes``: of the file. ``ranges``: its map, None if not sparse.

    ``stored_bytes`` of data lie in the archive, from where the source stands when the member is given out.
    """

    name: str
    offset: int
    is_file: bool
    size_bytes: int
    stored_bytes: int
    ranges: SparseMap | None

    def data_ranges(self) -> Iterator[ByteRange]:
        if self.ranges is not None:
            yield from self.ranges
        elif self.size_bytes:
            yield ByteRange(0, self.size_bytes)


class Members:
    """Reads headers from ``source`` on from where it stands."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._next_at = source.tell()
        self._globals: dict[str, bytes] = {}
        self._global_room = _MAX_EXTENSION_BYTES

    def next(self) -> Member | None:
        """The next member, the source at its data; None at the end of the archive.

        What was left unread of the one before is skipped.

        :raise ArchiveDamaged: for headers that are none, and when the archive ends without its mark.
        :raise ArchiveUnsupported: for sparse members of other programs.
        """
        skip(self._source, self._next_at - self._source.tell(), "a member")
        offset = self._source.tell()
        try:
            return self._next_member(offset)
        except InvalidHeader as error:
            raise ArchiveDamaged(f"{self._source.name}: at byte {offset}: {error}") from error

    def _next_member(self, offset: int) -> Member | None:
        own: list[tuple[str, bytes]] = []
        room = _MAX_EXTENSION_BYTES
        while (header := self._read_header()) is not None:
            if header.kind == PAX_GLOBAL:
                self._globals.update(parse_records(self._read_extension(header, self._global_room)))
                self._global_room -= header.size_bytes
            elif header.kind in (PAX, GNU_LONG_NAME, GNU_LONG_LINK):
                own += _records_of(header.kind, self._read_extension(header, room))
                room -= header.size_bytes
            else:
                return self._member(offset, header, own)
        if own:
            raise InvalidHeader("an extended header without its member")
        return None

    def _read_header(self) -> Header | None:
        block = self._read_block()
        return parse_header(block) if block.strip(b"\0") else None

    def _read_block(self) -> bytes:
        return bytes(read_exactly(self._source, BLOCK_BYTES, "a header"))

    def _read_extension(self, header: Header, room: int) -> bytes:
        if header.size_bytes > room:
            raise ArchiveUnsupported(f"{self._source.name}: extended headers of more than {_MAX_EXTENSION_BYTES} bytes")
        stored = header.size_bytes + padding(header.size_bytes)
        return bytes(read_exactly(self._source, stored, "an extended header")[: header.size_bytes])

    def _member(self, offset: int, header: Header, own: list[tuple[str, bytes]]) -> Member:
        records = {**self._globals, **dict(own)}
        size = parse_decimal(records["size"]) if "size" in records else header.size_bytes
        name = records.get("GNU.sparse.name", records.get("path", header.name))
        if len(name) > _MAX_NAME_BYTES:
            raise InvalidHeader(f"a name of {len(name)} bytes")
        if "SCHILY.realsize" in records:
            raise ArchiveUnsupported(f"{self._source.name}: sparse members in the form of star are not read")
        start = self._source.tell()
        ranges = self._sparse_map(header, own, records) if header.kind in (REGULAR, SPARSE) else None
        map_bytes = self._source.tell() - start if header.kind == REGULAR else 0
        self._next_at = self._source.tell() - map_bytes + size + padding(size)
        stored = size - map_bytes
        if ranges is not None and ranges.data_bytes != stored:
            raise InvalidHeader(f"a sparse map of {ranges.data_bytes} bytes before {stored} bytes")
        return Member(
            name=name.decode("utf-8", "surrogateescape").removeprefix("./"),
            offset=offset,
            is_file=header.kind in (REGULAR, SPARSE),
            size_bytes=size if ranges is None else ranges.size_bytes,
            stored_bytes=stored,
            ranges=ranges,
        )

    def _sparse_map(self, header: Header, own: list[tuple[str, bytes]], records: dict[str, bytes]) -> SparseMap | None:
        if header.kind == SPARSE:
            return parse_old_map(header.block, self._read_block)
        if records.get("GNU.sparse.major") == b"1" and records.get("GNU.sparse.minor") == b"0":
            return parse_leading_map(self._read_block, parse_decimal(records.get("GNU.sparse.realsize", b"")))
        if "GNU.sparse.major" in records:
            raise ArchiveUnsupported(f"{self._source.name}: a sparse member of an unknown version")
        if "GNU.sparse.map" in records:
            numbers = records["GNU.sparse.map"].split(b",")
        elif "GNU.sparse.numblocks" in records:
            numbers = [value for key, value in own if key in ("GNU.sparse.offset", "GNU.sparse.numbytes")]
        else:
            return None
        return parse_numbers(numbers, parse_decimal(records.get("GNU.sparse.size", b"")))


def _records_of(kind: bytes, content: bytes) -> list[tuple[str, bytes]]:
    """What an extended header says, as PAX records; GNU tar's long name is one of them."""
    if kind == PAX:
        return list(parse_records(content))
    return [("path", content.split(b"\0", 1)[0])] if kind == GNU_LONG_NAME else []


def events_of(member: Member, disk: int, source: ByteSource, buffer: memoryview) -> Iterator[Event]:
    """The member's content, in order; ``source`` stands at its data."""
    position = 0
    for offset, length in member.data_ranges():
        if offset > position:
            yield Zeros(disk, position, offset - position)
        yield from read_data(source, disk, offset, length, buffer)
        position = offset + length
    if position < member.size_bytes:
        yield Zeros(disk, position, member.size_bytes - position)
