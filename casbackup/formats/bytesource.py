"""Bytes of archives as they are: from files, devices and pipes."""

from __future__ import annotations

import errno
import os
import stat

from casbackup.errors import SourceUnreadable
from casbackup.formats.pipes import enlarge_pipe
from casbackup.formats.port import RECOGNISE_BYTES, ByteRange, ByteSource


def beginning(source: ByteSource, length: int = RECOGNISE_BYTES) -> tuple[bytes, ByteSource]:
    """The first bytes, by which a format is recognised, and a source that still has them."""
    first = bytearray(length)
    got = source.read_into(memoryview(first))
    del first[got:]
    if source.seekable:
        source.seek(0)
        return bytes(first), source
    return bytes(first), PrefixedSource(bytes(first), source)


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
        got = read_some(self._rest, buffer)
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


def read_some(source: ByteSource, buffer: memoryview) -> int:
    """From a pipe, what is there by now: whoever wants the head should not wait for what follows."""
    if isinstance(source, DescriptorSource | PrefixedSource):
        return source.read_some(buffer)
    return source.read_into(buffer)
