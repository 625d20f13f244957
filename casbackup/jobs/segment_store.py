"""Storing the segments, tree nodes and configs of one session, and counting what that took.

A segment's leaf is asked for first; if the other side has it, it has all its chunks (the closure invariant), and the
segment is done with one look-up. Otherwise the chunks that are missing are compressed and sent, then the leaf. Nobody
waits for what is sent, so what was new among it is counted when that is known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from blake3 import blake3

from casbackup.buffers import ByteBuffer
from casbackup.chunking.block_sample import BlockSampleChunker, Span
from casbackup.codec.codec import Codec
from casbackup.ids import ZERO_ID, BlobId
from casbackup.jobs.segments import Filled
from casbackup.progress import Progress
from casbackup.spec.config import RepositoryConfig
from casbackup.spec.manifest import BackupStats, ConfigRecord
from casbackup.spec.node import Extent, zero_extent
from casbackup.spec.record import BlobKind, Record
from casbackup.store.writer import StoredBytes
from casbackup.tree.builder import leaf_bytes


class Sending(Protocol):
    """The part of ``PeerSession`` that this needs."""

    def missing(self, ids: Sequence[BlobId]) -> set[BlobId]: ...

    def missing_leaf(self, leaf: BlobId, chunks: Sequence[BlobId]) -> set[BlobId]: ...

    def send_soon(self, records: Sequence[Record], then: Callable[[StoredBytes], None]) -> None: ...

    def settle(self) -> None: ...


class SegmentStore:
    """Safe from several threads. ``done_bytes``: bytes of disks that are accounted for."""

    def __init__(self, session: Sending, config: RepositoryConfig, codec: Codec, progress: Progress) -> None:
        self._session = session
        self._codec = codec
        self._ids = codec.ids
        self._progress = progress
        self._level = config.compression_level
        self._chunker = BlockSampleChunker(config.chunker, codec.scramble)
        self._lock = threading.Lock()
        self._read_bytes = self._zero_bytes = 0
        self._new_bytes = self._new_stored_bytes = self._new_chunks = 0
        self.done_bytes = 0

    def segment(self, buffer: ByteBuffer, view: memoryview, filled: Filled) -> BlobId:
        """Store one segment, which ``buffer`` holds and ``view`` shows; returns its leaf's id."""
        spans = self._chunker.spans(buffer, filled.length)
        extents = _extents(view, spans, self._ids.chunk)
        node = leaf_bytes(extents)
        if node is None:
            self._count(filled, zero_bytes=filled.length)
            return ZERO_ID
        leaf = self._ids.id(BlobKind.NODE, node)
        zero_bytes = sum(s.length for s in spans if s.is_zero)
        self._count(filled, zero_bytes)
        places = _places(spans, extents)
        missing = self._session.missing_leaf(leaf, list(places))
        self._send_chunks(view, places, missing, filled.length - zero_bytes)
        if leaf in missing:
            self._send_node(leaf, node)
        return leaf

    def part(self, buffer: ByteBuffer, view: memoryview, filled: Filled) -> list[Extent]:
        """Store the chunks of a part of a segment, cut on its own; ``leaf`` comes when all parts are stored."""
        spans = self._chunker.spans(buffer, filled.length)
        extents = _extents(view, spans, self._ids.chunk)
        zero_bytes = sum(s.length for s in spans if s.is_zero)
        self._count(filled, zero_bytes)
        places = _places(spans, extents)
        self._send_chunks(view, places, self._session.missing(list(places)), filled.length - zero_bytes)
        return extents

    def leaf(self, extents: Sequence[Extent]) -> BlobId:
        """Store the leaf of a segment whose chunks are stored; returns its id."""
        node = leaf_bytes(extents)
        return ZERO_ID if node is None else self.nodes([node])[0]

    def nodes(self, nodes: Sequence[bytes]) -> list[BlobId]:
        """Store nodes whose children are stored; returns their ids. What the tree builder asks for."""
        ids = [self._ids.id(BlobKind.NODE, node) for node in nodes]
        missing = self._session.missing(list(dict.fromkeys(ids)))
        for identity, node in zip(ids, nodes, strict=True):
            if identity in missing:
                self._send_node(identity, node)
        return ids

    def config(self, name: str, content: bytes) -> ConfigRecord:
        record = self._codec.encode_blob(BlobKind.CONFIG, content, self._level)
        if self._session.missing([record.id]):
            self._session.send_soon([record], self._count_stored)
        return ConfigRecord(name, len(content), record.id)

    def count_read(self, length: int) -> None:
        """Count bytes that were read, where ``Filled`` did not say so."""
        with self._lock:
            self._read_bytes += length

    def known_zeros(self, length: int) -> None:
        """Count bytes that are zero without anybody having read them."""
        with self._lock:
            self.done_bytes += length
            self._zero_bytes += length
        self._progress.advance(done=length, zero=length)

    def known_reused(self, length: int) -> None:
        """Count bytes that an earlier snapshot has, without anybody having read them."""
        with self._lock:
            self.done_bytes += length

    def stats(self, duration_ms: int) -> BackupStats:
        """Once all is sent; waits until it is known what of it was new."""
        self._session.settle()
        return BackupStats(
            read_bytes=self._read_bytes,
            zero_bytes=self._zero_bytes,
            reused_bytes=self.done_bytes - self._zero_bytes - self._new_bytes,
            new_bytes=self._new_bytes,
            new_stored_bytes=self._new_stored_bytes,
            new_chunks=self._new_chunks,
            duration_ms=duration_ms,
        )

    def _send_chunks(self, view: memoryview, places: dict[BlobId, Span], missing: set[BlobId], content: int) -> None:
        """Send those that are missing of chunks that have ``content`` bytes together."""
        wanted = {chunk: span for chunk, span in places.items() if chunk in missing}
        if not wanted:
            self._progress.advance(reused=content)
            return
        blobs = [(chunk, view[s.offset : s.offset + s.length]) for chunk, s in wanted.items()]
        records = self._codec.encode_all(BlobKind.CHUNK, blobs, self._level)
        self._session.send_soon(records, lambda stored: self._count_new(stored, content))

    def _send_node(self, node: BlobId, plain: bytes) -> None:
        self._session.send_soon([self._codec.encode(BlobKind.NODE, node, plain, self._level)], self._count_stored)

    def _count(self, filled: Filled, zero_bytes: int) -> None:
        with self._lock:
            self.done_bytes += filled.length
            self._read_bytes += filled.read_bytes
            self._zero_bytes += zero_bytes
        self._progress.advance(done=filled.length, zero=zero_bytes)

    def _count_new(self, chunks: StoredBytes, content: int) -> None:
        """Of chunks with so many bytes of content, these were new."""
        self._count_stored(chunks)
        with self._lock:
            self._new_bytes += chunks.plain_bytes
            self._new_chunks += chunks.blobs
        self._progress.advance(reused=content - chunks.plain_bytes, new=chunks.plain_bytes)

    def _count_stored(self, stored: StoredBytes) -> None:
        with self._lock:
            self._new_stored_bytes += stored.stored_bytes


def _places(spans: Sequence[Span], extents: Sequence[Extent]) -> dict[BlobId, Span]:
    """Where each distinct chunk lies."""
    return {e.id: s for s, e in zip(spans, extents, strict=True) if not s.is_zero}


def _extents(view: memoryview, spans: Sequence[Span], key: bytes) -> list[Extent]:
    return [
        zero_extent(s.length)
        if s.is_zero
        else Extent(s.length, 0, BlobId(blake3(view[s.offset : s.offset + s.length], key=key).digest()))
        for s in spans
    ]
