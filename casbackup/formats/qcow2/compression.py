"""Compressed clusters: raw deflate with a window of 4 KiB, which is all that QEMU decompresses, or zstd frames."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from casbackup.fs import Buffer
from casbackup.units import MiB

if TYPE_CHECKING:
    import zstandard

_WINDOW_BITS = -12
_ANY_WINDOW_BITS = -15
_MAX_ZSTD_WINDOW_BYTES = 8 * MiB

ZLIB_LEVELS = range(1, 10)
ZSTD_LEVELS = range(1, 20)

Compress = Callable[[Buffer], bytes]


class Undecompressable(ValueError):
    """A cluster's bytes are not what its kind of compression makes."""


def deflater(level: int) -> Compress:
    def deflate(data: Buffer) -> bytes:
        compressor = zlib.compressobj(level, zlib.DEFLATED, _WINDOW_BITS)
        return compressor.compress(data) + compressor.flush()

    return deflate


def zstd_compressor(level: int) -> Compress:
    """Contexts cannot be shared, so each thread has its own."""
    import zstandard  # noqa: PLC0415  23 ms that only this needs

    contexts = threading.local()

    def compress(data: Buffer) -> bytes:
        context: zstandard.ZstdCompressor | None = getattr(contexts, "compressor", None)
        if context is None:
            context = contexts.compressor = zstandard.ZstdCompressor(level=level)
        return context.compress(data)

    return compress


def inflate(data: Buffer, length: int) -> bytes:
    """``length`` bytes; what follows the stream is ignored, for only the number of sectors is known.

    :raise Undecompressable: when there are not as many.
    """
    try:
        plain = zlib.decompressobj(_ANY_WINDOW_BITS).decompress(data, length)
    except zlib.error as error:
        raise Undecompressable(str(error)) from error
    return _checked(plain, length)


def unzstd(data: Buffer, length: int) -> bytes:
    """As ``inflate``."""
    import zstandard  # noqa: PLC0415

    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(data) as reader:
            plain = reader.read(length)
    except zstandard.ZstdError as error:
        raise Undecompressable(str(error)) from error
    return _checked(plain, length)


def _checked(plain: bytes, length: int) -> bytes:
    if len(plain) < length:
        raise Undecompressable(f"{len(plain)} bytes instead of {length}")
    return plain
