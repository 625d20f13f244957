"""The C library's heap. By itself it keeps freed memory for each of the many threads of a server."""

from __future__ import annotations

import contextlib
import ctypes

from casbackup.units import MiB

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_ARENAS = 2


def bound_heap() -> None:
    """Have all threads share few arenas, and buffers of 1 MiB and more go back to the system when they are freed, where
    the C library knows of that.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, _ARENAS)
        mallopt(_M_MMAP_THRESHOLD, 1 * MiB)
