"""Putting a damaged header right, where its MD5 proves that the result is what was written: fields that can have but
one value are set to it, and then each single bit is tried.
"""

from __future__ import annotations

from hashlib import md5
from typing import NamedTuple

from casbackup.spec import vma

_MAX_MD5_BITS = 8
"""So many flipped bits in the checksum itself are still no coincidence."""

_MAX_MARK_BITS = 8
"""What should be an extent's magic and uuid may differ in so many bits and still be worth trying."""

_MD5_BLOCK = 64


class Mended(NamedTuple):
    """``header`` as it was before the byte at ``place``, and perhaps others, became wrong."""

    header: bytes
    place: int


def mended_header(header: bytes) -> Mended | None:
    """An archive header of exactly this length, put right; None if more than that is wrong."""
    known = bytearray(header)
    known[:8] = vma.MAGIC + vma.VERSION.to_bytes(4, "big")
    known[48:52] = vma.FIXED_BYTES.to_bytes(4, "big")
    known[56:60] = len(header).to_bytes(4, "big")
    return _mended(header, known, vma.MD5_OFFSET)


def mended_extent(header: bytes, uuid: bytes) -> Mended | None:
    """The 512 bytes of an extent's header of the archive ``uuid``, put right; None if more than that is wrong."""
    known = bytearray(header)
    known[:6] = vma.EXTENT_MAGIC + b"\0\0"
    known[8:24] = uuid
    if _distance(header[:24], known[:24]) > _MAX_MARK_BITS:
        return None
    return _mended(header, known, vma.EXTENT_MD5_OFFSET)


def _mended(header: bytes, known: bytearray, md5_offset: int) -> Mended | None:
    """``known``: the header with those fields set right that can have but one value."""
    md5_end = md5_offset + vma.MD5_BYTES
    stored = header[md5_offset:md5_end]
    known[md5_offset:md5_end] = bytes(vma.MD5_BYTES)
    right = md5(known, usedforsecurity=False).digest()
    place: int | None = md5_offset
    if right == stored:
        place = next((i for i in range(len(header)) if not md5_offset <= i < md5_end and header[i] != known[i]), 0)
    elif _distance(right, stored) > _MAX_MD5_BITS:
        right, place = stored, _flipped(known, stored)
    known[md5_offset:md5_end] = right
    return Mended(bytes(known), place) if place is not None else None


def _flipped(data: bytearray, wanted: bytes) -> int | None:
    """Flip the bit of ``data`` that makes its MD5 the wanted one; returns the byte that it is in."""
    before = md5(usedforsecurity=False)
    view = memoryview(data)
    for start in range(0, len(data), _MD5_BLOCK):
        block, rest = view[start : start + _MD5_BLOCK], view[start + _MD5_BLOCK :]
        for place in range(start, start + len(block)):
            for bit in range(8):
                data[place] ^= 1 << bit
                trial = before.copy()
                trial.update(block)
                trial.update(rest)
                if trial.digest() == wanted:
                    return place
                data[place] ^= 1 << bit
        before.update(block)
    return None


def _distance(a: bytes | bytearray, b: bytes | bytearray) -> int:
    """In how many bits they differ; both are equally long."""
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_count()
