"""What keeps the memory of a process small that runs for months, with many threads."""

from __future__ import annotations

import contextlib
import ctypes
import gc

from casbackup.units import MiB

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_ARENAS = 2
_GARBAGE = (2_000, 10, 10)


def bound_heap() -> None:
    """Have all threads share few arenas, and buffers of 1 MiB and more go back to the system when they are freed, where
    the C library knows of that. By itself it keeps freed memory for each thread.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, _ARENAS)
        mallopt(_M_MMAP_THRESHOLD, 1 * MiB)


def collect_garbage() -> None:
    """Look for cycles again, which short commands do not: clients that go away leave some. Call this when what stays
    has been made, which is left out.
    """
    gc.freeze()
    gc.set_threshold(*_GARBAGE)
