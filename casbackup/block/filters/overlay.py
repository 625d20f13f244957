"""Writes that leave the device below as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from casbackup.block.device import BlockDevice, Extent, merged
from casbackup.block.filters.base import Filter
from casbackup.block.filters.clusters import ClusterMap, clipped
from casbackup.block.filters.ranges import RangeLocks
from casbackup.fs import Buffer

_BELOW = 0
_CHANGED = 1


class Overlay(Filter):
    """A writable device over one that is only read: what is written goes to ``scratch``, in clusters of 64 KiB.

    A write that begins or ends within a cluster which is still below copies the rest of it first. So the
    device below may be a snapshot, and ``changed`` says what to save as a new one.
    """

    def __init__(self, device: BlockDevice, scratch: BlockDevice) -> None:
        """Takes over both. ``scratch`` is writable, takes any range, and has the size of ``device``.

        :raise ValueError: when it is not so. Nothing is taken over then.
        """
        able = scratch.capabilities
        if scratch.size_bytes != device.size_bytes or not able.writable or able.min_block_bytes != 1:
            raise ValueError("the scratch space must be writable, take any range, and be as large as the device")
        super().__init__(device)
        self._scratch = scratch
        self._clusters = ClusterMap(device.size_bytes)
        self._filling = RangeLocks()
        self.capabilities = replace(
            able,
            knows_zeros=able.knows_zeros or device.capabilities.knows_zeros,
            can_trim=True,
            multi_conn=able.multi_conn and device.capabilities.multi_conn,
            min_block_bytes=device.capabilities.min_block_bytes,
        )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for source, start, length in self._parts(offset, len(buffer)):
            source.read_into(start, buffer[start - offset : start - offset + length])

    def write(self, offset: int, data: Buffer) -> None:
        first, stop = self._clusters.touching(offset, len(data))
        with self._filling.hold(first, stop):
            self._copy_edges(offset, len(data))
            self._scratch.write(offset, data)
            self._clusters.mark(_CHANGED, first, stop)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        first, stop = self._clusters.touching(offset, length)
        with self._filling.hold(first, stop):
            self._copy_edges(offset, length)
            self._scratch.write_zeros(offset, length, may_trim=may_trim)
            self._clusters.mark(_CHANGED, first, stop)

    def discard(self, offset: int, length: int) -> None:
        """Whole clusters become zero; the rest of the range stays."""
        first, stop = self._clusters.within(offset, length)
        if first < stop:
            self.write_zeros(*self._clusters.span(first, stop))

    def flush(self) -> None:
        self._scratch.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return merged(self._all_extents(offset, length))

    def changed(self) -> Iterator[Extent]:
        """What was written, in order, in whole clusters, with its zeros apart; the rest is as below.

        Made for saving: nobody should write meanwhile.
        """
        return merged(self._changed_extents())

    def changed_bytes(self) -> int:
        """How much was written, in whole clusters."""
        return self._clusters.count(_CHANGED) * self._clusters.cluster_bytes

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._scratch.close()

    def _copy_edges(self, offset: int, length: int) -> None:
        """Copy the clusters that the range covers only in part and that are still below. They are held."""
        inner = self._clusters.within(offset, length)
        first, stop = self._clusters.touching(offset, length)
        for number in {first, stop - 1}:
            if not inner[0] <= number < inner[1] and self._clusters.any(_BELOW, number, number + 1):
                start, count = self._clusters.span(number, number + 1)
                buffer = memoryview(bytearray(count))
                self._below.read_into(start, buffer)
                self._scratch.write(start, buffer)

    def _parts(self, offset: int, length: int) -> Iterator[tuple[BlockDevice, int, int]]:
        """(device, offset, length) of the pieces of a range."""
        for run in self._clusters.runs(*self._clusters.touching(offset, length)):
            start, count = self._clusters.span(run.first, run.stop)
            source = self._scratch if run.state == _CHANGED else self._below
            yield source, *clipped(offset, length, start, start + count)

    def _all_extents(self, offset: int, length: int) -> Iterator[Extent]:
        for source, start, count in self._parts(offset, length):
            yield from source.extents(start, count)

    def _changed_extents(self) -> Iterator[Extent]:
        for run in self._clusters.runs(0, len(self._clusters)):
            if run.state == _CHANGED:
                yield from self._scratch.extents(*self._clusters.span(run.first, run.stop))
