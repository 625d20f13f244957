"""The disks of a snapshot for programs that read them as they like: NBD clients, guests, a mounted folder.

reads --> ServedDisk --> SegmentMap --> ChunkCache --> Peer
               |                            ^
               `--> Streams --> Prefetcher -'
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from casbackup.block.device import Capabilities, Closing, Extent, merged
from casbackup.errors import CasbackupError, DataDamage, TargetUnwritable
from casbackup.fs import Buffer
from casbackup.limits import BLOCK_BYTES, SEGMENT_BYTES, SERVED_CACHE_BYTES
from casbackup.peer.api import Peer
from casbackup.peer.chunkcache import ChunkCache
from casbackup.peer.prefetch import Prefetcher
from casbackup.peer.segmentmap import SegmentMap
from casbackup.peer.streams import Streams
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import DiskRecord

_MOST_COMPLAINTS = 1000
"""Ranges of a disk that it is said of that they cannot be read; a guest that tries again says nothing new."""

_ZEROS = memoryview(bytes(SEGMENT_BYTES))

Report = Callable[[str], None]


class ReadPool(Closing):
    """Memory and threads that the disks of any number of snapshots share."""

    def __init__(self, peer: Peer, cache_bytes: int = SERVED_CACHE_BYTES) -> None:
        self.peer = peer
        self.cache = ChunkCache(peer, cache_bytes)
        self.prefetcher = Prefetcher(self.cache)
        self.most_ahead = max(1, cache_bytes // 4 // SEGMENT_BYTES)
        """Segments ahead of one disk's readers: two disks may be read so, and half of the cache is left."""

    def close(self) -> None:
        self.prefetcher.close()


class ServedSnapshot(Closing):
    """A snapshot's disks, by name. Its data stays while this is open, even if the snapshot is forgotten."""

    def __init__(self, pool: ReadPool, snapshot: Snapshot, *, report: Report) -> None:
        """``pool`` stays the caller's. ``report``: told, in any thread, once for each range that cannot be read.

        :raise SnapshotNotFound: when it was forgotten a moment ago.
        """
        self.snapshot = snapshot
        self.disks = {disk.name: ServedDisk(disk, pool, report=report) for disk in snapshot.manifest.disks}
        with contextlib.ExitStack() as stack:
            stack.enter_context(pool.peer.reading(snapshot))
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()


class ServedDisk(Closing):
    """Implements ``BlockDevice`` for reading. What is read is verified; what is lost is an error, never other bytes."""

    def __init__(self, disk: DiskRecord, pool: ReadPool, *, report: Report) -> None:
        self._name = disk.name
        self._pool = pool
        self._report = report
        self._map = SegmentMap(disk, pool.cache.get)
        self._streams = Streams(self._map.next_data, pool.most_ahead)
        self._complaints: set[tuple[int, int]] = set()
        self.size_bytes = disk.size_bytes
        self.capabilities = Capabilities(knows_zeros=True, multi_conn=True, preferred_block_bytes=BLOCK_BYTES)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """:raise DataDamage: when something in the range is lost. Errors of the peer come as they are."""
        for number in self._streams.note(offset, len(buffer)):
            self._pool.prefetcher.want(self._map, number)
        try:
            self._read(offset, buffer)
        except CasbackupError as error:
            self._complain(offset, len(buffer), error)
            raise

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """A part that is lost is data: reading it says so."""
        return merged(self._extents(offset, offset + length))

    def write(self, offset: int, data: Buffer) -> None:
        raise TargetUnwritable("a snapshot cannot be written to")

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        raise TargetUnwritable("a snapshot cannot be written to")

    def discard(self, offset: int, length: int) -> None:
        raise TargetUnwritable("a snapshot cannot be written to")

    def flush(self) -> None: ...

    def changed_size(self) -> int | None:
        return None

    def close(self) -> None: ...

    def _read(self, offset: int, buffer: memoryview) -> None:
        pieces = list(self._map.extents(offset, offset + len(buffer)))
        chunks = self._pool.cache.get([extent.id for _, extent in pieces if not extent.is_zero])
        for position, extent in pieces:
            target = buffer[position - offset : position - offset + extent.length]
            if extent.is_zero:
                _clear(target)
                continue
            plain = chunks[extent.id]
            if isinstance(plain, DataDamage):
                raise plain
            target[:] = memoryview(plain)[extent.skip : extent.skip + extent.length]

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        for span in self._map.spans(start, end):
            for run in span.runs:
                first, last = max(start, run.offset), min(end, run.end)
                if first < last:
                    yield Extent(first, last - first, run.zero)

    def _complain(self, offset: int, length: int, error: CasbackupError) -> None:
        if (offset, length) not in self._complaints and len(self._complaints) < _MOST_COMPLAINTS:
            self._complaints.add((offset, length))
            self._report(f"{self._name}: {length} bytes at {offset} cannot be read: {error.message}")


def _clear(target: memoryview) -> None:
    for start in range(0, len(target), SEGMENT_BYTES):
        piece = target[start : start + SEGMENT_BYTES]
        piece[:] = _ZEROS[: len(piece)]
