"""Memory for the bodies of uploads, used again and again: fresh pages cost several times what filling them costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from mmap import mmap

from casbackup.limits import UPLOAD_BYTES
from casbackup.units import MiB

_BUFFER_BYTES = UPLOAD_BYTES + 1 * MiB
"""What clients send at once, and the record with which it became too much."""
_SMALLEST_BYTES = 64 * 1024
_KEPT = 8


class BodyMemory:
    """Belongs to one event loop; what it lends may be used in threads."""

    def __init__(self) -> None:
        self._free: list[mmap] = []

    @contextlib.contextmanager
    def lent(self, size_bytes: int) -> Iterator[memoryview]:
        """Memory of that size, with anything in it. It is not lent again while anybody still has a view of a part."""
        if not _SMALLEST_BYTES <= size_bytes <= _BUFFER_BYTES:
            yield memoryview(bytearray(size_bytes))
            return
        buffer = self._free.pop() if self._free else mmap(-1, _BUFFER_BYTES)
        try:
            with memoryview(buffer)[:size_bytes] as view:
                yield view
        finally:
            if not _is_in_use(buffer) and len(self._free) < _KEPT:
                self._free.append(buffer)


def _is_in_use(buffer: mmap) -> bool:
    try:
        buffer.resize(len(buffer))  # changes nothing; refused while there are views
    except BufferError:
        return True
    return False
