"""Raw images: the bytes of one disk and nothing else. Known by name only, for there is no magic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from casbackup.buffers import aligned_buffer
from casbackup.errors import ArchiveIncomplete, ArchiveUnsupported, SourceChanged
from casbackup.formats.port import (
    ArchiveDisk,
    ArchiveFormat,
    ArchiveHead,
    ByteRange,
    ByteSource,
    ByteTarget,
    Data,
    Event,
    Order,
    ReaderCapabilities,
    SparseSource,
    WriterCapabilities,
    Zeros,
)
from casbackup.formats.reading import COPY_BYTES, disk_name
from casbackup.formats.single import SECTOR_BYTES, check_single_disk
from casbackup.formats.zeroruns import runs, zero_buffers
from casbackup.fs import Buffer
from casbackup.limits import MAX_DISK_BYTES
from casbackup.units import KiB

_HOLE_BYTES = 64 * KiB
"""Zeros in data become holes of a file in units of this."""


class RawReader:
    capabilities = ReaderCapabilities(streams=False, order=Order.ASCENDING)

    def open(self, source: ByteSource) -> RawArchive:
        """:raise ArchiveUnsupported: when the size is not known beforehand."""
        if not source.seekable or source.size_bytes is None:
            raise ArchiveUnsupported(
                f"{source.name}: a raw image does not tell its size, so it is read from a file only; "
                "what comes through a pipe is backed up with `casbackup backup -`"
            )
        return RawArchive(source, source.size_bytes)


class RawArchive:
    def __init__(self, source: ByteSource, size_bytes: int) -> None:
        self.head = ArchiveHead((ArchiveDisk(disk_name(source), size_bytes),))
        self._source = source
        self._size_bytes = size_bytes

    def events(self) -> Iterator[Event]:
        """:raise SourceChanged: when the file has become shorter."""
        buffer = memoryview(aligned_buffer(COPY_BYTES))
        position = 0
        for extent in self._data_ranges():
            if extent.offset > position:
                yield Zeros(0, position, extent.offset - position)
            self._source.seek(extent.offset)
            for position in range(extent.offset, extent.end, COPY_BYTES):
                piece = buffer[: extent.end - position]
                if self._source.read_into(piece) < len(piece):
                    raise SourceChanged(f"{self._source.name} became shorter while it was read")
                yield Data(0, position, piece)
            position = extent.end
        if position < self._size_bytes:
            yield Zeros(0, position, self._size_bytes - position)

    def _data_ranges(self) -> Iterator[ByteRange]:
        if not isinstance(self._source, SparseSource):
            if self._size_bytes:
                yield ByteRange(0, self._size_bytes)
            return
        position = 0
        while position < self._size_bytes and (found := self._source.next_data(position)) is not None:
            start, position = found.offset, min(found.end, self._size_bytes)
            if start < position:
                yield ByteRange(start, position - start)


class RawWriter:
    """Zeros are holes where the target is seekable, and written out on a pipe."""

    capabilities = WriterCapabilities(
        streams=True, order=Order.ASCENDING, needs_map=False, unit_bytes=SECTOR_BYTES, max_disks=1, configs=False
    )

    def check(self, head: ArchiveHead) -> None:
        check_single_disk(head, "raw", MAX_DISK_BYTES)

    def open(
        self, target: ByteTarget, head: ArchiveHead, maps: Sequence[Sequence[ByteRange]] | None = None
    ) -> RawOutput:
        self.check(head)
        return RawOutput(target, head.disks[0])


class RawOutput:
    def __init__(self, target: ByteTarget, disk: ArchiveDisk) -> None:
        self._target = target
        self._disk = disk
        self._given_to = 0
        self._start = target.tell() if target.seekable else 0

    def write(self, disk: int, offset: int, data: Buffer) -> None:
        """:raise ValueError: when the data does not follow what came before."""
        self._take(offset, len(data))
        view = memoryview(data)
        if not self._target.seekable:
            self._target.write([view])
            return
        for run in runs(view, _HOLE_BYTES):
            if not run.is_zero:
                self._target.seek(self._start + offset + run.start)
                self._target.write([view[run.start : run.end]])

    def zeros(self, disk: int, offset: int, length: int) -> None:
        """:raise ValueError: when they do not follow what came before."""
        self._take(offset, length)
        if not self._target.seekable:
            for buffers in zero_buffers(length):
                self._target.write(buffers)

    def finish(self) -> None:
        """:raise ArchiveIncomplete: when the disk was not given to its end."""
        if self._given_to < self._disk.size_bytes:
            raise ArchiveIncomplete(f"disk {self._disk.name} ends at byte {self._given_to} of {self._disk.size_bytes}")
        if self._target.seekable and self._disk.size_bytes > self._target.tell() - self._start:
            self._target.seek(self._start + self._disk.size_bytes - 1)
            self._target.write([b"\0"])

    def _take(self, offset: int, length: int) -> None:
        if offset != self._given_to:
            raise ValueError(f"bytes from {offset} do not follow byte {self._given_to}")
        self._given_to += length


FORMAT = ArchiveFormat(
    name="raw",
    summary="a raw disk image",
    suffixes=(".raw", ".img"),
    recognises=lambda _beginning: False,
    reader=RawReader,
    writer=RawWriter,
)
