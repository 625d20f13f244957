"""Reading what nobody pushes: the background of a live backup in pull mode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from casbackup.block.device import BlockDevice, Extent
from casbackup.block.filters.clusters import CLUSTER_BYTES
from casbackup.block.nbd.protocol import Errno
from casbackup.buffers import aligned_buffer
from casbackup.errors import BackupBroken, NbdRequestFailed
from casbackup.limits import SEGMENT_BYTES
from casbackup.qemu.merging import Merger
from casbackup.units import GiB

WORKERS = 2
"""One reads while the other passes on."""
_STEP_BYTES = 1 * GiB
"""Of a disk, so much is asked for holes at a time."""
_PUSHED_S = 60.0
"""How long data may be under way from QEMU through the sink."""
_WAIT_S = 0.02


class PulledDisk(NamedTuple):
    """``device``: the disk as it was at the point in time. ``wanted``: ranges (offset, length), ascending."""

    number: int
    device: BlockDevice
    wanted: Sequence[tuple[int, int]]


class _Piece(NamedTuple):
    """Clusters to bring: up to a segment of data, or any number of zeros."""

    disk: PulledDisk
    extent: Extent


class Puller:
    """Threads that bring to a merger what it lacks. What they are done with is discarded: QEMU saves it no more.

    Segments of which QEMU has pushed a part come first, so that few are incomplete at a time.
    """

    def __init__(self, disks: Sequence[PulledDisk], merger: Merger, may_go_on: Callable[[int], bool]) -> None:
        """``may_go_on``: asked again and again, with the bytes that were read since, whether to read more now."""
        self._disks = disks
        self._merger = merger
        self._may_go_on = may_go_on
        self._in_order = self._pieces()
        self._hot: list[_Piece] = []
        self._taking = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._guarded, name=f"pull-{n}", daemon=True) for n in range(WORKERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def check(self) -> bool:
        """Whether all has been brought. Raises what one of the threads failed with."""
        if self._failure is not None:
            raise self._failure
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Read no more. Threads that wait for the consumer are left behind."""
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        for thread in self._threads:
            thread.join(timeout_s)

    # --- a thread

    def _guarded(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  handed to whoever checks
            self._failure = self._failure or error
            self._stop.set()

    def _work(self) -> None:
        buffer = memoryview(aligned_buffer(SEGMENT_BYTES))
        read_bytes = 0
        while self._wait_allowed(read_bytes) and (piece := self._next()) is not None:
            read_bytes = self._bring(piece, buffer)

    def _wait_allowed(self, read_bytes: int) -> bool:
        """False when it is over."""
        while not self._stop.is_set():
            if self._may_go_on(read_bytes):
                return True
            read_bytes = 0
            self._stop.wait(_WAIT_S)
        return False

    def _bring(self, piece: _Piece, buffer: memoryview) -> int:
        """Returns how much had to be read."""
        number = piece.disk.number
        read_bytes = 0
        for offset, length in self._merger.claim(number, piece.extent.offset, piece.extent.length):
            if piece.extent.zero:
                self._merger.pull_zeros(number, offset, length)
            else:
                self._read(piece.disk, offset, buffer[:length])
                read_bytes += length
            piece.disk.device.discard(offset, length)
        return read_bytes

    def _read(self, disk: PulledDisk, offset: int, view: memoryview) -> None:
        try:
            disk.device.read_into(offset, view)
        except NbdRequestFailed:
            self._read_clusters(disk, offset, view)
        else:
            self._merger.pull(disk.number, offset, view)

    def _read_clusters(self, disk: PulledDisk, offset: int, view: memoryview) -> None:
        """One of them at least was pushed after it was claimed: QEMU looks for it in the sink, which keeps nothing."""
        for start in range(0, len(view), CLUSTER_BYTES):
            part = view[start : start + CLUSTER_BYTES]
            try:
                disk.device.read_into(offset + start, part)
            except NbdRequestFailed as error:
                self._expect_pushed(disk, offset + start, error)
            else:
                self._merger.pull(disk.number, offset + start, part)

    def _expect_pushed(self, disk: PulledDisk, offset: int, error: NbdRequestFailed) -> None:
        """:raise BackupBroken: when the cluster does not come, or QEMU denies access to all of the view."""
        if error.number != Errno.EIO:
            raise BackupBroken(f"QEMU has given the point in time up for the guest: {error.message}") from error
        if not self._merger.wait_pushed(disk.number, offset, _PUSHED_S, self._stop):
            raise BackupBroken(f"old data can no longer be read: {error.message}") from error

    # --- what to bring next

    def _next(self) -> _Piece | None:
        with self._taking:
            if not self._hot:
                self._hot = self._hot_pieces()
            return self._hot.pop(0) if self._hot else next(self._in_order, None)

    def _hot_pieces(self) -> list[_Piece]:
        hot = self._merger.next_hot()
        if hot is None:
            return []
        number, segment = hot
        disk = self._disks[number]
        start = segment * SEGMENT_BYTES
        ranges = self._merger.missing(number, start, min(SEGMENT_BYTES, disk.device.size_bytes - start))
        return [piece for offset, length in ranges for piece in _data(disk, offset, offset + length)]

    def _pieces(self) -> Iterator[_Piece]:
        for disk in self._disks:
            for offset, length in disk.wanted:
                if length <= SEGMENT_BYTES:  # not worth asking for holes
                    yield from _data(disk, offset, offset + length)
                    continue
                for start in range(offset, offset + length, _STEP_BYTES):
                    yield from self._pieces_of_step(disk, start, min(start + _STEP_BYTES, offset + length))

    def _pieces_of_step(self, disk: PulledDisk, start: int, end: int) -> list[_Piece]:
        """Of segments that are done nothing more is asked: what was discarded has no status."""
        missing = self._merger.missing(disk.number, start, end - start)
        return [piece for first, stop in _segments(missing, start, end) for piece in _pieces_between(disk, first, stop)]


def _segments(ranges: Sequence[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The segments that ranges (offset, length) touch, as ranges [first, stop) between ``start`` and ``end``."""
    first = stop = start
    for offset, length in ranges:
        begins = max(start, offset // SEGMENT_BYTES * SEGMENT_BYTES)
        if begins > stop:
            yield first, stop
            first = begins
        stop = min(end, -(-(offset + length) // SEGMENT_BYTES) * SEGMENT_BYTES)
    yield first, stop


def _pieces_between(disk: PulledDisk, position: int, end: int) -> Iterator[_Piece]:
    """Clusters that are zero as they come, the others up to segments' ends."""
    if position == end:
        return
    for extent in disk.device.extents(position, end - position):
        first = -(-extent.offset // CLUSTER_BYTES) * CLUSTER_BYTES
        stop = extent.end if extent.end == end else extent.end // CLUSTER_BYTES * CLUSTER_BYTES
        if extent.zero and stop > first:
            yield from _data(disk, position, first)
            yield _Piece(disk, Extent(first, stop - first, True))
            position = stop
    yield from _data(disk, position, end)


def _data(disk: PulledDisk, start: int, end: int) -> Iterator[_Piece]:
    while start < end:
        stop = min(end, (start // SEGMENT_BYTES + 1) * SEGMENT_BYTES)
        yield _Piece(disk, Extent(start, stop - start, False))
        start = stop
