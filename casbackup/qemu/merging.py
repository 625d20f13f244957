"""Two streams of old data become one: what QEMU pushes before it is overwritten, and what we pull."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from casbackup.block.filters.clusters import ClusterMap
from casbackup.block.spool import Consumer
from casbackup.errors import BackupBroken
from casbackup.limits import SEGMENT_BYTES

_MISSING, _CLAIMED, _DONE = 0, 1, 2
_LOOK_S = 0.2


class Merger:
    """Passes each wanted cluster on once, whoever brings it first: both bring the same. Any number of threads.

    As a consumer it takes what is pushed. The consumer behind it is called by one thread at a time.
    """

    def __init__(self, consumer: Consumer, sizes: Sequence[int]) -> None:
        """``sizes``: of the disks, in bytes. All of them is wanted, until ``want_only`` says otherwise."""
        self._consumer = consumer
        self._maps = [ClusterMap(size) for size in sizes]
        self._sizes = sizes
        self._hot: dict[tuple[int, int], None] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.taken_bytes = 0
        """What was passed on, but for zeros."""
        self.wanted_bytes = sum(sizes)
        self.left_bytes = self.wanted_bytes
        """What is wanted and has not come yet."""

    def want_only(self, disk: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Of one disk nothing but the clusters that these ranges, (offset, length), touch."""
        wanted = ClusterMap(self._sizes[disk])
        for offset, length in ranges:
            wanted.mark(_CLAIMED, *wanted.touching(offset, length))
        with self._changed:
            for run in wanted.runs(0, len(wanted)):
                if run.state != _CLAIMED:
                    self._leave_out(disk, run.first, run.stop)

    def close(self) -> None:
        """The backup is lost: pass nothing on any more, whoever may still bring something."""
        self._closed = True

    # --- what is pushed

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        number = int(disk)
        with self._changed:
            if number == len(self._maps):  # the VM's memory, which nobody else brings
                if not self._closed:
                    self._consumer.write(disk, offset, data)
            elif self._pass_data(number, offset, data):
                self._hot[number, offset // SEGMENT_BYTES] = None

    def zero(self, disk: str, offset: int, length: int) -> None:
        with self._changed:
            self._pass_zeros(int(disk), offset, length)

    # --- what is pulled

    def next_hot(self) -> tuple[int, int] | None:
        """A disk and the number of a segment of which a part was pushed: the sooner it is complete, the better.

        Each is told of once at a time.
        """
        with self._changed:
            oldest = next(iter(self._hot), None)
            if oldest is not None:
                del self._hot[oldest]
            return oldest

    def missing(self, disk: int, offset: int, length: int) -> list[tuple[int, int]]:
        """The ranges of whole clusters, (offset, length), that nobody has brought or claimed."""
        with self._changed:
            return self._missing(disk, offset, length)

    def claim(self, disk: int, offset: int, length: int) -> list[tuple[int, int]]:
        """The same; the caller is going to bring them, and nobody else is told to."""
        with self._changed:
            ranges = self._missing(disk, offset, length)
            clusters = self._maps[disk]
            for start, count in ranges:
                clusters.mark(_CLAIMED, *clusters.touching(start, count))
            return ranges

    def pull(self, disk: int, offset: int, data: memoryview) -> None:
        """What was claimed has been read. Errors of the consumer."""
        with self._changed:
            self._pass_data(disk, offset, data)

    def pull_zeros(self, disk: int, offset: int, length: int) -> None:
        """What was claimed is zero. Errors of the consumer."""
        with self._changed:
            self._pass_zeros(disk, offset, length)

    def wait_pushed(self, disk: int, offset: int, timeout_s: float, stop: threading.Event) -> bool:
        """Wait until somebody else has brought the cluster at ``offset``. False when nobody has, or at ``stop``."""
        clusters = self._maps[disk]
        first, after = clusters.touching(offset, 1)
        with self._changed:
            while timeout_s > 0 and not stop.is_set() and not clusters.any(_DONE, first, after):
                self._changed.wait(_LOOK_S)
                timeout_s -= _LOOK_S
            return clusters.any(_DONE, first, after)

    # --- the condition is held

    def _leave_out(self, disk: int, first: int, stop: int) -> None:
        clusters = self._maps[disk]
        for run in list(clusters.runs(first, stop)):
            _offset, length = clusters.span(run.first, run.stop)
            self.wanted_bytes -= length
            if run.state != _DONE:
                self.left_bytes -= length
        clusters.mark(_DONE, first, stop)

    def _missing(self, disk: int, offset: int, length: int) -> list[tuple[int, int]]:
        clusters = self._maps[disk]
        runs = clusters.runs(*clusters.touching(offset, length))
        return [clusters.span(run.first, run.stop) for run in runs if run.state == _MISSING]

    def _wanted(self, disk: int, offset: int, length: int) -> list[tuple[int, int]]:
        """The ranges that have not been passed on. They are now, by the caller.

        :raise BackupBroken: for a part of a cluster.
        """
        if self._closed:
            return []
        clusters = self._maps[disk]
        first, stop = clusters.touching(offset, length)
        if clusters.within(offset, length) != (first, stop):
            raise BackupBroken(f"{length} bytes at {offset} are not whole clusters")
        ranges = [clusters.span(run.first, run.stop) for run in clusters.runs(first, stop) if run.state != _DONE]
        clusters.mark(_DONE, first, stop)
        self.left_bytes -= sum(length for _start, length in ranges)
        self._changed.notify_all()
        return ranges

    def _pass_data(self, disk: int, offset: int, data: memoryview) -> bool:
        """Whether any of it was wanted."""
        ranges = self._wanted(disk, offset, len(data))
        for start, length in ranges:
            self._consumer.write(str(disk), start, data[start - offset : start - offset + length])
            self.taken_bytes += length
        return bool(ranges)

    def _pass_zeros(self, disk: int, offset: int, length: int) -> None:
        for start, count in self._wanted(disk, offset, length):
            self._consumer.zero(str(disk), start, count)
