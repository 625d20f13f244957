"""From the segments of an assembler to disk trees in a session."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Protocol

from casbackup.buffers import ByteBuffer
from casbackup.errors import ArchiveUnsupported
from casbackup.ids import BlobId
from casbackup.jobs.assembler import Part
from casbackup.jobs.segment_store import SegmentStore
from casbackup.jobs.segments import Filled
from casbackup.spec.node import MAX_EXTENTS, Extent, zero_extent

_EXTENT = Struct("<II32s")


class Leaves(Protocol):
    """What is told the leaves of a disk: a builder of a new tree, or an editor of an old one."""

    def set_leaf(self, segment: int, leaf: BlobId) -> None: ...


class TreeSink:
    """Stores what the assembler gives, and tells where the leaves are. What never comes is zero.

    Whoever reads the source counts what was read.
    """

    def __init__(self, store: SegmentStore, leaves: Sequence[Leaves]) -> None:
        self._store = store
        self._leaves = leaves

    def segment(self, disk: int, number: int, buffer: ByteBuffer, view: memoryview, length: int) -> None:
        leaf = self._store.segment(buffer, view, Filled(number, length, 0))
        self._leaves[disk].set_leaf(number, leaf)

    def part(self, disk: int, number: int, start: int, buffer: ByteBuffer, view: memoryview, length: int) -> bytes:
        extents = self._store.part(buffer, view, Filled(number, length, 0))
        return b"".join([_EXTENT.pack(*extent) for extent in extents])

    def join(self, disk: int, number: int, length: int, parts: Sequence[Part]) -> None:
        extents: list[Extent] = []
        position = 0
        for part in parts:
            extents.append(zero_extent(part.start - position))
            extents += extents_of(part)
            position = part.start + part.length
        extents.append(zero_extent(length - position))
        if len(extents) > MAX_EXTENTS:
            raise ArchiveUnsupported("the archive's data comes scattered in pieces smaller than a sector")
        self._store.known_zeros(length - sum(part.length for part in parts))
        self._leaves[disk].set_leaf(number, self._store.leaf(extents))

    def zeros(self, disk: int, offset: int, length: int) -> None:
        self._store.known_zeros(length)


def extents_of(part: Part) -> list[Extent]:
    """What ``part`` had remembered."""
    return [Extent(size, skip, BlobId(chunk)) for size, skip, chunk in _EXTENT.iter_unpack(part.memo)]
