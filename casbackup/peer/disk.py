"""A disk of a snapshot as a read-only block device: any byte range, verified, with a small cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from casbackup.block.device import Capabilities, Closing, Extent, merged
from casbackup.codec.codec import Codec, grouped
from casbackup.errors import DataDamage, TargetUnwritable
from casbackup.fs import Buffer
from casbackup.ids import BlobId
from casbackup.limits import BLOCK_BYTES
from casbackup.peer.api import Peer
from casbackup.spec.manifest import DiskRecord
from casbackup.spec.record import Record
from casbackup.store.blobstore import Fetched
from casbackup.tree.reader import DiskTree
from casbackup.units import MiB

_CACHE_BYTES = 64 * MiB


def fetch_nodes(peer: Peer, ids: Sequence[BlobId]) -> Mapping[BlobId, Buffer | DataDamage]:
    """Verified plain bytes of blobs, or the error in their place."""
    return {blob_id: verified(peer.codec, record) for blob_id, record in peer.fetch(ids)}


def verified(codec: Codec, record: Record | DataDamage) -> Buffer | DataDamage:
    """The plain bytes of a fetched record, or why they cannot be had."""
    if isinstance(record, DataDamage):
        return record
    try:
        return codec.decode(record)
    except DataDamage as damage:
        return damage


def verified_each(codec: Codec, fetched: Iterable[Fetched]) -> Iterator[tuple[BlobId, Buffer | DataDamage]]:
    """``verified`` for many, which takes less time; what is lost comes last. The plain bytes of several blobs share
    memory: not for whoever keeps some of them.
    """
    lost: list[tuple[BlobId, DataDamage]] = []

    def sound() -> Iterator[Record]:
        for blob_id, record in fetched:
            if isinstance(record, DataDamage):
                lost.append((blob_id, record))
            else:
                yield record

    for group in grouped(sound()):
        yield from zip([record.id for record in group], _verified_together(codec, group), strict=True)
    yield from lost


def _verified_together(codec: Codec, records: Sequence[Record]) -> Sequence[Buffer | DataDamage]:
    try:
        return codec.decode_all(records)
    except DataDamage:
        return [verified(codec, record) for record in records]


class BlobCache:
    """Plain bytes of blobs, the least recently used dropped first. Thread-safe."""

    def __init__(self, peer: Peer, capacity_bytes: int = _CACHE_BYTES) -> None:
        self._peer = peer
        self._capacity = capacity_bytes
        self._size = 0
        self._kept: OrderedDict[BlobId, Buffer] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, ids: Sequence[BlobId]) -> dict[BlobId, Buffer | DataDamage]:
        """All of ``ids``; those not kept are fetched together."""
        found: dict[BlobId, Buffer | DataDamage] = {}
        with self._lock:
            for blob_id in ids:
                if blob_id in self._kept:
                    self._kept.move_to_end(blob_id)
                    found[blob_id] = self._kept[blob_id]
        absent = [blob_id for blob_id in dict.fromkeys(ids) if blob_id not in found]
        if absent:
            fetched = fetch_nodes(self._peer, absent)
            found.update(fetched)
            self._keep(fetched)
        return found

    def _keep(self, fetched: Mapping[BlobId, Buffer | DataDamage]) -> None:
        with self._lock:
            for blob_id, data in fetched.items():
                if isinstance(data, DataDamage) or blob_id in self._kept:
                    continue
                self._kept[blob_id] = bytes(data)  # a part of what was read together would keep all of it
                self._size += len(data)
            while self._size > self._capacity:
                _, dropped = self._kept.popitem(last=False)
                self._size -= len(dropped)


class SnapshotDisk(Closing):
    """Implements ``BlockDevice`` for reading."""

    def __init__(self, peer: Peer, disk: DiskRecord, cache: BlobCache | None = None) -> None:
        self._cache = cache or BlobCache(peer)
        self._size = disk.size_bytes
        self._tree = DiskTree(disk.root, disk.size_bytes, self._cache.get)

    @property
    def size_bytes(self) -> int:
        return self._size

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(knows_zeros=True, multi_conn=True, preferred_block_bytes=BLOCK_BYTES)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """:raise DataDamage: when something in the range is lost."""
        pieces = list(self._tree.extents(offset, offset + len(buffer)))
        chunks = self._cache.get(list(dict.fromkeys(e.id for _, e in pieces if not e.is_zero)))
        for position, extent in pieces:
            target = buffer[position - offset : position - offset + extent.length]
            if extent.is_zero:
                target[:] = bytes(extent.length)
                continue
            plain = chunks[extent.id]
            if isinstance(plain, DataDamage):
                raise plain
            target[:] = memoryview(plain)[extent.skip : extent.skip + extent.length]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return merged(Extent(at, e.length, e.is_zero) for at, e in self._tree.extents(offset, offset + length))

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
