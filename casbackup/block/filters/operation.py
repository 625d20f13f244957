"""The kinds of calls that filters speak of."""

from __future__ import annotations

from enum import Enum


class Operation(Enum):
    READ = "read"
    WRITE = "write"
    WRITE_ZEROS = "write zeros"
    DISCARD = "discard"
    FLUSH = "flush"
    EXTENTS = "extents"
