"""Writing a stream."""

from __future__ import annotations

from collections.abc import Sequence

from casbackup.errors import ArchiveLimit
from casbackup.formats.coverage import ArchiveCoverage
from casbackup.formats.port import (
    ArchiveHead,
    ByteRange,
    ByteTarget,
    Data,
    Order,
    WriterCapabilities,
    Zeros,
)
from casbackup.formats.single import SECTOR_BYTES
from casbackup.formats.stream.head import encode_head
from casbackup.formats.zeroruns import runs
from casbackup.fs import Buffer
from casbackup.limits import MAX_DISK_BYTES
from casbackup.spec.archiver import (
    FRAME,
    MAGIC,
    MAX_DATA_BYTES,
    MAX_DISKS,
    MAX_ERROR_BYTES,
    MAX_HEAD_BYTES,
    FrameType,
)
from casbackup.units import KiB

_ZERO_UNIT_BYTES = 64 * KiB


class StreamWriter:
    """Zeros in data become frames of their own, in units of 64 KiB."""

    capabilities = WriterCapabilities(
        streams=True, order=Order.ANY, needs_map=False, unit_bytes=SECTOR_BYTES, max_disks=MAX_DISKS, vmstate=True
    )

    def check(self, head: ArchiveHead) -> None:
        if len(head.disks) > MAX_DISKS:
            raise ArchiveLimit(f"a stream holds {MAX_DISKS} disks, not {len(head.disks)}")
        for disk in head.disks:
            if disk.size_bytes > MAX_DISK_BYTES:
                raise ArchiveLimit(f"disk {disk.name} has {disk.size_bytes} bytes, more than {MAX_DISK_BYTES}")
        if len(encode_head(head)) > MAX_HEAD_BYTES:
            raise ArchiveLimit(f"the head of a stream has at most {MAX_HEAD_BYTES} bytes; the configs are too large")

    def open(
        self, target: ByteTarget, head: ArchiveHead, maps: Sequence[Sequence[ByteRange]] | None = None
    ) -> StreamOutput:
        content = encode_head(head)
        target.write([MAGIC, FRAME.pack(FrameType.HEAD, 0, 0, len(content)), content])
        return StreamOutput(target, head)


class StreamOutput:
    def __init__(self, target: ByteTarget, head: ArchiveHead) -> None:
        self._target = target
        self._coverage = ArchiveCoverage(head)

    def write(self, disk: int, offset: int, data: Buffer) -> None:
        self._coverage.add(Data(disk, offset, data))
        view = memoryview(data)
        for run in runs(view, _ZERO_UNIT_BYTES):
            if run.is_zero:
                self._frame(FrameType.ZEROS, disk, offset + run.start, run.end - run.start)
                continue
            for start in range(run.start, run.end, MAX_DATA_BYTES):
                piece = view[start : min(start + MAX_DATA_BYTES, run.end)]
                self._frame(FrameType.DATA, disk, offset + start, len(piece), piece)

    def zeros(self, disk: int, offset: int, length: int) -> None:
        self._coverage.add(Zeros(disk, offset, length))
        self._frame(FrameType.ZEROS, disk, offset, length)

    def finish(self) -> None:
        """:raise ArchiveIncomplete: when anything is missing."""
        self._coverage.require_complete()
        self._frame(FrameType.END, 0, 0, 0)

    def _frame(self, kind: FrameType, disk: int, offset: int, length: int, *content: Buffer) -> None:
        self._target.write([FRAME.pack(kind, disk, offset, length), *content])


def report_error(target: ByteTarget, text: str) -> None:
    """Tell whoever reads the stream that it will not be completed, and why."""
    content = text.encode(errors="backslashreplace")[:MAX_ERROR_BYTES]
    target.write([FRAME.pack(FrameType.ERROR, 0, 0, len(content)), content])
