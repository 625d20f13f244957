"""Finding the pages in the stream of a migration."""

from __future__ import annotations

import itertools
import random
import struct
import time

import pytest

from casbackup.limits import SEGMENT_BYTES
from casbackup.qemu.ram_stream import page_offsets

PAGE, ZERO, EOS, CONTINUE = 0x08, 0x02, 0x10, 0x20
PAGE_BYTES = 4096
NAME = b"\x06pc.ram"


def record(number: int, content: bytes | None, *, first: bool = False) -> bytes:
    flags = (ZERO if content is None else PAGE) | (0 if first else CONTINUE)
    head = struct.pack(">Q", number * PAGE_BYTES | flags) + (NAME if first else b"")
    return head + (b"\0" if content is None else content)


def stream(seed: int, pages: int) -> tuple[bytes, list[int]]:
    """A stream of some sections, and where its pages begin."""
    rng = random.Random(seed)
    data = bytearray(b"QEVM\0\0\0\3" + rng.randbytes(rng.randrange(300)))
    found: list[int] = []
    for number in range(pages):
        if number % 100 == 0:
            data += struct.pack(">QBIBI", EOS, 0x7E, 2, 0x02, 2)
        content = None if rng.random() < 0.3 else rng.randbytes(PAGE_BYTES)
        data += record(number, content, first=number % 250 == 0)
        if content is not None:
            found.append(len(data) - PAGE_BYTES)
    data += struct.pack(">QBI", EOS, 0x7E, 2) + rng.randbytes(5000)
    return bytes(data), found


@pytest.mark.parametrize("seed", range(5))
def test_all_pages_are_found(seed: int) -> None:
    data, expected = stream(seed, 700)
    found = page_offsets(bytearray(data), len(data))
    assert set(found) <= set(expected)
    assert len(found) >= len(expected) - 2


@pytest.mark.parametrize("seed", range(5))
def test_wherever_the_stream_is_cut(seed: int) -> None:
    data, expected = stream(seed, 300)
    rng = random.Random(seed)
    for _ in range(20):
        start = rng.randrange(len(data))
        end = rng.randrange(start, len(data))
        piece = bytearray(data[start:end])
        inside = [page - start for page in expected if page >= start + 8 and page + PAGE_BYTES <= end]
        found = page_offsets(piece, len(piece))
        assert set(found) <= {page - start for page in expected}
        assert len(found) >= len(inside) - 3


@pytest.mark.parametrize(
    "pattern",
    [
        b"\0",
        b"\x28",
        b"\x22",
        b"\0\x28",
        b"\0\0\0\0\0\0\0\x28",
        b"\0\0\0\0\0\0\0\x22",
        b"\0\0\0\0\0\0\0\x22\0",
        b"\0\0\0\0\0\0\0\x08",
        b"\0\0\0\0\0\0\0\x08\xff",
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\2\2\0\0\0\2",
    ],
)
def test_nonsense_takes_no_time(pattern: bytes) -> None:
    """What is found does not overlap and lies within; a guest can make its memory look like anything."""
    piece = bytearray((pattern * (SEGMENT_BYTES // len(pattern) + 1))[:SEGMENT_BYTES])
    began_s = time.process_time()
    found = page_offsets(piece, len(piece))
    assert time.process_time() - began_s < 2
    assert all(second - first >= PAGE_BYTES for first, second in itertools.pairwise(found))
    assert not found or found[-1] + PAGE_BYTES <= len(piece)


@pytest.mark.parametrize("length", range(20))
def test_a_few_bytes(length: int) -> None:
    assert page_offsets(bytearray(b"\0\0\0\0\0\0\0\x08" * 3)[:length], length) == []
