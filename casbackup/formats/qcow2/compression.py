"""Compressed clusters: raw deflate with a window of 4 KiB, which is all that QEMU decompresses, or zstd frames."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from casbackup.formats.deflate import BARE, Undecompressable, deflate, inflate
from casbackup.fs import Buffer
from casbackup.units import MiB

if TYPE_CHECKING:
    import zstandard

_WINDOW_BITS = -12
_MAX_ZSTD_WINDOW_BYTES = 8 * MiB

ZSTD_LEVELS = range(1, 20)

Compress = Callable[[Buffer], bytes]


def deflater(level: int) -> Compress:
    return lambda data: deflate(data, level, _WINDOW_BITS)


def zstd_compressor(level: int) -> Compress:
    """Contexts cannot be shared, so each thread has its own. Frames have a checksum: qcow2 has no other."""
    import zstandard  # noqa: PLC0415  23 ms that only this needs

    contexts = threading.local()

    def compress(data: Buffer) -> bytes:
        context: zstandard.ZstdCompressor | None = getattr(contexts, "compressor", None)
        if context is None:
            context = contexts.compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        return context.compress(data)

    return compress


def unpack_deflated(data: Buffer, length: int) -> bytes:
    """``length`` bytes; what follows the stream is ignored, for only the number of sectors is known.

    :raise Undecompressable: when there are more or less.
    """
    return _checked(inflate(data, length, BARE), length)


def unpack_zstd(data: Buffer, length: int) -> bytes:
    """As ``unpack_deflated``."""
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
