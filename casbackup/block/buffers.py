"""Buffers that are lent, bounded in total, and used again."""

from __future__ import annotations

import threading
from mmap import mmap

from casbackup.buffers import ByteBuffer, aligned_buffer
from casbackup.units import KiB, MiB

MAX_BUFFER_BYTES = 1 * MiB
_MIN_BUFFER_BYTES = 4 * KiB


class BufferPool:
    """Lends buffers of up to 1 MiB; what all of them take stays within a limit, idle ones included.

    Used again rather than made anew, because the pages of a new MiB cost as much as receiving it does. Sizes
    are powers of two inside, so a buffer may take up to twice what was asked for.
    """

    def __init__(self, limit_bytes: int) -> None:
        """:raise ValueError: for a limit of fewer than two buffers."""
        if limit_bytes < 2 * MAX_BUFFER_BYTES:
            raise ValueError(f"a limit of {limit_bytes} bytes is too small")
        self._limit_bytes = limit_bytes
        self._lent_bytes = 0
        self._idle: dict[int, list[ByteBuffer]] = {}
        self._idle_bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def lent_bytes(self) -> int:
        return self._lent_bytes

    def take(self, length: int, *, timeout_s: float | None = None, spare_bytes: int = 0) -> memoryview | None:
        """A buffer of ``length`` bytes of any content, or None: none came free in time, or the pool is closed.

        ``spare_bytes``: leave so much of the limit to others. ``timeout_s`` of None waits for ever.
        """
        size = _rounded(length)
        most = self._limit_bytes - spare_bytes - size
        with self._changed:
            if self._lent_bytes > most and not self._closed:
                self._changed.wait_for(lambda: self._closed or self._lent_bytes <= most, timeout_s)
            if self._closed or self._lent_bytes > most:
                return None
            return memoryview(self._buffer(size))[:length]

    def give_back(self, buffer: memoryview) -> None:
        """Take back what ``take`` gave, the very view, once."""
        block = buffer.obj
        assert isinstance(block, bytearray | mmap)
        with self._changed:
            self._lent_bytes -= len(block)
            if not self._closed:
                self._idle.setdefault(len(block), []).append(block)
                self._idle_bytes += len(block)
            self._changed.notify_all()

    def close(self) -> None:
        """Lend nothing any more; whoever waits is told so. What is lent may still be given back."""
        with self._changed:
            self._closed = True
            self._drop_idle()
            self._changed.notify_all()

    def _buffer(self, size: int) -> ByteBuffer:
        self._lent_bytes += size
        fitting = self._idle.get(size)
        if fitting:
            self._idle_bytes -= size
            return fitting.pop()
        if self._lent_bytes + self._idle_bytes > self._limit_bytes:
            self._drop_idle()
        return aligned_buffer(size)

    def _drop_idle(self) -> None:
        self._idle.clear()
        self._idle_bytes = 0


def _rounded(length: int) -> int:
    """The size that a buffer of ``length`` bytes has inside."""
    assert 0 < length <= MAX_BUFFER_BYTES
    return 1 << (max(length, _MIN_BUFFER_BYTES) - 1).bit_length()
