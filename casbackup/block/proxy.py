"""Disks on their way to a VM, with a filter between that backups can be taken through.

    VM -- NBD --> Guarded --> CopyBeforeWrite --> the disk
                                   |  ^
         push: spool <-- saver <---+  |   pull: SnapshotView, as the export NAME@snapshot
                                   +--+

**Pull** is for any NBD client: whoever opens ``NAME@snapshot`` reads the disk as it was when the first such
export of any disk was opened, until the last is closed. What the guest overwrites meanwhile is kept.
**Push** is for a backup in this process: nothing is kept, each cluster is read once and goes to a spool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial

from casbackup.block.device import BlockDevice, Closing
from casbackup.block.filters.background import copy_all
from casbackup.block.filters.base import Filter
from casbackup.block.filters.copy_before_write import CopyBeforeWrite, Start, begin_together
from casbackup.block.filters.point_in_time import Policy
from casbackup.block.filters.saving import ScratchSaver, SpoolSaver
from casbackup.block.filters.snapshot_view import SnapshotView
from casbackup.block.filters.trace import Record, Trace
from casbackup.block.guard import Guarded
from casbackup.block.nbd.exports import Export
from casbackup.block.spool import Spool
from casbackup.errors import BackupBroken

SNAPSHOT_SUFFIX = "@snapshot"

Scratch = Callable[[int], BlockDevice]
"""Makes the scratch space for a disk of so many bytes: ``SparseMemory`` or ``temporary_device``."""

Report = Callable[[str, Record], None]


def _nobody(_export: str, _record: Record) -> None:
    """Nobody wants to know."""


class DiskProxy(Closing):
    """Some disks of one VM. ``exports`` is what an NBD server is to offer."""

    def __init__(
        self,
        disks: Mapping[str, BlockDevice],
        *,
        scratch: Scratch,
        limit_bytes: int,
        policy: Policy | None = None,
        report: Report = _nobody,
    ) -> None:
        """Takes over ``disks``, which are by name.

        ``scratch``, ``limit_bytes``: where what the guest overwrites is kept for readers, and how much for each
        disk. Beyond that, by the ``policy``, the snapshot breaks or the guest's write does.

        ``report``: gets a record of each call on an export, with the export's name.
        """
        self._report = report
        self._disks = {name: CopyBeforeWrite(disk) for name, disk in disks.items()}
        self._live = {name: self._traced(name, disk) for name, disk in self._disks.items()}
        self._scratch = scratch
        self._limit_bytes = limit_bytes
        self._policy = policy or Policy()
        self._views: dict[str, SnapshotView] = {}
        self._readers = 0
        self._lock = threading.Lock()

    @property
    def exports(self) -> list[Export]:
        """Each disk, and each disk's snapshot."""
        live = [Export.of(name, disk, description="live") for name, disk in self._live.items()]
        snapshots = [
            Export(name + SNAPSHOT_SUFFIX, partial(self._open_snapshot, name), description="as of the first connection")
            for name in self._disks
        ]
        return live + snapshots

    def push(self, spool: Spool, *, workers: int = 2) -> None:
        """Hand the disks as they are now to the consumer of ``spool``, while the guest goes on.

        :raise BackupBroken: when it was given up for the guest's sake, or the consumer failed. The spool is
            broken, too, then.
        :raise ValueError: when a snapshot is being read.
        """
        starts = [Start(disk, SpoolSaver(spool, name)) for name, disk in self._disks.items()]
        points = begin_together(starts, self._policy)
        try:
            copy_all(points, workers)
            spool.finish()
        except BackupBroken as error:
            spool.fail(error)
            raise
        finally:
            for point in points:
                point.end()

    def close(self) -> None:
        """Close the disks. Nobody is using them any more."""
        for disk in self._live.values():
            disk.close()

    def _open_snapshot(self, name: str) -> BlockDevice:
        with self._lock:
            if not self._readers:
                self._views = self._begin()
            self._readers += 1
            return self._traced(name + SNAPSHOT_SUFFIX, _Reader(self._views[name], self._close_snapshot))

    def _traced(self, export: str, device: BlockDevice) -> Guarded:
        return Guarded(Trace(device, partial(self._report, export)))

    def _close_snapshot(self) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                for view in self._views.values():
                    view.close()
                self._views = {}

    def _begin(self) -> dict[str, SnapshotView]:
        """Snapshots of all disks at one instant.

        Their scratch space is not closed but dropped: a guest's write may be on its way into it to the end.
        """
        savers = {
            name: ScratchSaver(self._scratch(disk.size_bytes), limit_bytes=self._limit_bytes)
            for name, disk in self._disks.items()
        }
        points = begin_together([Start(disk, savers[name]) for name, disk in self._disks.items()], self._policy)
        return {name: SnapshotView(point, savers[name]) for name, point in zip(savers, points, strict=True)}


class _Reader(Filter):
    """A view for the connections to one export; the snapshot ends when all of them have gone."""

    def __init__(self, view: SnapshotView, closed: Callable[[], None]) -> None:
        super().__init__(view)
        self._closed = closed

    def close(self) -> None:
        self._closed()
