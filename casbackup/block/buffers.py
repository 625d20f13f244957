"""Buffers that are lent, bounded in total, and used again."""

from __future__ import annotations

import threading
from mmap import mmap

from casbackup.block.slots import BLOCK_BYTES, Slots, rounded

MAX_BUFFER_BYTES = BLOCK_BYTES


class BufferPool:
    """Lends buffers of up to 1 MiB out of one piece of memory, which another process may see, too.

    Used again rather than made anew, because the pages of a new MiB cost as much as receiving it does. Sizes
    are powers of two inside, so a buffer may take up to twice what was asked for.
    """

    def __init__(self, memory: int | mmap) -> None:
        """``memory``: where the buffers lie, or how many bytes of it there are to be.

        :raise ValueError: for fewer than two of the largest buffers.
        """
        self.limit_bytes = memory if isinstance(memory, int) else len(memory)
        if self.limit_bytes < 2 * MAX_BUFFER_BYTES:
            raise ValueError(f"a limit of {self.limit_bytes} bytes is too small")
        self._memory = memoryview(mmap(-1, memory) if isinstance(memory, int) else memory)
        self._slots = Slots(self.limit_bytes)
        self._lent: dict[int, tuple[memoryview, int]] = {}
        self._waiting = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def lent_bytes(self) -> int:
        return self._slots.taken_bytes

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a buffer."""
        return self._waiting > 0

    def take(self, length: int, *, timeout_s: float | None = None, spare_bytes: int = 0) -> memoryview | None:
        """A buffer of ``length`` bytes of any content, or None: none came free in time, or the pool is closed.

        ``spare_bytes``: leave so much of the limit to others. ``timeout_s`` of None waits for ever.
        """
        most = self.limit_bytes - spare_bytes - rounded(length)
        with self._changed:
            if not self._fits(length, most):
                self._waiting += 1
                self._changed.wait_for(lambda: self._closed or self._fits(length, most), timeout_s)
                self._waiting -= 1
            if self._closed or not self._fits(length, most):
                return None
            start = self._slots.take(length)
            assert start is not None
            buffer = self._memory[start : start + length]
            self._lent[id(buffer)] = buffer, start
            return buffer

    def position(self, buffer: memoryview) -> int:
        """Where in the memory a buffer lies that is lent: the very view that ``take`` gave."""
        return self._lent[id(buffer)][1]

    def give_back(self, buffer: memoryview) -> None:
        """Take back what ``take`` gave, the very view, once."""
        with self._changed:
            _buffer, start = self._lent.pop(id(buffer))
            self._slots.give_back(start)
            self._changed.notify_all()

    def close(self) -> None:
        """Lend nothing any more; whoever waits is told so. What is lent may still be given back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, length: int, most_lent_bytes: int) -> bool:
        return self._slots.taken_bytes <= most_lent_bytes and self._slots.fits(length)
