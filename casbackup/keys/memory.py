"""Keeping keys where they belong: in this process's memory."""

from __future__ import annotations

import contextlib
import resource

_PR_SET_DUMPABLE = 4


def keep_out_of_dumps() -> None:
    """From now on this process leaves no core dump, and no other one of the same user can look into its memory.

    A system that refuses this is not an error. Programs that it starts leave no core dumps either.
    """
    import ctypes  # noqa: PLC0415  5 ms that only encryption spends

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
