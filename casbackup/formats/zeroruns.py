"""Zeros in buffers of any length: finding them, and writing them without having them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from casbackup.formats.zeros import ZEROS, is_zero
from casbackup.fs import Buffer

_BUFFERS_AT_ONCE = 64


class Run(NamedTuple):
    """The bytes [start, end) of a buffer."""

    start: int
    end: int
    is_zero: bool


def all_zero(data: Buffer) -> bool:
    view = memoryview(data)
    return all(is_zero(view[start : start + len(ZEROS)]) for start in range(0, len(view), len(ZEROS)))


def runs(data: Buffer, unit_bytes: int) -> Iterator[Run]:
    """The buffer as runs that are zero or not, as long as possible, cut at multiples of ``unit_bytes``."""
    view = memoryview(data)
    first, was_zero = 0, False
    for start in range(0, len(view), unit_bytes):
        zero = is_zero(view[start : start + unit_bytes])
        if start and zero != was_zero:
            yield Run(first, start, was_zero)
            first = start
        was_zero = zero
    if len(view):
        yield Run(first, len(view), was_zero)


def zero_buffers(length: int) -> Iterator[list[memoryview]]:
    """``length`` zeros in portions for ``ByteTarget.write``; no memory is taken for them."""
    view = memoryview(ZEROS)
    while length > 0:
        portion: list[memoryview] = []
        while length > 0 and len(portion) < _BUFFERS_AT_ONCE:
            portion.append(view[:length])
            length -= len(portion[-1])
        yield portion
