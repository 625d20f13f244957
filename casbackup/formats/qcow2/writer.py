"""Writing in one pass: with the map of the disk all tables are known beforehand and come first.

    header | refcount table | refcount blocks | L1 table | L2 tables | data clusters in the order of the disk

What is zero is not allocated, and neither is an L2 table for 512 MiB of zeros: that reads as zeros in an image without
backing file. Entries with the flag ZERO would say the same at the price of 8 bytes for each 64 KiB of nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from casbackup.formats.mappedstream import MappedStream, rounded
from casbackup.formats.port import ArchiveHead, ByteRange, ByteTarget
from casbackup.formats.qcow2.layout import (
    COPIED,
    ENTRY_BYTES,
    HEADER_BYTES,
    ZLIB,
    Header,
    Incompatible,
    clusters_for,
    empty_table,
    encode_header,
    padded_table,
    to_bytes,
)
from casbackup.formats.single import SECTOR_BYTES, sectors_for
from casbackup.fs import Buffer
from casbackup.units import KiB

CLUSTER_BITS = 16
CLUSTER_BYTES = 64 * KiB
L2_ENTRIES = CLUSTER_BYTES // ENTRY_BYTES
REFCOUNT_ORDER = 4
REFCOUNTS_IN_BLOCK = CLUSTER_BYTES // 2


class Tables(NamedTuple):
    """How many clusters each part of an image takes; the first one is the header."""

    refcount_table: int
    refcount_blocks: int
    l1: int

    @property
    def clusters(self) -> int:
        return 1 + self.refcount_table + self.refcount_blocks + self.l1


def l1_entries(size_bytes: int) -> int:
    """At least one, so that the L1 table has a cluster that is no leak."""
    return max(1, clusters_for(size_bytes, CLUSTER_BYTES * L2_ENTRIES))


def planned_tables(size_bytes: int, other_clusters: int) -> Tables:
    """``other_clusters``: L2 tables and data. The refcounts count their own clusters too."""
    l1 = clusters_for(l1_entries(size_bytes) * ENTRY_BYTES, CLUSTER_BYTES)
    tables = Tables(1, 1, l1)
    while True:
        blocks = clusters_for(tables.clusters + other_clusters, REFCOUNTS_IN_BLOCK)
        following = Tables(clusters_for(blocks * ENTRY_BYTES, CLUSTER_BYTES), blocks, l1)
        if following == tables:
            return tables
        tables = following


def header_of(size_bytes: int, l1_offset: int, refcount_offset: int, refcount_clusters: int, compression: int) -> bytes:
    """One cluster."""
    header = Header(
        version=3,
        backing_offset=0,
        backing_length=0,
        cluster_bits=CLUSTER_BITS,
        size_bytes=sectors_for(size_bytes) * SECTOR_BYTES,
        crypt_method=0,
        l1_entries=l1_entries(size_bytes),
        l1_offset=l1_offset,
        refcount_offset=refcount_offset,
        refcount_clusters=refcount_clusters,
        snapshots=0,
        snapshots_offset=0,
        incompatible=0 if compression == ZLIB else Incompatible.COMPRESSION,
        compatible=0,
        autoclear=0,
        refcount_order=REFCOUNT_ORDER,
        header_length=HEADER_BYTES,
        compression=compression,
    )
    return encode_header(header).ljust(CLUSTER_BYTES, b"\0")


class StreamedOutput:
    """An uncompressed image, to a pipe if need be."""

    def __init__(self, target: ByteTarget, head: ArchiveHead, ranges: Sequence[ByteRange]) -> None:
        size_bytes = head.disks[0].size_bytes
        self._target = target
        self._write_tables(size_bytes, ranges)
        self._stream = MappedStream(target, rounded(ranges, CLUSTER_BYTES))

    def write(self, disk: int, offset: int, data: Buffer) -> None:
        """:raise ValueError: when it comes out of order, or lies outside the map and is not zero."""
        self._stream.write(offset, data)

    def zeros(self, disk: int, offset: int, length: int) -> None:
        """:raise ValueError: when they come out of order."""
        self._stream.zeros(offset, length)

    def finish(self) -> None:
        self._stream.finish()

    def _write_tables(self, size_bytes: int, ranges: Sequence[ByteRange]) -> None:
        used = _used_tables(ranges)
        data_clusters = sum(piece.length for piece in rounded(ranges, CLUSTER_BYTES)) // CLUSTER_BYTES
        tables = planned_tables(size_bytes, len(used) + data_clusters)
        blocks_at = 1 + tables.refcount_table
        l1_at = blocks_at + tables.refcount_blocks
        l2_at = l1_at + tables.l1
        self._target.write([header_of(size_bytes, l1_at * CLUSTER_BYTES, CLUSTER_BYTES, tables.refcount_table, ZLIB)])
        self._target.write([padded_table(offsets(blocks_at, tables.refcount_blocks), CLUSTER_BYTES)])
        self._write_refcounts(l2_at + len(used) + data_clusters)
        l1 = empty_table(l1_entries(size_bytes))
        for number, index in enumerate(used):
            l1[index] = (l2_at + number) * CLUSTER_BYTES | COPIED
        self._target.write([padded_table(l1, CLUSTER_BYTES)])
        for table in _l2_tables(ranges, (l2_at + len(used)) * CLUSTER_BYTES):
            self._target.write([to_bytes(table)])

    def _write_refcounts(self, clusters: int) -> None:
        """1 for each cluster of the file."""
        ones = b"\0\1" * REFCOUNTS_IN_BLOCK
        for first in range(0, clusters, REFCOUNTS_IN_BLOCK):
            self._target.write([ones[: 2 * (clusters - first)].ljust(CLUSTER_BYTES, b"\0")])


def offsets(first_cluster: int, count: int) -> range:
    return range(first_cluster * CLUSTER_BYTES, (first_cluster + count) * CLUSTER_BYTES, CLUSTER_BYTES)


def _pieces(ranges: Sequence[ByteRange]) -> Iterator[tuple[int, int, int]]:
    """(L2 table, first entry, count) of all data, cut where tables end."""
    for piece in rounded(ranges, CLUSTER_BYTES):
        cluster, end = piece.offset // CLUSTER_BYTES, piece.end // CLUSTER_BYTES
        while cluster < end:
            table, first = divmod(cluster, L2_ENTRIES)
            count = min(end - cluster, L2_ENTRIES - first)
            yield table, first, count
            cluster += count


def _used_tables(ranges: Sequence[ByteRange]) -> array[int]:
    """Ascending."""
    used = array("Q")
    for table, _, _ in _pieces(ranges):
        if not used or used[-1] != table:
            used.append(table)
    return used


def _l2_tables(ranges: Sequence[ByteRange], data_offset: int) -> Iterator[array[int]]:
    """Those with data, in order; the clusters of data lie one behind the other from ``data_offset`` on."""
    entries, current = empty_table(L2_ENTRIES), -1
    for table, first, count in _pieces(ranges):
        if table != current and current >= 0:
            yield entries
            entries = empty_table(L2_ENTRIES)
        current = table
        end = data_offset + count * CLUSTER_BYTES
        entries[first : first + count] = array("Q", range(data_offset | COPIED, end | COPIED, CLUSTER_BYTES))
        data_offset = end
    if current >= 0:
        yield entries
