"""Blocks of zeros are found exactly, whatever the buffer and wherever the one byte is that is not zero."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casbackup.formats.zeros import nonzero_blocks
from casbackup.units import KiB, MiB


def as_seen(data: bytes) -> bytes:
    return bytes(any(data[start : start + 4096]) for start in range(0, len(data), 4096))


@given(st.integers(0, 70_000), st.lists(st.tuples(st.integers(0, 70_000), st.integers(1, 9000), st.booleans())))
def test_flags_are_those_of_a_plain_look(size: int, changes: list[tuple[int, int, bool]]) -> None:
    data = bytearray(size)
    for start, length, is_data in changes:
        end = min(start + length, size)
        data[start:end] = (b"\xff" if is_data else b"\0") * max(end - start, 0)
    for buffer in (bytes(data), data, memoryview(data)):
        assert nonzero_blocks(buffer) == as_seen(bytes(data))


def test_one_byte_anywhere_counts() -> None:
    for place in range(0, 4096, 7):
        data = bytearray(12 * KiB)
        data[4096 + place] = 1
        assert nonzero_blocks(data) == b"\0\1\0"


@pytest.mark.parametrize("size", [4 * MiB, 9 * MiB + 100])
def test_large_buffers(size: int) -> None:
    assert nonzero_blocks(bytes(size)) == bytes(-(-size // 4096))
    data = bytearray(random.Random(1).randbytes(size))
    data[5 * 4096 : 2 * MiB] = bytes(2 * MiB - 5 * 4096)
    assert nonzero_blocks(data) == as_seen(bytes(data))
