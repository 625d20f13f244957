"""Reading a stream."""

from __future__ import annotations

from collections.abc import Iterator

from casbackup.buffers import aligned_buffer
from casbackup.errors import ArchiveDamaged, ToolFailed
from casbackup.formats.port import (
    ArchiveHead,
    ByteSource,
    Event,
    Order,
    ReaderCapabilities,
    Zeros,
)
from casbackup.formats.reading import drain, read_data, read_exactly
from casbackup.formats.stream.head import decode_head
from casbackup.spec.archiver import FRAME, MAGIC, MAX_DATA_BYTES, MAX_ERROR_BYTES, MAX_HEAD_BYTES, FrameType
from casbackup.units import MiB

_PIECE_BYTES = 1 * MiB


class StreamReader:
    capabilities = ReaderCapabilities(streams=True, order=Order.ANY)

    def open(self, source: ByteSource) -> StreamArchive:
        if read_exactly(source, len(MAGIC), "the magic") != MAGIC:
            raise ArchiveDamaged(f"{source.name}: does not begin with {MAGIC.decode()}")
        kind, _, _, length = _frame(source)
        if kind == FrameType.ERROR:
            raise _reported(source, length)
        if kind != FrameType.HEAD or length > MAX_HEAD_BYTES:
            raise ArchiveDamaged(f"{source.name}: the first frame is not a head of at most {MAX_HEAD_BYTES} bytes")
        return StreamArchive(source, decode_head(bytes(read_exactly(source, length, "the head")), source.name))


class StreamArchive:
    def __init__(self, source: ByteSource, head: ArchiveHead) -> None:
        self.head = head
        self._source = source

    def events(self) -> Iterator[Event]:
        """:raise ToolFailed: when the other side reports an error of its own."""
        source = self._source
        buffer = memoryview(aligned_buffer(_PIECE_BYTES))
        while True:
            at = source.tell()
            kind, disk, offset, length = _frame(source)
            if kind == FrameType.END:
                drain(source)
                return
            if kind == FrameType.ERROR:
                raise _reported(source, length)
            if kind not in (FrameType.DATA, FrameType.ZEROS) or (kind == FrameType.DATA and length > MAX_DATA_BYTES):
                raise ArchiveDamaged(f"{source.name}: no frame is of type {kind} and {length} bytes (byte {at})")
            if disk >= len(self.head.disks) or offset + length > self.head.disks[disk].size_bytes:
                raise ArchiveDamaged(f"{source.name}: the frame at byte {at} lies outside of the disks")
            if kind == FrameType.DATA:
                yield from read_data(source, disk, offset, length, buffer)
            elif length:
                yield Zeros(disk, offset, length)


def _frame(source: ByteSource) -> tuple[int, int, int, int]:
    kind, disk, offset, length = FRAME.unpack(read_exactly(source, FRAME.size, "a frame; it has no end frame"))
    return kind, disk, offset, length


def _reported(source: ByteSource, length: int) -> ToolFailed:
    text = bytes(read_exactly(source, min(length, MAX_ERROR_BYTES), "an error's text"))
    return ToolFailed(f"{source.name}: the other side reports: {text.decode(errors='backslashreplace')}")
