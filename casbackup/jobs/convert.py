"""Archive to archive, without a repository.

Where the writer takes data in any order, or the reader gives it in the order that the writer wants, segments are
passed on as they become complete, and only what does not fit into memory meanwhile goes to a temporary file. Where
the orders do not fit, or the writer must know beforehand where there is data, all of it goes there first. Temporary
files are sparse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from casbackup.block.device import BlockDevice
from casbackup.block.sparse import temporary_device
from casbackup.buffers import ByteBuffer
from casbackup.formats.coverage import ArchiveCoverage
from casbackup.formats.mappedstream import rounded
from casbackup.formats.port import (
    Archive,
    ArchiveHead,
    ArchiveOutput,
    ArchiveWriter,
    ByteRange,
    ByteTarget,
    Data,
    Event,
    Order,
)
from casbackup.formats.zeroruns import runs
from casbackup.jobs.assembler import Assembler, Part
from casbackup.limits import SEGMENT_BYTES
from casbackup.progress import NoProgress, Progress
from casbackup.units import KiB

_GRANULE_BYTES = 64 * KiB


def convert(
    archive: Archive,
    order: Order,
    head: ArchiveHead,
    writer: ArchiveWriter,
    target: ByteTarget,
    *,
    spool_folder: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write what ``archive`` holds, which comes in ``order``, under the ``head`` that ``adapted`` gave.

    :raise ArchiveDamaged: / :raise ArchiveIncomplete: when the archive is not what it should be.
    :raise TargetError: when writing fails, or a temporary file cannot be written in ``spool_folder``.
    """
    progress = progress or NoProgress()
    capabilities = writer.capabilities
    coverage = ArchiveCoverage(archive.head)
    progress.start("reading", sum(disk.size_bytes for disk in head.disks))
    events = _counted(coverage.passing(archive.events()), progress)
    with ExitStack() as stack:
        spool = _Spool(head, spool_folder, stack)
        if capabilities.needs_map or (capabilities.order, order) == (Order.ASCENDING, Order.ANY):
            spool.take(events)
            coverage.require_complete()
            spool.give(writer, target, head, progress)
        else:
            output = writer.open(target, head)
            with Assembler([d.size_bytes for d in head.disks], _Sink(output, spool), workers=0) as assembler:
                for event in events:
                    if isinstance(event, Data):
                        assembler.put(event.disk, event.offset, event.data)
                    else:
                        assembler.zeros(event.disk, event.offset, event.length)
                coverage.require_complete()
                assembler.finish()
            output.finish()
    progress.finish()


def adapted(head: ArchiveHead, writer: ArchiveWriter, now_s: int) -> tuple[ArchiveHead, tuple[str, ...]]:
    """The head as the writer takes it, and the names of the configs that are left out for that. ``now_s``: the time
    that is given to an archive that had none.

    :raise ArchiveLimit: when it does not take it.
    """
    left_out = () if writer.capabilities.configs else tuple(config.name for config in head.configs)
    kept = replace(head, configs=() if left_out else head.configs, time_s=now_s if head.time_s is None else head.time_s)
    writer.check(kept)
    return kept, left_out


def _counted(events: Iterator[Event], progress: Progress) -> Iterator[Event]:
    for event in events:
        yield event
        progress.advance(done=len(event.data) if isinstance(event, Data) else event.length)


class _Spool:
    """Temporary files, one for each disk that needs it."""

    def __init__(self, head: ArchiveHead, folder: str | None, stack: ExitStack) -> None:
        self._sizes = [disk.size_bytes for disk in head.disks]
        self._folder = folder
        self._stack = stack
        self._devices: dict[int, BlockDevice] = {}

    def device(self, disk: int) -> BlockDevice:
        if disk not in self._devices:
            self._devices[disk] = self._stack.enter_context(temporary_device(self._sizes[disk], self._folder))
        return self._devices[disk]

    def take(self, events: Iterator[Event]) -> None:
        for event in events:
            if isinstance(event, Data):
                self._take_data(event)

    def _take_data(self, event: Data) -> None:
        """Zeros stay holes, so that they are none of the map's data: raw images and plain members of tar are full."""
        view = memoryview(event.data)
        for run in runs(view, _GRANULE_BYTES):
            if not run.is_zero:
                self.device(event.disk).write(event.offset + run.start, view[run.start : run.end])

    def give(self, writer: ArchiveWriter, target: ByteTarget, head: ArchiveHead, progress: Progress) -> None:
        """Write everything in the order of the head, each disk from its beginning to its end."""
        granule = max(_GRANULE_BYTES, writer.capabilities.unit_bytes)
        maps = [list(self._map(disk, granule)) for disk in range(len(self._sizes))]
        progress.start("writing", sum(self._sizes))
        output = writer.open(target, head, maps if writer.capabilities.needs_map else None)
        buffer = memoryview(bytearray(SEGMENT_BYTES))
        for disk, (size, ranges) in enumerate(zip(self._sizes, maps, strict=True)):
            position = 0
            for piece in [*ranges, ByteRange(size, 0)]:
                if piece.offset > position:
                    output.zeros(disk, position, piece.offset - position)
                    progress.advance(done=piece.offset - position)
                self._copy(disk, piece, output, buffer, progress)
                position = piece.end
        output.finish()

    def _map(self, disk: int, granule: int) -> Iterator[ByteRange]:
        if disk not in self._devices:
            return
        extents = self._devices[disk].extents(0, self._sizes[disk])
        for piece in rounded((ByteRange(e.offset, e.length) for e in extents if not e.zero), granule):
            yield ByteRange(piece.offset, min(piece.end, self._sizes[disk]) - piece.offset)

    def _copy(self, disk: int, piece: ByteRange, output: ArchiveOutput, buffer: memoryview, progress: Progress) -> None:
        for offset in range(piece.offset, piece.end, SEGMENT_BYTES):
            part = buffer[: min(SEGMENT_BYTES, piece.end - offset)]
            self.device(disk).read_into(offset, part)
            output.write(disk, offset, part)
            progress.advance(done=len(part))


class _Sink:
    """Passes segments on; parts of them wait in the spool."""

    def __init__(self, output: ArchiveOutput, spool: _Spool) -> None:
        self._output = output
        self._spool = spool

    def segment(self, disk: int, number: int, buffer: ByteBuffer, view: memoryview, length: int) -> None:
        self._output.write(disk, number * SEGMENT_BYTES, view[:length])

    def part(self, disk: int, number: int, start: int, buffer: ByteBuffer, view: memoryview, length: int) -> bytes:
        self._spool.device(disk).write(number * SEGMENT_BYTES + start, view[:length])
        return b""

    def join(self, disk: int, number: int, length: int, parts: Sequence[Part]) -> None:
        segment = memoryview(bytearray(length))
        self._spool.device(disk).read_into(number * SEGMENT_BYTES, segment)
        self._output.write(disk, number * SEGMENT_BYTES, segment)

    def zeros(self, disk: int, offset: int, length: int) -> None:
        self._output.zeros(disk, offset, length)
