"""Pipes between programs."""

from __future__ import annotations

import contextlib
import fcntl

from casbackup.units import MiB

_PIPE_BYTES = 1 * MiB


def enlarge_pipe(descriptor: int) -> None:
    """Fewer switches between the two ends; refused where the system's limits for pipes are reached."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
