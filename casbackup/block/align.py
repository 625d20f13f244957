"""A filter that makes a device of blocks take any offset and length."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from casbackup.block.device import BlockDevice, Closing, Extent
from casbackup.fs import Buffer


class _Piece(NamedTuple):
    """A span that is either whole blocks or lies within one block."""

    offset: int
    length: int
    whole: bool


def byte_addressable(device: BlockDevice) -> BlockDevice:
    """The device itself if it takes any range, else behind ``Aligned``. Takes it over."""
    return device if device.capabilities.min_block_bytes == 1 else Aligned(device)


class Aligned(Closing):
    """Whole blocks pass through; what begins or ends within a block is read, changed and written back.

    For what QEMU gives blocks of 512 bytes (vhdx, for one): a disk of any size can be restored to it. Writes
    within one block exclude each other, so that two threads with neighbouring ranges lose nothing.
    """

    def __init__(self, device: BlockDevice) -> None:
        """Takes over ``device``, which keeps raising its own errors."""
        self._device = device
        self._block_bytes = device.capabilities.min_block_bytes
        self._changing_block = threading.Lock()
        self.size_bytes = device.size_bytes
        self.capabilities = replace(device.capabilities, min_block_bytes=1)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for piece in self._pieces(offset, len(buffer)):
            part = buffer[piece.offset - offset :][: piece.length]
            if piece.whole:
                self._device.read_into(piece.offset, part)
            else:
                start, block = self._read_block(piece.offset)
                part[:] = block[piece.offset - start :][: piece.length]

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        for piece in self._pieces(offset, len(view)):
            part = view[piece.offset - offset :][: piece.length]
            if piece.whole:
                self._device.write(piece.offset, part)
            else:
                self._change_block(piece.offset, part)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        for piece in self._pieces(offset, length):
            if piece.whole:
                self._device.write_zeros(piece.offset, piece.length, may_trim=may_trim)
            else:
                self._change_block(piece.offset, bytes(piece.length))

    def discard(self, offset: int, length: int) -> None:
        """Only whole blocks: it is a hint."""
        for piece in self._pieces(offset, length):
            if piece.whole:
                self._device.discard(piece.offset, piece.length)

    def flush(self) -> None:
        self._device.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        start, end = self._floor(offset), self._ceiling(offset + length)
        for extent in self._device.extents(start, end - start):
            first, last = max(extent.offset, offset), min(extent.end, offset + length)
            if first < last:
                yield Extent(first, last - first, extent.zero)

    def changed_size(self) -> int | None:
        return self._device.changed_size()

    def close(self) -> None:
        self._device.close()

    def _pieces(self, offset: int, length: int) -> Iterator[_Piece]:
        """The range as at most three pieces, in order."""
        end = offset + length
        middle = min(self._ceiling(offset), end) if offset % self._block_bytes else offset
        tail = end if end == self.size_bytes else max(self._floor(end), middle)
        for start, stop, whole in ((offset, middle, False), (middle, tail, True), (tail, end, False)):
            if start < stop:
                yield _Piece(start, stop - start, whole)

    def _change_block(self, offset: int, data: Buffer) -> None:
        with self._changing_block:
            start, block = self._read_block(offset)
            block[offset - start : offset - start + len(data)] = data
            self._device.write(start, block)

    def _read_block(self, offset: int) -> tuple[int, bytearray]:
        """The block around ``offset`` and where it begins."""
        start = self._floor(offset)
        block = bytearray(min(self._block_bytes, self.size_bytes - start))
        self._device.read_into(start, memoryview(block))
        return start, block

    def _floor(self, offset: int) -> int:
        return offset - offset % self._block_bytes

    def _ceiling(self, offset: int) -> int:
        return min(self._floor(offset + self._block_bytes - 1), self.size_bytes)
