"""Live backup in pull mode: QEMU pushes only what the guest is about to overwrite, and we read the rest (QEMU 8.0).

A copy-before-write filter of QEMU writes old data to our sink and marks it as done; a view of the disk as it was at
the point in time is read over QEMU's own NBD server, in whatever order suits the chunks. What was read is discarded in
the view, so that the filter saves it no more. Each cluster is read once and stored once, and there is no temporary
space. When the sink fails or is too slow, the filter itself gives the point in time up, and the guest's write goes on.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence

from casbackup.block.device import BlockDevice
from casbackup.block.nbd.dirty import dirty_ranges
from casbackup.block.spool import Consumer
from casbackup.errors import BackupBroken, LiveUnsupported, QmpCommandFailed
from casbackup.qemu import cleanup, graph, reading
from casbackup.qemu.conductor import ConductedSource
from casbackup.qemu.control import LiveControl
from casbackup.qemu.graph import Spliced
from casbackup.qemu.merging import Merger
from casbackup.qemu.pacing import LOW_FILL, Rate
from casbackup.qemu.pulling import PulledDisk, Puller
from casbackup.qemu.sink_host import SinkHost
from casbackup.qemu.source import DiskTask, Mode

_JOIN_S = 5.0
_BURST_S = 0.1


class PullSource(ConductedSource):
    """We move what the guest does not overwrite."""

    mode = Mode.PULL

    def _receiver(self, consumer: Consumer) -> Consumer:
        self._merger = Merger(consumer, [task.disk.size_bytes for task in self._tasks])
        self._spliced = [Spliced(self._id(number), task.disk) for number, task in enumerate(self._tasks)]
        self._rate = Rate()
        self._reading = contextlib.ExitStack()
        self._puller: Puller | None = None
        return self._merger

    def _prepare(self) -> None:
        """Errors as ``_take_instant``."""
        stall_s = self._options.max_guest_stall_s
        for number, spliced in enumerate(self._spliced):
            with _refusable():
                self._add_target(number)
                graph.splice(self._qmp, spliced, max_guest_stall_s=stall_s, features=self._features)
        graph.flush(self._qmp, self._spliced)

    def _take_instant(self) -> None:
        """:raise LiveUnsupported: when QEMU does not do it with one of the disks. No data has come then."""
        with _refusable():
            graph.divert(self._qmp, self._spliced)

    def _begun(self) -> None:
        folder = os.path.dirname(self._sink.path)
        try:
            path = self._reading.enter_context(reading.nbd_server(self._qmp, folder))
        except LiveUnsupported as error:
            raise BackupBroken(error.message) from error
        disks = [self._opened(path, number, task) for number, task in enumerate(self._tasks)]
        self._puller = Puller(disks, self._merger, _Permission(self._control, self._sink, self._options.memory_bytes))
        self._puller.start()

    def _opened(self, path: str, number: int, task: DiskTask) -> PulledDisk:
        """The disk as it was at the point in time, and what is wanted of it."""
        spliced = self._spliced[number]
        graph.add_view(self._qmp, spliced)
        bitmap = None if task.bitmap is None else {"node": task.disk.node, "name": task.bitmap}
        address = reading.export(self._qmp, path, spliced.view, spliced.view, writable=True, bitmap=bitmap)
        device = self._reading.enter_context(reading.opened(address))
        if task.bitmap is None:
            return PulledDisk(number, device, [(0, task.disk.size_bytes)])
        # Asked after the point in time: what was written since is in it, too, which does no harm.
        wanted = list(dirty_ranges(address, task.bitmap))
        self._merger.want_only(number, wanted)
        _discard_others(device, wanted)
        return PulledDisk(number, device, wanted)

    def _advance(self) -> bool:
        assert self._puller is not None
        done = self._puller.check()
        self._rate.look(time.monotonic(), self._merger.taken_bytes)
        self._control.update(
            total_bytes=self._merger.wanted_bytes,
            done_bytes=self._merger.wanted_bytes - self._merger.left_bytes,
            waiting_bytes=self._sink.waiting_bytes,
            spooled_bytes=self._sink.overflown_bytes,
            taken_bytes_s=int(self._rate.bytes_s),
        )
        return done

    def _end(self) -> None:
        """:raise BackupBroken: when something is missing after all."""
        if self._merger.left_bytes:
            raise BackupBroken(f"{self._merger.left_bytes} bytes have neither been pulled nor pushed")
        self._reading.close()
        graph.restore(self._qmp, self._name)
        cleanup.remove_nodes(self._qmp, self._name)

    def _let_go(self) -> None:
        self._merger.close()
        try:
            if self._puller is not None:
                self._puller.stop()
                cleanup.remove_exports(self._qmp, self._name)  # which ends the reading
                self._puller.join(_JOIN_S)
        finally:
            self._reading.close()


@contextlib.contextmanager
def _refusable() -> Iterator[None]:
    """:raise LiveUnsupported: when QEMU refuses a command."""
    try:
        yield
    except QmpCommandFailed as error:
        raise LiveUnsupported(error.message) from error


class _Permission:
    """Whether more may be read in the background: not while paused, too fast, or ahead of what a guest waits for."""

    def __init__(self, control: LiveControl, sink: SinkHost, memory_bytes: int) -> None:
        self._control = control
        self._sink = sink
        self._most_waiting_bytes = LOW_FILL * memory_bytes
        self._credit_bytes = 0.0
        self._last_s = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, read_bytes: int) -> bool:
        return (
            self._has_credit(read_bytes)
            and not self._control.status.paused
            and self._sink.waiting_bytes < self._most_waiting_bytes
        )

    def _has_credit(self, read_bytes: int) -> bool:
        """What was read is paid back at the speed that is asked for; what was not used for a moment may be made up."""
        limit = self._control.status.speed_limit_bytes_s
        with self._lock:
            now_s = time.monotonic()
            earned = limit * (now_s - self._last_s)
            self._last_s = now_s
            self._credit_bytes = min(limit * _BURST_S, self._credit_bytes + earned) - read_bytes if limit else 0.0
            return self._credit_bytes >= 0


def _discard_others(device: BlockDevice, wanted: Sequence[tuple[int, int]]) -> None:
    for offset, length in _others(wanted, device.size_bytes):
        device.discard(offset, length)


def _others(ranges: Sequence[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """What is between ascending ranges (offset, length), which may touch."""
    position = 0
    for offset, length in ranges:
        if offset > position:
            yield position, offset - position
        position = offset + length
    if end > position:
        yield position, end - position
