"""Saves what no guest's write has saved, from the front to the back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

from casbackup.block.device import Extent
from casbackup.block.filters.point_in_time import STEP_CLUSTERS, UNSAVED, PointInTime
from casbackup.errors import CasbackupError
from casbackup.units import GiB
from casbackup.workers import run_workers

_ZERO_STEP_BYTES = 1 * GiB
_YIELD_S = 0.02
"""So long at the most does one step wait for guests, or a busy one would starve the backup."""


def copy_all(points: Sequence[PointInTime], workers: int) -> None:
    """Save all that is not saved yet, disk after disk, with several threads.

    :raise BackupBroken: when one of the points in time is over, as ``Background.step``.
    """
    backgrounds = [Background(point) for point in points]

    def work(stop: threading.Event) -> None:
        for background in backgrounds:
            while not stop.is_set() and background.step():
                pass

    run_workers(work, workers)


class _Claim(NamedTuple):
    """Clusters that one step takes, all zero or to be read."""

    first: int
    stop: int
    zero: bool


class Background:
    """Any number of threads take steps until one is told that nothing is left; then the others are at the end."""

    def __init__(self, point: PointInTime) -> None:
        self._point = point
        self._cursor = 0
        self._known = Extent(0, 0, False)
        self._claiming = threading.Lock()

    def step(self) -> bool:
        """Save up to 1 MiB of data or 1 GiB of zeros. False when there is nothing left to take.

        :raise BackupBroken: when the point in time is over, also by this: the device cannot be read, or the
            saver takes nothing any more.
        """
        self._point.check()
        self._point.let_guests_go_first(_YIELD_S)
        try:
            claim = self._claim()
            if claim is not None:
                self._point.save(claim.first, claim.stop, zero=claim.zero, timeout_s=None, background=True)
        except CasbackupError as error:
            self._point.fail(error)
        self._point.check()
        return claim is not None

    def _claim(self) -> _Claim | None:
        """The next clusters that are unsaved and that no other step takes."""
        clusters = self._point.clusters
        with self._claiming:
            first = clusters.next(UNSAVED, self._cursor)
            if first is None:
                return None
            offset, _length = clusters.span(first, first + 1)
            extent = self._extent_at(offset)
            if extent.zero:
                _first, stop = clusters.within(offset, extent.end - offset)
            else:
                stop = min(clusters.touching(offset, extent.end - offset)[1], first + STEP_CLUSTERS)
            zero = extent.zero and stop > first
            self._cursor = clusters.run_at(first, max(stop, first + 1)).stop
            return _Claim(first, self._cursor, zero)

    def _extent_at(self, offset: int) -> Extent:
        """The kind of what follows ``offset``. Found once for a long stretch: what is unsaved does not change."""
        if not self._known.offset <= offset < self._known.end:
            length = min(_ZERO_STEP_BYTES, self._point.device.size_bytes - offset)
            self._known = next(self._point.device.extents(offset, length))
        return self._known
