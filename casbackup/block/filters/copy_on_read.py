"""Keeps what was read in a second, faster device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

from casbackup.block.device import BlockDevice
from casbackup.block.filters.base import Filter
from casbackup.block.filters.clusters import ClusterMap, Run, clipped
from casbackup.block.filters.ranges import RangeLocks
from casbackup.errors import CasbackupError
from casbackup.fs import Buffer
from casbackup.units import MiB

_ABSENT = 0
_PRESENT = 1
_MOST_BYTES = 1 * MiB
"""Read from below at a time."""


class CopyOnRead(Filter):
    """Each cluster of 64 KiB is read from below once and then from ``cache``, which begins empty.

    Writes go to both. A cache that fails costs speed only: the cluster counts as absent from then on, and
    what the caller asked for comes from, or goes to, the device below.
    """

    def __init__(self, device: BlockDevice, cache: BlockDevice) -> None:
        """Takes over both. ``cache`` is writable, takes any range, and has the size of ``device``.

        :raise ValueError: when it is not so. Nothing is taken over then.
        """
        able = cache.capabilities
        if cache.size_bytes != device.size_bytes or not able.writable or able.min_block_bytes != 1:
            raise ValueError("the cache must be writable, take any range, and be as large as the device")
        super().__init__(device)
        self._cache = cache
        self._clusters = ClusterMap(device.size_bytes)
        self._changing = RangeLocks()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        first, stop = self._clusters.touching(offset, len(buffer))
        while first < stop:
            run = self._clusters.run_at(first, stop)
            if run.state == _ABSENT:
                run = self._fetch(run)
            self._read_run(run, offset, buffer)
            first = run.stop

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)

        def cached(start: int, length: int) -> None:
            self._cache.write(start, view[start - offset : start - offset + length])

        self._change(offset, len(view), partial(self._below.write, offset, view), cached)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        below = partial(self._below.write_zeros, offset, length, may_trim=may_trim)
        self._change(offset, length, below, self._cache.write_zeros)

    def discard(self, offset: int, length: int) -> None:
        """The cache then has zeros: whatever it holds must not contradict the extents from below."""
        self._change(offset, length, partial(self._below.discard, offset, length), self._cache.write_zeros)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._cache.close()

    def _read_run(self, run: Run, offset: int, buffer: memoryview) -> None:
        """Read what the caller wants of a run: from the cache if it is there and works."""
        start, count = self._clusters.span(run.first, run.stop)
        start, count = clipped(offset, len(buffer), start, start + count)
        part = buffer[start - offset : start - offset + count]
        if run.state == _PRESENT:
            try:
                self._cache.read_into(start, part)
                return
            except CasbackupError:
                self._clusters.mark(_ABSENT, run.first, run.stop)
        self._below.read_into(start, part)

    def _fetch(self, run: Run) -> Run:
        """Copy the beginning of an absent run to the cache. Returns the part, with the state that it has now."""
        most = _MOST_BYTES // self._clusters.cluster_bytes
        stop = min(run.stop, run.first + most)
        with self._changing.hold(run.first, stop):
            now = self._clusters.run_at(run.first, stop)
            if now.state == _PRESENT:
                return now
            start, count = self._clusters.span(now.first, now.stop)
            copy = memoryview(bytearray(count))
            self._below.read_into(start, copy)
            with contextlib.suppress(CasbackupError):
                self._cache.write(start, copy)
                self._clusters.mark(_PRESENT, now.first, now.stop)
        return self._clusters.run_at(now.first, now.stop)

    def _change(
        self, offset: int, length: int, below: Callable[[], None], cached: Callable[[int, int], object]
    ) -> None:
        """Change the device, then the same in what is cached of the range."""
        first, stop = self._clusters.touching(offset, length)
        with self._changing.hold(first, stop):
            try:
                below()
            except BaseException:
                self._clusters.mark(_ABSENT, first, stop)  # what is there now is undefined
                raise
            for run in self._clusters.runs(first, stop):
                if run.state == _PRESENT:
                    self._change_cached(run, offset, length, cached)

    def _change_cached(self, run: Run, offset: int, length: int, cached: Callable[[int, int], object]) -> None:
        start, count = self._clusters.span(run.first, run.stop)
        try:
            cached(*clipped(offset, length, start, start + count))
        except CasbackupError:
            self._clusters.mark(_ABSENT, run.first, run.stop)
