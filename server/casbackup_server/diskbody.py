"""Ranges of a disk as the bodies of answers. Memory is a piece at a time; zeros take none and no time."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import NamedTuple

from casbackup.fs import Buffer
from casbackup.peer.served import ServedDisk
from casbackup.units import KiB, MiB
from casbackup_server.ranges import Span
from casbackup_server.threads import Threads

RAW = "application/octet-stream"
_PIECE_BYTES = 512 * KiB
_HOLE_BYTES = 64 * MiB
"""How far zeros are followed at once."""
_ZEROS = memoryview(bytes(_PIECE_BYTES))


class Part(NamedTuple):
    """What comes before the bytes of a range."""

    head: bytes
    span: Span


class Body(NamedTuple):
    """``parts``, then ``tail``."""

    parts: Sequence[Part]
    tail: bytes
    media_type: str

    @property
    def length(self) -> int:
        return sum(len(part.head) + part.span.length for part in self.parts) + len(self.tail)


def plain(span: Span) -> Body:
    return Body([Part(b"", span)], b"", RAW)


def multipart(spans: Sequence[Span], size_bytes: int) -> Body:
    """``multipart/byteranges``, with a boundary that no disk holds: it is random."""
    boundary = secrets.token_hex(16)
    parts = [
        Part(f"{line}--{boundary}\r\n{_part_headers(span, size_bytes)}\r\n".encode(), span)
        for line, span in zip(["", *["\r\n"] * len(spans)], spans, strict=False)
    ]
    return Body(parts, f"\r\n--{boundary}--\r\n".encode(), f"multipart/byteranges; boundary={boundary}")


def _part_headers(span: Span, size_bytes: int) -> str:
    return f"Content-Type: {RAW}\r\nContent-Range: {span.content_range(size_bytes)}\r\n"


class _Piece(NamedTuple):
    """``data`` None: zeros."""

    length: int
    data: Buffer | None


async def pieces(threads: Threads, disk: ServedDisk, body: Body) -> AsyncIterator[Buffer]:
    """The bytes, verified.

    :raise DataDamage: when some are lost; those before them have come.
    """
    for head, span in body.parts:
        if head:
            yield head
        position = span.start
        while position < span.end:
            piece = await threads.run(partial(_read, disk, position, span.end))
            position += piece.length
            if piece.data is not None:
                yield piece.data
            else:
                for start in range(0, piece.length, _PIECE_BYTES):
                    yield _ZEROS[: min(_PIECE_BYTES, piece.length - start)]
            del piece
    if body.tail:
        yield body.tail


def _read(disk: ServedDisk, position: int, end: int) -> _Piece:
    length = min(_PIECE_BYTES, end - position)
    if _zeros(disk, position, length) == length:
        return _Piece(_zeros(disk, position, min(_HOLE_BYTES, end - position)), None)
    buffer = bytearray(length)
    disk.read_into(position, memoryview(buffer))
    return _Piece(length, buffer)


def _zeros(disk: ServedDisk, position: int, length: int) -> int:
    """How many bytes from there on are zeros that need not be read."""
    first = next(disk.extents(position, length))
    return first.length if first.zero else 0
