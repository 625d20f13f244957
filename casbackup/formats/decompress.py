"""Decompressing archives as they are read. Which compression it is, their first bytes tell."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from casbackup.buffers import aligned_buffer
from casbackup.errors import ArchiveDamaged, SourceUnreadable
from casbackup.formats.bytesource import beginning, read_some
from casbackup.formats.child import Child
from casbackup.formats.port import ByteSource
from casbackup.units import KiB

_FEED_BYTES = 256 * KiB

_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
_LZOP = b"\x89LZO\0\r\n\x1a\n"
_LONGEST_MAGIC = len(_LZOP)


@contextlib.contextmanager
def decompressed(raw: ByteSource) -> Iterator[ByteSource]:
    """What ``raw`` has, decompressed if it is compressed: once, not again and again.

    gzip files of several members and zstd files of several frames are read to their end.
    """
    first, raw = beginning(raw, _LONGEST_MAGIC)
    if first.startswith(_LZOP):
        with Child.piped(["lzop", "-d", "-c"], "lzop") as child, _feeding(raw, child):
            yield _ChildSource(child, raw.name)
        return
    yield _decompressing(first, raw)


class DecompressedSource:
    """What a decompressing stream gives."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._position = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def seekable(self) -> bool:
        return False

    @property
    def size_bytes(self) -> int | None:
        return None

    def read_into(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            got = self._read(buffer[done:])
            if got == 0:
                break
            done += got
        self._position += done
        return done

    def seek(self, offset: int) -> None:
        raise SourceUnreadable(f"{self._name} is compressed: it can only be read from front to back")

    def tell(self) -> int:
        return self._position

    def _damaged(self, error: Exception) -> ArchiveDamaged:
        return ArchiveDamaged(f"{self._name} cannot be decompressed after byte {self._position}: {error}")

    def _read(self, buffer: memoryview) -> int:
        try:
            return int(self._stream.readinto1(buffer))  # type: ignore[attr-defined]
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise self._damaged(error) from error


class _ZstdSource(DecompressedSource):
    """zstandard's errors are known only where it is imported."""

    def _read(self, buffer: memoryview) -> int:
        import zstandard  # noqa: PLC0415

        try:
            return super()._read(buffer)
        except zstandard.ZstdError as error:
            raise self._damaged(error) from error


class _ChildSource(DecompressedSource):
    """What a program writes; it must have ended well when its output ends."""

    def __init__(self, child: Child, name: str) -> None:
        super().__init__(child.output, name)
        self._child = child

    def read_into(self, buffer: memoryview) -> int:
        done = super().read_into(buffer)
        if done < len(buffer) and (failure := self._child.ended()) is not None:
            raise ArchiveDamaged(f"{self.name} cannot be decompressed: {failure}")
        return done


class _Stream(io.RawIOBase):
    """A source as the file that decompressors want."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return read_some(self._source, memoryview(buffer).cast("B"))


def _decompressing(first: bytes, raw: ByteSource) -> ByteSource:
    if first.startswith(_ZSTD) or first[1:4] == _ZSTD_SKIPPABLE:
        import zstandard  # noqa: PLC0415  25 ms that other archives need not pay

        reader = zstandard.ZstdDecompressor().stream_reader(
            cast(BinaryIO, _Stream(raw)), read_size=_FEED_BYTES, read_across_frames=True
        )
        return _ZstdSource(cast(BinaryIO, reader), raw.name)
    for magic, opened in _DECOMPRESSORS.items():
        if first.startswith(magic):
            file = opened(cast(BinaryIO, _Stream(raw)))
            return DecompressedSource(cast(BinaryIO, file), raw.name)
    return raw


_DECOMPRESSORS: dict[bytes, Callable[[BinaryIO], object]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}


@contextlib.contextmanager
def _feeding(raw: ByteSource, child: Child) -> Iterator[None]:
    """Pass what ``raw`` has on to a program, in a thread of its own."""

    def feed() -> None:
        buffer = memoryview(aligned_buffer(_FEED_BYTES))
        with contextlib.suppress(OSError, SourceUnreadable), child.input as pipe:
            while got := read_some(raw, buffer):
                pipe.write(buffer[:got])

    thread = threading.Thread(target=feed, name="feed", daemon=True)
    thread.start()
    yield
