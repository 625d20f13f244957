"""Reading: the active disk of an image without backing file. Internal snapshots are left alone."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats.deflate import Undecompressable
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
from casbackup.formats.qcow2.compression import unpack_deflated, unpack_zstd
from casbackup.formats.qcow2.layout import (
    COMPRESSED,
    ENTRY_BYTES,
    HEADER_BYTES,
    OFFSET_MASK,
    RESERVED_L1,
    RESERVED_L2,
    V2_HEADER_BYTES,
    V3_HEADER_BYTES,
    ZERO,
    ZLIB,
    ZSTD,
    CompressedEntry,
    Header,
    Incompatible,
    clusters_for,
    from_bytes,
    parse_compressed,
    parse_header,
)
from casbackup.formats.reading import COPY_BYTES, disk_name, read_at, read_data
from casbackup.formats.single import SECTOR_BYTES
from casbackup.formats.tolerant import OnDamage, raise_damage
from casbackup.limits import MAX_DISK_BYTES
from casbackup.units import MiB

_CLUSTER_BITS = range(9, 22)
_MAX_L1_BYTES = 32 * MiB
"""QEMU's own limit."""
_READABLE = int(Incompatible.DIRTY | Incompatible.CORRUPT | Incompatible.COMPRESSION)
"""A plain number, whose complement has the unknown bits too."""


class Qcow2Reader:
    capabilities = ReaderCapabilities(streams=False, order=Order.ASCENDING)

    def open(self, source: ByteSource, on_damage: OnDamage = raise_damage) -> Qcow2Archive:
        """``on_damage``: for who wants to read on.

        :raise ArchiveDamaged: for a header that makes no sense.
        :raise ArchiveUnsupported: for a pipe, a backing file, encryption, an external data file, extended L2
        entries, and features that came later.
        """
        if not source.seekable:
            raise ArchiveUnsupported(f"{source.name}: a qcow2 image is read from a file only, not from a pipe")
        beginning = bytearray(HEADER_BYTES)
        source.seek(0)
        got = source.read_into(memoryview(beginning))
        header = parse_header(bytes(beginning[:got]))
        if header is None:
            raise ArchiveDamaged(f"{source.name}: no header of a qcow2 image")
        _check_supported(header, source.name)
        _check_sound(header, source.name)
        return Qcow2Archive(source, header, on_damage)


class Qcow2Archive:
    def __init__(self, source: ByteSource, header: Header, on_damage: OnDamage) -> None:
        self.head = ArchiveHead((ArchiveDisk(disk_name(source), header.size_bytes),))
        self._source = source
        self._header = header
        self._on_damage = on_damage

    def events(self) -> Iterator[Event]:
        """:raise ArchiveDamaged: for tables that lead nowhere, and clusters that cannot be decompressed."""
        buffer = memoryview(bytearray(COPY_BYTES))
        clusters = _Tables(self._source, self._header, self._on_damage).clusters()
        for run in _runs(clusters, 1 << self._header.cluster_bits, self._header.size_bytes):
            if run.packed:
                yield from self._decompressed(run)
            elif run.host is None:
                yield Zeros(0, run.offset, run.length)
            else:
                self._source.seek(run.host)
                yield from read_data(self._source, 0, run.offset, run.length, buffer)

    def check_structures(self) -> None:
        for _cluster in _Tables(self._source, self._header, self._on_damage).clusters():
            pass

    def _decompressed(self, run: _Run) -> Iterator[Data]:
        cluster_bytes = 1 << self._header.cluster_bits
        clusters = mapped(self._unpacked, [self._read_packed(entry) for entry in run.packed])
        for offset, cluster in zip(range(run.offset, run.end, cluster_bytes), clusters, strict=True):
            length = min(cluster_bytes, run.end - offset)
            if isinstance(cluster, Undecompressable):
                what = f"the cluster of byte {offset} of the disk cannot be decompressed: {cluster}"
                at = run.packed[(offset - run.offset) // cluster_bytes].offset
                self._on_damage(ArchiveDamaged(f"{self._source.name}: {what}"), at, ByteRange(offset, length))
            else:
                yield Data(0, offset, memoryview(cluster)[:length])

    def _unpacked(self, packed: bytes) -> bytes | Undecompressable:
        unpack = unpack_zstd if self._header.compression == ZSTD else unpack_deflated
        try:
            return unpack(packed, 1 << self._header.cluster_bits)
        except Undecompressable as error:
            return error

    def _read_packed(self, entry: CompressedEntry) -> bytes:
        """All that is there: the last sector may reach beyond the end of the file."""
        self._source.seek(entry.offset)
        data = bytearray(entry.length)
        got = self._source.read_into(memoryview(data))
        return bytes(data[:got])


class _Cluster(NamedTuple):
    """``clusters`` of the disk from ``offset``: zeros, or data at ``host``, or one compressed cluster."""

    offset: int
    clusters: int
    host: int | None = None
    packed: CompressedEntry | None = None


@dataclass(slots=True)
class _Run:
    """As many clusters of one kind as can be read at once. ``host`` None and nothing ``packed``: zeros."""

    offset: int
    length: int
    host: int | None
    packed: list[CompressedEntry]

    @property
    def end(self) -> int:
        return self.offset + self.length

    def continues_with(self, cluster: _Cluster, batch: int) -> bool:
        """Whether the next cluster may be added; of compressed ones there are at most ``batch``."""
        if cluster.offset != self.end:
            return False
        if cluster.packed or self.packed:
            return bool(cluster.packed) and 0 < len(self.packed) < batch
        return cluster.host == (None if self.host is None else self.host + self.length)


class _Overcommitted(ArchiveDamaged):
    """The tables name more than the file has: there is no end to going on."""


class _Tables:
    """Walks L1 and L2. No more clusters are given out than the file can hold, however often tables name them."""

    def __init__(self, source: ByteSource, header: Header, on_damage: OnDamage) -> None:
        self._source = source
        self._on_damage = on_damage
        self._name = source.name
        self._bits = header.cluster_bits
        self._cluster_bytes = 1 << header.cluster_bits
        self._l2_entries = self._cluster_bytes // ENTRY_BYTES
        self._reserved = RESERVED_L2 if header.version >= 3 else RESERVED_L2 | ZERO
        self._clusters = clusters_for(header.size_bytes, self._cluster_bytes)
        self._header = header
        self._file_bytes = source.size_bytes or 0
        self._claimed_bytes = 0

    def clusters(self) -> Iterator[_Cluster]:
        """All of the disk, in order, without what is damaged."""
        needed = clusters_for(self._clusters, self._l2_entries)
        l1 = from_bytes(read_at(self._source, self._header.l1_offset, needed * ENTRY_BYTES, "the L1 table"))
        for index, entry in enumerate(l1):
            first = index * self._l2_entries
            count = min(self._l2_entries, self._clusters - first)
            if not entry:
                yield _Cluster(first * self._cluster_bytes, count)
                continue
            try:
                table = self._l2_table(index, entry, count)
            except ArchiveDamaged as error:
                self._lose(error, self._header.l1_offset + index * ENTRY_BYTES, first, count)
            else:
                yield from self._l2_clusters(table, entry & OFFSET_MASK, first)

    def _l2_table(self, index: int, entry: int, count: int) -> array[int]:
        """Its first ``count`` entries."""
        if entry & RESERVED_L1:
            raise ArchiveDamaged(f"{self._name}: entry {index} of the L1 table is {entry:#x}")
        offset = entry & OFFSET_MASK
        self._claim(offset, self._cluster_bytes, self._cluster_bytes, "an L2 table")
        return from_bytes(read_at(self._source, offset, count * ENTRY_BYTES, "an L2 table"))

    def _l2_clusters(self, table: array[int], table_offset: int, first: int) -> Iterator[_Cluster]:
        unallocated = 0
        for number, entry in enumerate(table, first):
            if not entry:
                unallocated += 1
                continue
            if unallocated:
                yield _Cluster((number - unallocated) * self._cluster_bytes, unallocated)
                unallocated = 0
            try:
                cluster = self._cluster(number * self._cluster_bytes, entry)
            except ArchiveDamaged as error:
                self._lose(error, table_offset + (number - first) * ENTRY_BYTES, number, 1)
            else:
                yield cluster
        if unallocated:
            yield _Cluster((first + len(table) - unallocated) * self._cluster_bytes, unallocated)

    def _lose(self, error: ArchiveDamaged, at: int, first: int, count: int) -> None:
        """``at``: byte of the entry that leads nowhere."""
        if isinstance(error, _Overcommitted):
            raise error
        start, end = first * self._cluster_bytes, (first + count) * self._cluster_bytes
        lost = ByteRange(start, min(end, self._header.size_bytes) - start)
        self._on_damage(error, at, lost)

    def _cluster(self, offset: int, entry: int) -> _Cluster:
        if entry & COMPRESSED:
            return _Cluster(offset, 1, packed=self._packed(entry))
        if entry & ZERO and not entry & self._reserved:
            return _Cluster(offset, 1)
        return _Cluster(offset, 1, host=self._host(entry, offset))

    def _host(self, entry: int, offset: int) -> int:
        host = entry & OFFSET_MASK
        if entry & self._reserved or not host:
            raise ArchiveDamaged(f"{self._name}: the L2 entry of byte {offset} of the disk is {entry:#x}")
        needed = min(self._cluster_bytes, self._header.size_bytes - offset)
        self._claim(host, needed, self._cluster_bytes, f"the cluster of byte {offset} of the disk")
        return host

    def _packed(self, entry: int) -> CompressedEntry:
        packed = parse_compressed(entry, self._bits)
        least = max(1, packed.length - 2 * SECTOR_BYTES + 2)
        if packed.offset + least > self._file_bytes:
            raise ArchiveDamaged(
                f"{self._name}: a compressed cluster at {packed.offset} lies beyond the end of the file"
            )
        self._count(least)
        return packed

    def _claim(self, offset: int, length: int, alignment: int, what: str) -> None:
        if offset % alignment or not 0 < offset <= self._file_bytes - length:
            raise ArchiveDamaged(f"{self._name}: {what} is said to be at byte {offset}, which cannot be")
        self._count(length)

    def _count(self, length: int) -> None:
        self._claimed_bytes += length
        if self._claimed_bytes > self._file_bytes:
            raise _Overcommitted(f"{self._name}: its tables name the same clusters again and again")


def _runs(clusters: Iterable[_Cluster], cluster_bytes: int, size_bytes: int) -> Iterator[_Run]:
    """Neighbours put together: zeros, what lies together in the file, and compressed ones up to a batch."""
    batch = batch_of(cluster_bytes)
    run: _Run | None = None
    for cluster in clusters:
        if run is None or not run.continues_with(cluster, batch):
            if run is not None:
                yield run
            run = _Run(cluster.offset, 0, cluster.host, [])
        run.length = min(run.length + cluster.clusters * cluster_bytes, size_bytes - run.offset)
        if cluster.packed:
            run.packed.append(cluster.packed)
    if run is not None:
        yield run


def _check_supported(header: Header, name: str) -> None:
    if header.version not in (2, 3):
        raise ArchiveUnsupported(f"{name}: version {header.version} of qcow2; 2 and 3 are read")
    if header.backing_offset:
        raise ArchiveUnsupported(
            f"{name}: the image has a backing file; make a whole one of both with `qemu-img convert -O qcow2`"
        )
    if header.crypt_method:
        raise ArchiveUnsupported(f"{name}: the image is encrypted; decrypt it with `qemu-img convert`")
    if header.incompatible & Incompatible.EXTERNAL_DATA:
        raise ArchiveUnsupported(f"{name}: the image has its data in another file; join them with `qemu-img convert`")
    if header.incompatible & Incompatible.EXTENDED_L2:
        raise ArchiveUnsupported(f"{name}: the image has extended L2 entries; convert it with `qemu-img convert`")
    if header.incompatible & ~_READABLE:
        raise ArchiveUnsupported(
            f"{name}: the image needs features {header.incompatible & ~_READABLE:#x}, not known here"
        )
    if header.compression not in (ZLIB, ZSTD):
        raise ArchiveUnsupported(f"{name}: compression of kind {header.compression}; zlib (0) and zstd (1) are read")


def _check_sound(header: Header, name: str) -> None:
    """:raise ArchiveDamaged: when the header's numbers cannot be."""
    if header.incompatible & Incompatible.CORRUPT:
        raise ArchiveDamaged(f"{name}: QEMU marked the image as corrupt; see `qemu-img check`")
    if header.cluster_bits not in _CLUSTER_BITS:
        raise ArchiveDamaged(f"{name}: clusters of 2**{header.cluster_bits} bytes")
    if header.version >= 3 and header.header_length < V3_HEADER_BYTES:
        raise ArchiveDamaged(f"{name}: a header of {header.header_length} bytes")
    if header.size_bytes > MAX_DISK_BYTES:
        raise ArchiveDamaged(f"{name}: a disk of {header.size_bytes} bytes")
    if header.compression and not header.incompatible & Incompatible.COMPRESSION:
        raise ArchiveDamaged(f"{name}: compression of kind {header.compression} without the bit that goes with it")
    clusters = clusters_for(header.size_bytes, 1 << header.cluster_bits)
    entries = clusters_for(clusters, (1 << header.cluster_bits) // ENTRY_BYTES)
    if header.l1_entries < entries or entries * ENTRY_BYTES > _MAX_L1_BYTES:
        raise ArchiveDamaged(f"{name}: an L1 table of {header.l1_entries} entries for {header.size_bytes} bytes")
    if entries and header.l1_offset < V2_HEADER_BYTES:
        raise ArchiveDamaged(f"{name}: an L1 table at byte {header.l1_offset}")
