"""Reading in one pass, grain after grain as the markers tell. What has no grain is zero.

So a grain that is lost could pass for zeros. Against that, the grain tables are counted: they must name as many
grains as came, and the footer and the end-of-stream marker must be there. QEMU writes neither of the two, but puts
the tables in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats.coverage import Coverage
from casbackup.formats.deflate import ZLIB_FORMAT, Undecompressable, inflate
from casbackup.formats.parallel import batch_of, mapped
from casbackup.formats.port import (
    ArchiveDisk,
    ArchiveHead,
    ByteRange,
    ByteSource,
    Data,
    Event,
    Order,
    ReaderCapabilities,
    Zeros,
)
from casbackup.formats.reading import disk_name, drain, read_exactly, skip
from casbackup.formats.single import SECTOR_BYTES, sectors_for
from casbackup.formats.tolerant import OnDamage, raise_damage
from casbackup.formats.vmdk.layout import (
    DEFLATE,
    DIRECTORY_AT_END,
    ENTRY_BYTES,
    GRAIN_MARKER,
    LINE_ENDS,
    Flag,
    Header,
    Kind,
    Marker,
    parse_header,
    parse_marker,
    parse_table,
)
from casbackup.limits import MAX_DISK_BYTES
from casbackup.units import MiB

_GRAIN_SECTORS = tuple(1 << bits for bits in range(3, 12))
_TABLE_ENTRIES = range(1, 4097)
_KINDS = frozenset[int](Kind)
_MAX_DIRECTORY_BYTES = 1 * MiB
"""Of a directory in front: enough for 8 TiB."""
_ZERO_GRAIN = 1
"""An entry of a grain table: zeros, without a grain."""


class VmdkReader:
    capabilities = ReaderCapabilities(streams=True, order=Order.ANY)

    def open(self, source: ByteSource, on_damage: OnDamage = raise_damage) -> VmdkArchive:
        """``on_damage``: for who wants to read on.

        :raise ArchiveDamaged: for a header that makes no sense.
        :raise ArchiveUnsupported: for other kinds of VMDK."""
        header = parse_header(bytes(read_exactly(source, SECTOR_BYTES, "the header")))
        if header is None:
            raise ArchiveDamaged(f"{source.name}: no header of a VMDK image")
        _check_supported(header, source.name)
        _check_sound(header, source.name)
        return VmdkArchive(source, header, on_damage)


class _Grain(NamedTuple):
    """``at``: byte of the archive where its marker is. ``packed``: its compressed bytes."""

    at: int
    offset: int
    packed: memoryview


class VmdkArchive:
    def __init__(self, source: ByteSource, header: Header, on_damage: OnDamage) -> None:
        self.head = ArchiveHead((ArchiveDisk(disk_name(source), header.capacity * SECTOR_BYTES),))
        self._source = source
        self._header = header
        self._size_bytes = header.capacity * SECTOR_BYTES
        self._grain_bytes = header.grain_sectors * SECTOR_BYTES
        self._coverage = Coverage(self._size_bytes)
        self._grains = 0
        self._named = 0
        """Grains that the tables name."""
        self._on_damage = on_damage
        self._is_whole = True
        """Nothing was met that makes it uncertain which grains there should be."""
        self._skips_data = False
        self._has_lost_track = False

    def events(self) -> Iterator[Event]:
        """Grains in the order of the archive, then what is zero.

        :raise ArchiveDamaged: for grains that cannot be, come twice or cannot be decompressed, and when any is missing.
        """
        batch: list[_Grain] = []
        for grain in self._all_grains():
            batch.append(grain)
            if len(batch) == batch_of(self._grain_bytes):
                yield from self._unpacked(batch)
                batch = []
        yield from self._unpacked(batch)
        if self._is_whole:
            for gap in self._coverage.missing():
                yield Zeros(0, gap.offset, gap.length)
        drain(self._source)

    def check_structures(self) -> None:
        self._skips_data = True
        for _grain in self._all_grains():
            pass

    def _all_grains(self) -> Iterator[_Grain]:
        """As they come; then they are counted."""
        has_tables_in_front = SECTOR_BYTES < self._header.directory_at * SECTOR_BYTES < self._overhead_bytes
        if has_tables_in_front:
            self._count_tables_in_front()
        self._skip_to(self._overhead_bytes)
        yield from self._read_grains(may_end=has_tables_in_front)
        if self._is_whole and self._named != self._grains:
            self._report(f"its tables name {self._named} grains, but {self._grains} came")

    @property
    def _overhead_bytes(self) -> int:
        return self._header.overhead * SECTOR_BYTES

    def _read_grains(self, *, may_end: bool) -> Iterator[_Grain]:
        """Up to the end of the stream; up to the end of the file if that ``may_end`` it."""
        has_footer = False
        while (sector := self._next_sector(may_end=may_end)) is not None:
            marker = parse_marker(sector)
            if marker.size_bytes:
                yield from self._grain(marker, sector)
            elif marker.kind == Kind.END_OF_STREAM:
                if has_footer or self._header.directory_at != DIRECTORY_AT_END:
                    return
                self._lose_track("it ends without its footer")
            elif marker.kind in _KINDS:
                has_footer |= self._read_table(marker) == Kind.FOOTER
            else:
                self._lose_track(f"a marker of unknown kind {marker.kind}")

    def _next_sector(self, *, may_end: bool) -> bytearray | None:
        sector = bytearray(SECTOR_BYTES)
        got = self._source.read_into(memoryview(sector))
        if not got and (may_end or self._has_lost_track):
            return None
        if got < SECTOR_BYTES:
            self._report("it ends without the mark of its end")
            return None
        return sector

    def _grain(self, marker: Marker, sector: bytearray) -> Iterator[_Grain]:
        """The grain behind the marker, unless it is damaged; where the marker is none, the next sector is looked at."""
        at = self._source.tell() - SECTOR_BYTES
        offset = marker.value * SECTOR_BYTES
        if offset % self._grain_bytes or offset >= self._size_bytes or marker.size_bytes > 2 * self._grain_bytes:
            self._lose_track(f"a grain of {marker.size_bytes} bytes for sector {marker.value} of the disk")
            return
        if self._coverage.add(offset, self._plain_bytes(offset)):
            self._lose_track(f"the grain of byte {offset} of the disk comes twice")
            return
        self._grains += 1
        self._has_lost_track = False
        stored_bytes = sectors_for(GRAIN_MARKER.size + marker.size_bytes) * SECTOR_BYTES
        if self._skips_data:
            skip(self._source, stored_bytes - SECTOR_BYTES, "a grain")
            return
        stored = memoryview(bytearray(stored_bytes))
        stored[:SECTOR_BYTES] = sector
        if self._source.read_into(stored[SECTOR_BYTES:]) < stored_bytes - SECTOR_BYTES:
            self._report("it ends within a grain")
        else:
            yield _Grain(at, offset, stored[GRAIN_MARKER.size :][: marker.size_bytes])

    def _plain_bytes(self, offset: int) -> int:
        """How much of the disk the grain holds; the last one may reach beyond the end."""
        return min(self._grain_bytes, self._size_bytes - offset)

    def _read_table(self, marker: Marker) -> int:
        """Count the entries of a grain table, go over everything else; returns what it was."""
        self._has_lost_track = False
        size_bytes = marker.value * SECTOR_BYTES
        if marker.kind == Kind.GRAIN_TABLE:
            self._count_table(size_bytes)
        else:
            skip(self._source, size_bytes, "a table")
        return marker.kind

    def _count_table(self, stored_bytes: int) -> None:
        table_bytes = self._header.table_entries * ENTRY_BYTES
        if stored_bytes != sectors_for(table_bytes) * SECTOR_BYTES:
            raise self._damaged(f"a grain table of {stored_bytes} bytes")
        table = read_exactly(self._source, stored_bytes, "a grain table")
        self._named += sum(entry > _ZERO_GRAIN for entry in parse_table(memoryview(table)[:table_bytes]))

    def _count_tables_in_front(self) -> None:
        table_bytes = self._header.table_entries * ENTRY_BYTES
        tables = -(-self._header.capacity // (self._header.grain_sectors * self._header.table_entries))
        if tables * ENTRY_BYTES > _MAX_DIRECTORY_BYTES:
            raise self._damaged(f"a grain directory of {tables} entries")
        self._skip_to(self._header.directory_at * SECTOR_BYTES)
        directory = parse_table(read_exactly(self._source, tables * ENTRY_BYTES, "the grain directory"))
        for sector in sorted(filter(None, directory)):
            self._skip_to(sector * SECTOR_BYTES)
            self._count_table(sectors_for(table_bytes) * SECTOR_BYTES)
        if self._source.tell() > self._overhead_bytes:
            raise self._damaged("its grain tables lie where the grains are")

    def _skip_to(self, position: int) -> None:
        if position < self._source.tell():
            raise self._damaged("its tables overlap")
        skip(self._source, position - self._source.tell(), "its tables")

    def _unpacked(self, batch: list[_Grain]) -> Iterator[Data]:
        for grain, plain in zip(batch, mapped(self._decompress, batch), strict=True):
            if isinstance(plain, Undecompressable):
                what = f"the grain of byte {grain.offset} of the disk cannot be decompressed: {plain}"
                lost = ByteRange(grain.offset, self._plain_bytes(grain.offset))
                self._on_damage(self._damaged(what), grain.at, lost)
            else:
                yield Data(0, grain.offset, plain)

    def _decompress(self, grain: _Grain) -> memoryview | Undecompressable:
        needed = self._plain_bytes(grain.offset)
        try:
            plain = inflate(grain.packed, self._grain_bytes, ZLIB_FORMAT)
        except Undecompressable as error:
            return error
        if len(plain) < needed:
            return Undecompressable(f"{len(plain)} bytes instead of {needed}")
        return memoryview(plain)[:needed]

    def _lose_track(self, what: str) -> None:
        """A sector is no marker: tell it of the first of several."""
        if not self._has_lost_track:
            self._report(what)
        self._has_lost_track = True

    def _report(self, what: str) -> None:
        """Damage that leaves it open which grains there should be: what did not come is not zero for sure."""
        self._is_whole = False
        self._on_damage(self._damaged(what), self._source.tell(), None)

    def _damaged(self, what: str) -> ArchiveDamaged:
        return ArchiveDamaged(f"{self._source.name}: {what}")


def _check_supported(header: Header, name: str) -> None:
    if not header.flags & Flag.COMPRESSED or not header.flags & Flag.MARKERS:
        raise ArchiveUnsupported(
            f"{name}: not a stream-optimised VMDK; make one with "
            "`qemu-img convert -O vmdk -o subformat=streamOptimized`, or back it up with `casbackup backup`"
        )
    if header.version not in (1, 2, 3):
        raise ArchiveUnsupported(f"{name}: version {header.version} of VMDK; 1 to 3 are read")
    if header.compression != DEFLATE:
        raise ArchiveUnsupported(f"{name}: compression of kind {header.compression}; deflate (1) is read")


def _check_sound(header: Header, name: str) -> None:
    """:raise ArchiveDamaged: when the header's numbers cannot be."""
    if header.flags & Flag.LINE_ENDS and header.line_ends != LINE_ENDS:
        raise ArchiveDamaged(f"{name}: its line ends were changed: it was transferred as text")
    if header.capacity * SECTOR_BYTES > MAX_DISK_BYTES:
        raise ArchiveDamaged(f"{name}: a disk of {header.capacity} sectors")
    if header.grain_sectors not in _GRAIN_SECTORS:
        raise ArchiveDamaged(f"{name}: grains of {header.grain_sectors} sectors")
    if header.table_entries not in _TABLE_ENTRIES or not header.overhead:
        raise ArchiveDamaged(
            f"{name}: grain tables of {header.table_entries} entries, grains from {header.overhead} on"
        )
