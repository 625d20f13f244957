"""A point in time as a device that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from casbackup.block.device import Closing, Extent, merged
from casbackup.block.filters.clusters import Run, clipped
from casbackup.block.filters.point_in_time import STEP_CLUSTERS, UNSAVED, PointInTime
from casbackup.block.filters.saving import ScratchSaver
from casbackup.errors import TargetUnwritable
from casbackup.fs import Buffer

_STATUS_CLUSTERS = 1024
"""Clusters that are held while their status is taken."""

_Result = TypeVar("_Result")


class SnapshotView(Closing):
    """Read-only: clusters that were overwritten since come from the scratch space, the rest from the device.

    :raise BackupBroken: from every read once the point in time is lost; nothing wrong is ever read.
    """

    def __init__(self, point: PointInTime, saver: ScratchSaver) -> None:
        """``saver`` is that of ``point``. Closing the view ends the point in time; both stay the caller's."""
        self._point = point
        self._saver = saver
        self.size_bytes = point.device.size_bytes
        self.capabilities = replace(
            point.device.capabilities, writable=False, can_write_zeros=False, zero_is_cheap=False, can_trim=False
        )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        def read(run: Run) -> None:
            start, count = clipped(offset, len(buffer), *self._bounds(run))
            part = buffer[start - offset : start - offset + count]
            if run.state == UNSAVED:
                self._point.device.read_into(start, part)
            else:
                self._saver.read_into(start, part)

        for _nothing in self._for_runs(offset, len(buffer), STEP_CLUSTERS, read):
            pass

    def write(self, offset: int, data: Buffer) -> None:
        """:raise TargetUnwritable: always, as all that changes; a guard does not let it come here."""
        raise TargetUnwritable("a point in time cannot be written to")

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self.write(offset, b"")

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, b"")

    def flush(self) -> None:
        """There is nothing to do."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return merged(self._all_extents(offset, length))

    def changed_size(self) -> int | None:
        return self._point.device.changed_size()

    def close(self) -> None:
        self._point.end()

    def _all_extents(self, offset: int, length: int) -> Iterator[Extent]:
        def found(run: Run) -> list[Extent]:
            source = self._point.device if run.state == UNSAVED else self._saver
            return list(source.extents(*clipped(offset, length, *self._bounds(run))))

        for extents in self._for_runs(offset, length, _STATUS_CLUSTERS, found):
            yield from extents

    def _for_runs(self, offset: int, length: int, most: int, use: Callable[[Run], _Result]) -> Iterator[_Result]:
        """What ``use`` gives for each run of one state, of up to ``most`` clusters, in the range.

        Unsaved ones are held while they are used, and nothing is held when the caller goes on: it may read.
        Whether all is well is asked after each: what was read while the point in time got lost may be new.
        """
        first, stop = self._point.clusters.touching(offset, length)
        while first < stop:
            self._point.check()
            run = self._point.clusters.run_at(first, min(stop, first + most))
            if run.state == UNSAVED:
                with self._point.held(run.first, run.stop) as run:
                    result = use(run)
            else:
                result = use(run)
            self._point.check()
            yield result
            first = run.stop

    def _bounds(self, run: Run) -> tuple[int, int]:
        """Where the run begins and ends, in bytes."""
        offset, length = self._point.clusters.span(run.first, run.stop)
        return offset, offset + length
