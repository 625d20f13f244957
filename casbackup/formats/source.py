"""Where archives are read from: files and pipes, plain or compressed. Which compression, their first bytes tell."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from casbackup.errors import ArchiveDamaged, SourceNotFound, SourceUnreadable
from casbackup.formats.child import Child
from casbackup.formats.pipes import enlarge_pipe
from casbackup.formats.port import RECOGNISE_BYTES, ByteRange, ByteSource
from casbackup.units import KiB

STDIN = "-"
_FEED_BYTES = 256 * KiB

_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
_LZOP = b"\x89LZO\0\r\n\x1a\n"
_LONGEST_MAGIC = len(_LZOP)


@contextlib.contextmanager
def archive_source(path: str) -> Iterator[ByteSource]:
    """The decompressed bytes of the file, device or pipe at ``path``; ``-`` is standard input.

    :raise SourceError: when it cannot be opened. :raise ToolMissing: when it is lzop's and lzop is not installed.
    """
    descriptor = 0 if path == STDIN else _opened(path)
    try:
        with decompressed(DescriptorSource(descriptor, "<stdin>" if path == STDIN else path)) as source:
            yield source
    finally:
        if path != STDIN:
            os.close(descriptor)


def beginning(source: ByteSource, length: int = RECOGNISE_BYTES) -> tuple[bytes, ByteSource]:
    """The first bytes, by which a format is recognised, and a source that still has them."""
    first = bytearray(length)
    got = source.read_into(memoryview(first))
    del first[got:]
    if source.seekable:
        source.seek(0)
        return bytes(first), source
    return bytes(first), PrefixedSource(bytes(first), source)


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


class DescriptorSource:
    """An open file or pipe. Files know their size and their holes. Does not own the descriptor."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._position = 0
        mode = os.fstat(descriptor).st_mode
        self._seekable = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
        self._start = os.lseek(descriptor, 0, os.SEEK_CUR) if self._seekable else 0
        if stat.S_ISFIFO(mode):
            enlarge_pipe(descriptor)

    @property
    def name(self) -> str:
        return self._name

    @property
    def seekable(self) -> bool:
        return self._seekable

    @property
    def size_bytes(self) -> int | None:
        if not self._seekable:
            return None
        size = os.lseek(self._descriptor, 0, os.SEEK_END) - self._start
        os.lseek(self._descriptor, self._start + self._position, os.SEEK_SET)
        return size

    def read_into(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer) and (got := self.read_some(buffer[done:])):
            done += got
        return done

    def read_some(self, buffer: memoryview) -> int:
        """What is there by now, at least a byte; 0 at the end."""
        try:
            got = os.readv(self._descriptor, [buffer])
        except OSError as error:
            raise SourceUnreadable(f"{self._name} cannot be read: {error.strerror}") from error
        self._position += got
        return got

    def seek(self, offset: int) -> None:
        os.lseek(self._descriptor, self._start + offset, os.SEEK_SET)
        self._position = offset

    def tell(self) -> int:
        return self._position

    def next_data(self, offset: int) -> ByteRange | None:
        """See ``SparseSource``. Where the file system cannot tell, all is data."""
        try:
            start = os.lseek(self._descriptor, self._start + offset, os.SEEK_DATA)
            end = os.lseek(self._descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            start, end = self._start + offset, self._start + (self.size_bytes or 0)
        finally:
            os.lseek(self._descriptor, self._start + self._position, os.SEEK_SET)
        return ByteRange(start - self._start, end - start)


class PrefixedSource:
    """A pipe from which the first bytes have been read already."""

    def __init__(self, first: bytes, rest: ByteSource) -> None:
        self._first = memoryview(first)
        self._rest = rest
        self._position = 0

    @property
    def name(self) -> str:
        return self._rest.name

    @property
    def seekable(self) -> bool:
        return False

    @property
    def size_bytes(self) -> int | None:
        return None

    def read_into(self, buffer: memoryview) -> int:
        length = self._from_first(buffer)
        if length < len(buffer):
            got = self._rest.read_into(buffer[length:])
            self._position += got
            length += got
        return length

    def read_some(self, buffer: memoryview) -> int:
        """What is there by now, at least a byte; 0 at the end."""
        if self._first:
            return self._from_first(buffer)
        got = _read_some(self._rest, buffer)
        self._position += got
        return got

    def _from_first(self, buffer: memoryview) -> int:
        length = min(len(buffer), len(self._first))
        buffer[:length] = self._first[:length]
        self._first = self._first[length:]
        self._position += length
        return length

    def seek(self, offset: int) -> None:
        raise SourceUnreadable(f"{self.name} is a pipe: nothing can be read twice")

    def tell(self) -> int:
        return self._position


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


def _read_some(source: ByteSource, buffer: memoryview) -> int:
    """From a pipe, what is there by now: whoever wants the head should not wait for what follows."""
    if isinstance(source, DescriptorSource | PrefixedSource):
        return source.read_some(buffer)
    return source.read_into(buffer)


class _Stream(io.RawIOBase):
    """A source as the file that decompressors want."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return _read_some(self._source, memoryview(buffer).cast("B"))


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
        buffer = memoryview(bytearray(_FEED_BYTES))
        with contextlib.suppress(OSError, SourceUnreadable), child.input as pipe:
            while got := _read_some(raw, buffer):
                pipe.write(buffer[:got])

    thread = threading.Thread(target=feed, name="feed", daemon=True)
    thread.start()
    yield


def _opened(path: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise SourceUnreadable(f"{path} cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceUnreadable(f"{path} is a folder")
    return descriptor
