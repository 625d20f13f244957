"""Writing in one pass, grains in the order in which they come:

header | descriptor | grains, each behind its marker | grain tables | grain directory | footer | end of stream
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from casbackup.errors import ArchiveIncomplete
from casbackup.formats.deflate import FASTEST, LEVELS, ZLIB_FORMAT, deflate
from casbackup.formats.options import whole_number
from casbackup.formats.parallel import batch_of, mapped
from casbackup.formats.port import ArchiveHead, ByteRange, ByteTarget, Order, WriterCapabilities
from casbackup.formats.single import SECTOR_BYTES, check_single_disk, sectors_for
from casbackup.formats.vmdk.descriptor import descriptor_of
from casbackup.formats.vmdk.layout import (
    DEFLATE,
    DIRECTORY_AT_END,
    GRAIN_MARKER,
    LINE_ENDS,
    Flag,
    Header,
    Kind,
    encode_header,
    encode_marker,
    encode_table,
)
from casbackup.formats.zeros import is_zero
from casbackup.fs import Buffer
from casbackup.limits import MAX_VMDK_DISK_BYTES
from casbackup.units import KiB

GRAIN_BYTES = 64 * KiB
_GRAIN_SECTORS = GRAIN_BYTES // SECTOR_BYTES
_TABLE_ENTRIES = 512
_BATCH = batch_of(GRAIN_BYTES)
_DESCRIPTOR_SECTORS = 20
_OVERHEAD = 128


class VmdkWriter:
    """``level``: of the compression, 1 to 9."""

    capabilities = WriterCapabilities(
        streams=True, order=Order.ANY, needs_map=False, unit_bytes=GRAIN_BYTES, max_disks=1, configs=False
    )

    def __init__(self, level: object = FASTEST) -> None:
        """:raise UsageError: for a level that there is not."""
        self._level = whole_number("level", level, LEVELS)

    def check(self, head: ArchiveHead) -> None:
        check_single_disk(head, "vmdk", MAX_VMDK_DISK_BYTES)

    def open(
        self, target: ByteTarget, head: ArchiveHead, maps: Sequence[Sequence[ByteRange]] | None = None
    ) -> VmdkOutput:
        self.check(head)
        return VmdkOutput(target, head, self._level)


class VmdkOutput:
    """Keeps 4 bytes for each grain of the grain tables that are used: 64 MiB for a full 1 TiB."""

    def __init__(self, target: ByteTarget, head: ArchiveHead, level: int) -> None:
        self._target = target
        self._disk = head.disks[0]
        self._level = level
        self._tables: dict[int, array[int]] = {}
        self._given_bytes = 0
        self._sector = 0
        self._put([encode_header(self._header(DIRECTORY_AT_END))])
        self._put([descriptor_of(head).ljust((_OVERHEAD - 1) * SECTOR_BYTES, b"\0")])

    def write(self, disk: int, offset: int, data: Buffer) -> None:
        """:raise ValueError: when a grain comes twice."""
        self._given_bytes += len(data)
        view = memoryview(data)
        starts = [s for s in range(0, len(view), GRAIN_BYTES) if not is_zero(view[s : s + GRAIN_BYTES])]
        for first in range(0, len(starts), _BATCH):
            batch = starts[first : first + _BATCH]
            grains = [_whole(view[start : start + GRAIN_BYTES]) for start in batch]
            packed = mapped(self._compress, grains)
            self._put_grains([(offset + start) // GRAIN_BYTES for start in batch], packed)

    def zeros(self, disk: int, offset: int, length: int) -> None:
        self._given_bytes += length

    def finish(self) -> None:
        """:raise ArchiveIncomplete: when not all of the disk was given."""
        if self._given_bytes < self._disk.size_bytes:
            missing = self._disk.size_bytes - self._given_bytes
            raise ArchiveIncomplete(f"disk {self._disk.name} lacks {missing} bytes")
        directory = array("I", bytes(4 * self._table_count()))
        for index in sorted(self._tables):
            directory[index] = self._put_table(Kind.GRAIN_TABLE, encode_table(self._tables.pop(index)))
        directory_at = self._put_table(Kind.GRAIN_DIRECTORY, encode_table(directory) or bytes(SECTOR_BYTES))
        self._put_table(Kind.FOOTER, encode_header(self._header(directory_at)))
        self._put([encode_marker(Kind.END_OF_STREAM, 0)])

    def _header(self, directory_at: int) -> Header:
        return Header(
            version=3,
            flags=Flag.LINE_ENDS | Flag.COMPRESSED | Flag.MARKERS,
            capacity=sectors_for(self._disk.size_bytes),
            grain_sectors=_GRAIN_SECTORS,
            descriptor_at=1,
            descriptor_sectors=_DESCRIPTOR_SECTORS,
            table_entries=_TABLE_ENTRIES,
            spare_directory_at=0,
            directory_at=directory_at,
            overhead=_OVERHEAD,
            unclean=0,
            line_ends=LINE_ENDS,
            compression=DEFLATE,
        )

    def _table_count(self) -> int:
        return -(-self._disk.size_bytes // (GRAIN_BYTES * _TABLE_ENTRIES))

    def _compress(self, grain: Buffer) -> bytes:
        return deflate(grain, self._level, ZLIB_FORMAT)

    def _put_grains(self, grains: list[int], packed: list[bytes]) -> None:
        buffers: list[Buffer] = []
        sector = self._sector
        for grain, data in zip(grains, packed, strict=True):
            self._set_entry(grain, sector)
            stored_bytes = GRAIN_MARKER.size + len(data)
            padding = bytes(-stored_bytes % SECTOR_BYTES)
            buffers += (GRAIN_MARKER.pack(grain * _GRAIN_SECTORS, len(data)), data, padding)
            sector += sectors_for(stored_bytes)
        self._put(buffers)

    def _set_entry(self, grain: int, sector: int) -> None:
        index, place = divmod(grain, _TABLE_ENTRIES)
        table = self._tables.get(index)
        if table is None:
            table = self._tables[index] = array("I", bytes(4 * _TABLE_ENTRIES))
        if table[place]:
            raise ValueError(f"grain {grain} comes twice")
        table[place] = sector

    def _put_table(self, kind: Kind, table: bytes) -> int:
        """Returns its sector, behind its marker."""
        self._put([encode_marker(kind, len(table) // SECTOR_BYTES), table])
        return self._sector - len(table) // SECTOR_BYTES

    def _put(self, buffers: list[Buffer]) -> None:
        """Whole sectors."""
        self._target.write(buffers)
        self._sector += sum(map(len, buffers)) // SECTOR_BYTES


def _whole(grain: memoryview) -> Buffer:
    """The last grain of a disk may be shorter; in the file it is not."""
    return grain if len(grain) == GRAIN_BYTES else bytes(grain).ljust(GRAIN_BYTES, b"\0")
