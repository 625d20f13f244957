"""Files of a mounted tree that somebody has open."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

from casbackup.block.device import BlockDevice, Closing, read_bytes
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.errors import CasbackupError
from casbackup.ids import SnapshotId
from casbackup.jobs.restore import read_config
from casbackup.peer.served import ReadPool, Report, ServedSnapshot
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import DiskRecord
from casbackup_client.snapshottree import File


class _Open(NamedTuple):
    device: BlockDevice
    snapshot: SnapshotId


class OpenFiles(Closing):
    """By handle. A snapshot's data stays while one of its files is open. Safe from any number of threads.

    Failures become the system's own: EIO, and a line for ``report`` that says why.
    """

    def __init__(self, pool: ReadPool, report: Report) -> None:
        """``pool`` stays the caller's."""
        self._pool = pool
        self._report = report
        self._handles = count(1)
        self._open: dict[int, _Open] = {}
        self._served: dict[SnapshotId, ServedSnapshot] = {}
        self._lock = threading.Lock()

    def open(self, file: File) -> int:
        with self._lock, _reported(self._report):
            served, handle = self._serve(file.snapshot), next(self._handles)
            try:
                self._open[handle] = _Open(self._device(served, file), file.snapshot.id)
            finally:
                self._drop_unused(file.snapshot.id)
            return handle

    def read(self, handle: int, offset: int, length: int) -> bytes:
        """Fewer bytes where the file ends."""
        device = self._open[handle].device
        with _silent():  # the disk has reported it
            return read_bytes(device, offset, max(0, min(length, device.size_bytes - offset)))

    def seek(self, handle: int, offset: int, *, hole: bool) -> int:
        """The first byte from ``offset`` on that is in a hole, or in none; the end is one."""
        device = self._open[handle].device
        if not 0 <= offset < device.size_bytes:
            raise OSError(errno.ENXIO, "beyond the end")
        with _reported(self._report):
            for extent in device.extents(offset, device.size_bytes - offset):
                if extent.zero == hole:
                    return extent.offset
        if hole:
            return device.size_bytes
        raise OSError(errno.ENXIO, "no data up to the end")

    def release(self, handle: int) -> None:
        with self._lock:
            snapshot = self._open.pop(handle).snapshot
            self._drop_unused(snapshot)

    def close(self) -> None:
        with self._lock:
            self._open.clear()
            for snapshot in list(self._served):
                self._drop_unused(snapshot)

    def _serve(self, snapshot: Snapshot) -> ServedSnapshot:
        served = self._served.get(snapshot.id)
        if served is None:
            served = self._served[snapshot.id] = ServedSnapshot(self._pool, snapshot, report=self._report)
        return served

    def _device(self, served: ServedSnapshot, file: File) -> BlockDevice:
        if isinstance(file.content, DiskRecord):
            return Guarded(served.disks[file.content.name])
        return Guarded(MemoryDevice(read_config(self._pool.peer, file.content), writable=False))

    def _drop_unused(self, snapshot: SnapshotId) -> None:
        if all(one.snapshot != snapshot for one in self._open.values()):
            self._served.pop(snapshot).close()


@contextmanager
def _reported(report: Report) -> Iterator[None]:
    try:
        yield
    except CasbackupError as error:
        report(error.message)
        raise OSError(errno.EIO, error.message) from error


@contextmanager
def _silent() -> Iterator[None]:
    try:
        yield
    except CasbackupError as error:
        raise OSError(errno.EIO, error.message) from error
