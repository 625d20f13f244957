"""Which blocks of a buffer are all zero."""

from __future__ import annotations

import re

from casbackup.fs import Buffer
from casbackup.limits import BLOCK_BYTES, SEGMENT_BLOCKS, SEGMENT_BYTES

ZEROS = bytes(SEGMENT_BYTES)

_SAMPLE_OFFSETS = tuple(i * 512 + (i * 37 + 11) % 512 for i in range(8))
_PRESENT = bytes([0]) + bytes([1]) * 255
_ZERO_RUN = re.compile(rb"\0{1,%d}" % SEGMENT_BLOCKS)


def nonzero_blocks(data: Buffer) -> bytes:
    """A byte for each 4 KiB of ``data`` (the last may be shorter): 0 where it is all zero, else 1.

    One byte at each of 8 places of a block tells most blocks with data; a memcmp confirms the rest. That reads a
    part of 4 MiB of data and all of 4 MiB of zeros.
    """
    view = memoryview(data)
    blocks = -(-len(view) // BLOCK_BYTES)
    union = 0
    for offset in _SAMPLE_OFFSETS:
        union |= int.from_bytes(view[offset::BLOCK_BYTES], "little")
    flags = union.to_bytes(blocks, "little").translate(_PRESENT)
    if 0 not in flags:
        return flags
    confirmed = bytearray(flags)
    for match in _ZERO_RUN.finditer(flags):
        start, end = match.span()
        if not is_zero(view[start * BLOCK_BYTES : end * BLOCK_BYTES]):
            for block in range(start, end):
                confirmed[block] = not is_zero(view[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
    return bytes(confirmed)


def is_zero(view: memoryview) -> bool:
    """``view`` is at most SEGMENT_BYTES long."""
    return ZEROS.startswith(view)
