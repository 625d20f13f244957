"""Compressing and decompressing in several threads: the C libraries release the GIL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from casbackup.units import MiB
from casbackup.workers import worker_count

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")
R = TypeVar("R")

_BATCH_BYTES = 2 * MiB


def batch_of(block_bytes: int) -> int:
    """How many blocks of this size are worth handing out at once; bounds what lies in memory."""
    return max(2, _BATCH_BYTES // block_bytes)


def mapped(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``function`` of each item, in their order. The first error of any is raised."""
    if len(items) < 2:
        return [function(item) for item in items]
    return list(_pool().map(function, items))


@cache
def _pool() -> ThreadPoolExecutor:
    """One for the process; its threads end with it."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  10 ms that only compressed formats need

    return ThreadPoolExecutor(worker_count(), "casbackup-codec")
