"""Writing with compressed clusters: where a cluster goes depends on the sizes before it, so the tables come last.

    header | data in the order in which it came | L2 tables | L1 table | refcount table | refcount blocks

The header is written when everything else is: until then the file is no image.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from casbackup.errors import ArchiveIncomplete
from casbackup.formats.parallel import batch_of, mapped
from casbackup.formats.port import ArchiveHead, ByteTarget
from casbackup.formats.qcow2.compression import Compress
from casbackup.formats.qcow2.layout import (
    COPIED,
    clusters_for,
    empty_table,
    encode_compressed,
    padded_table,
    to_bytes,
)
from casbackup.formats.qcow2.writer import (
    CLUSTER_BITS,
    CLUSTER_BYTES,
    L2_ENTRIES,
    header_of,
    l1_entries,
    offsets,
    planned_tables,
)
from casbackup.formats.zeros import is_zero
from casbackup.fs import Buffer

_BATCH = batch_of(CLUSTER_BYTES)


class CompressedOutput:
    """Takes clusters in any order. Of the tables those are in memory that are used: at most 128 MiB for 1 TiB."""

    def __init__(self, target: ByteTarget, head: ArchiveHead, compression: int, compress: Compress) -> None:
        """``target`` is seekable."""
        self._target = target
        self._disk = head.disks[0]
        self._compression = compression
        self._compress = compress
        self._tables: dict[int, array[int]] = {}
        self._given_bytes = 0
        self._space = _Space(target)

    def write(self, disk: int, offset: int, data: Buffer) -> None:
        """:raise ValueError: when a cluster comes twice."""
        self._given_bytes += len(data)
        view = memoryview(data)
        starts = [s for s in range(0, len(view), CLUSTER_BYTES) if not is_zero(view[s : s + CLUSTER_BYTES])]
        for first in range(0, len(starts), _BATCH):
            batch = starts[first : first + _BATCH]
            clusters = [_whole(view[start : start + CLUSTER_BYTES]) for start in batch]
            for start, cluster, packed in zip(batch, clusters, mapped(self._compress, clusters), strict=True):
                self._set_entry((offset + start) // CLUSTER_BYTES, self._store(cluster, packed))

    def zeros(self, disk: int, offset: int, length: int) -> None:
        self._given_bytes += length

    def finish(self) -> None:
        """:raise ArchiveIncomplete: when not all of the disk was given."""
        if self._given_bytes < self._disk.size_bytes:
            missing = self._disk.size_bytes - self._given_bytes
            raise ArchiveIncomplete(f"disk {self._disk.name} lacks {missing} bytes")
        l1 = empty_table(l1_entries(self._disk.size_bytes))
        for index in sorted(self._tables):
            l1[index] = self._space.put_clusters(to_bytes(self._tables.pop(index))) | COPIED
        self._write_rest(padded_table(l1, CLUSTER_BYTES))

    def _write_rest(self, l1: bytes) -> None:
        l1_offset = self._space.put_clusters(l1)
        used = self._space.next_cluster
        tables = planned_tables(self._disk.size_bytes, used - 1 - len(l1) // CLUSTER_BYTES)
        blocks_at = used + tables.refcount_table
        refcounts = self._space.refcounts(blocks_at + tables.refcount_blocks)
        table_offset = self._space.put_clusters(padded_table(offsets(blocks_at, tables.refcount_blocks), CLUSTER_BYTES))
        self._space.put_clusters(padded_table(refcounts, CLUSTER_BYTES, "H"))
        self._target.seek(0)
        self._target.write(
            [header_of(self._disk.size_bytes, l1_offset, table_offset, tables.refcount_table, self._compression)]
        )

    def _store(self, cluster: Buffer, packed: bytes) -> int:
        """Write a cluster in the form that is smaller; returns its entry."""
        if len(packed) >= CLUSTER_BYTES:
            return self._space.put_clusters(cluster) | COPIED
        return encode_compressed(self._space.put_packed(packed), len(packed), CLUSTER_BITS)

    def _set_entry(self, cluster: int, entry: int) -> None:
        index, place = divmod(cluster, L2_ENTRIES)
        table = self._tables.get(index)
        if table is None:
            table = self._tables[index] = empty_table(L2_ENTRIES)
        if table[place]:
            raise ValueError(f"cluster {cluster} comes twice")
        table[place] = entry


class _Space:
    """Allocates the file's clusters and counts their uses. Compressed clusters share a cluster where they can."""

    def __init__(self, target: ByteTarget) -> None:
        self._target = target
        self._position = 0
        self._refcounts = array("H", [1])
        self._packed_end = 0
        """Up to where the last cluster with compressed ones is full; a multiple of a cluster: there is no such."""
        self._put(0, bytes(CLUSTER_BYTES))

    @property
    def next_cluster(self) -> int:
        return len(self._refcounts)

    def put_clusters(self, data: Buffer) -> int:
        """Returns the offset of ``data``, which is whole clusters."""
        offset = self.next_cluster * CLUSTER_BYTES
        self._refcounts.extend([1] * (len(data) // CLUSTER_BYTES))
        self._put(offset, data)
        return offset

    def put_packed(self, data: bytes) -> int:
        """Returns the offset of ``data``: behind what was packed before, if it fits there or may go on behind it."""
        offset = self._packed_end
        end_of_file = self.next_cluster * CLUSTER_BYTES
        room = -offset % CLUSTER_BYTES
        if (room < len(data) and offset + room < end_of_file) or not room:
            offset = end_of_file
        end = offset + len(data)
        for cluster in range(offset // CLUSTER_BYTES, clusters_for(end, CLUSTER_BYTES)):
            if cluster == self.next_cluster:
                self._refcounts.append(0)
            self._refcounts[cluster] += 1
        self._packed_end = end
        self._put(offset, data)
        return offset

    def refcounts(self, clusters: int) -> Iterable[int]:
        """Of the file as it is, and 1 for all further clusters up to this number."""
        return self._refcounts + array("H", [1]) * (clusters - self.next_cluster)

    def _put(self, offset: int, data: Buffer) -> None:
        if offset != self._position:
            self._target.seek(offset)
        self._target.write([data])
        self._position = offset + len(data)


def _whole(cluster: memoryview) -> Buffer:
    """The last cluster of a disk may be shorter; in the file it is not."""
    return cluster if len(cluster) == CLUSTER_BYTES else bytes(cluster).ljust(CLUSTER_BYTES, b"\0")
