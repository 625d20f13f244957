"""Where archives are written to: files, which appear when they are complete, and pipes; compressed if asked for."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from casbackup.block.pending import PendingFile
from casbackup.errors import TargetClosed, TargetFull, TargetUnwritable, ToolFailed, UsageError
from casbackup.formats.child import Child
from casbackup.formats.parallel import mapped
from casbackup.formats.pipes import enlarge_pipe
from casbackup.formats.port import ByteTarget
from casbackup.fs import Buffer, RealFile
from casbackup.units import MiB
from casbackup.workers import worker_count

if TYPE_CHECKING:
    import zstandard

STDOUT = "-"
COMPRESSIONS = {"none": "", "zstd": ".zst", "gzip": ".gz", "lzop": ".lzo"}
"""What can be asked for, and the suffix that a file's name gets by it."""

_ZSTD_LEVEL = 3
_GZIP_LEVEL = 6
_GZIP_BLOCK_BYTES = 1 * MiB
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def archive_target(path: str, *, compression: str = "none", force: bool = False) -> Iterator[ByteTarget]:
    """A place to write an archive to: ``-`` is standard output; pipes and tapes are written to as they are.

    A file has a temporary name until the context ends without an error; then it is flushed and gets its own. After
    an error nothing of it is left.

    :raise TargetExists: for an existing file without ``force``.
    :raise TargetError: when nothing can be written there, or writing fails.
    :raise UsageError: for an unknown compression. :raise ToolMissing: when lzop is wanted and not installed.
    """
    if compression not in COMPRESSIONS:
        raise UsageError(f"{compression!r} is no compression; there are {', '.join(COMPRESSIONS)}")
    with _plain_target(path, force=force) as plain, _compressing(plain, compression, worker_count()) as target:
        yield target


@contextlib.contextmanager
def descriptor_target(
    descriptor: int, name: str, *, compression: str = "none", zstd_threads: int | None = None
) -> Iterator[ByteTarget]:
    """An open pipe as a place to write an archive to. It stays the caller's, and open.

    ``zstd_threads``: 0 compresses in the caller's thread, which takes little memory; None: one for each processor.
    """
    plain = DescriptorTarget(descriptor, name)
    try:
        threads = worker_count() if zstd_threads is None else zstd_threads
        with _compressing(plain, compression, threads) as target:
            yield target
    finally:
        plain.close()


@contextlib.contextmanager
def _plain_target(path: str, *, force: bool) -> Iterator[DescriptorTarget]:
    if path == STDOUT:
        yield DescriptorTarget(1, "<stdout>")
        return
    if _is_stream(path):
        with _open(path, os.O_WRONLY) as descriptor:
            yield DescriptorTarget(descriptor, path)
        return
    pending = PendingFile(path, replace=force)
    try:
        with _open(pending.temporary, os.O_WRONLY) as descriptor:
            target = DescriptorTarget(descriptor, path, seekable=True)
            yield target
            target.sync()
        pending.publish(sync=True)
    finally:
        pending.discard()


@contextlib.contextmanager
def _open(path: str, flags: int) -> Iterator[int]:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise TargetUnwritable(f"{path}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_stream(path: str) -> bool:
    """A named pipe, or a device of characters such as a tape."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


class DescriptorTarget:
    """An open file or pipe. Does not own the descriptor."""

    def __init__(self, descriptor: int, name: str, *, seekable: bool = False) -> None:
        self.descriptor = os.dup(descriptor)
        self._name = name
        self._seekable = seekable
        self._file = RealFile(self.descriptor)
        self._position = 0
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            enlarge_pipe(descriptor)

    @property
    def seekable(self) -> bool:
        return self._seekable

    def write(self, buffers: Sequence[Buffer]) -> None:
        with written(self._name):
            self._file.write(buffers)
        self._position += sum(map(len, buffers))

    def seek(self, offset: int) -> None:
        with written(self._name):
            os.lseek(self.descriptor, offset, os.SEEK_SET)
        self._position = offset

    def tell(self) -> int:
        return self._position

    def sync(self) -> None:
        with written(self._name):
            self._file.sync()

    def close(self) -> None:
        """Close the descriptor that this has of its own."""
        self._file.close()


@contextlib.contextmanager
def written(name: str) -> Iterator[None]:
    """Turn what the system says while something is written into errors of ours.

    :raise TargetClosed: for a broken pipe. :raise TargetFull: for a full disk. :raise TargetUnwritable: for the rest.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise TargetClosed(f"{name}: whoever read it went away") from error
    except OSError as error:
        kind = TargetFull if error.errno in _FULL else TargetUnwritable
        raise kind(f"{name}: {error.strerror}") from error


@contextlib.contextmanager
def _compressing(plain: DescriptorTarget, compression: str, zstd_threads: int) -> Iterator[ByteTarget]:
    if compression == "none":
        yield plain
    elif compression == "lzop":
        with Child.piped(["lzop", "-c"], "lzop", stdout=plain.descriptor) as child:
            yield PipeTarget(child.input, "lzop")
            child.close_input()
            if (failure := child.ended()) is not None:
                raise ToolFailed(failure)
    else:
        target = _ZstdTarget(plain, zstd_threads) if compression == "zstd" else _GzipTarget(plain)
        yield target
        target.finish()


class _Streaming:
    """What targets have in common that are written from front to back."""

    def __init__(self) -> None:
        self._position = 0

    @property
    def seekable(self) -> bool:
        return False

    def seek(self, offset: int) -> None:
        raise TargetUnwritable("what is being compressed or piped can only be written from front to back")

    def tell(self) -> int:
        return self._position


class _ZstdTarget(_Streaming):
    """Compresses in ``threads`` of its own, each of which takes some 50 MB; 0: in the caller's. The head comes out at
    once.
    """

    def __init__(self, plain: ByteTarget, threads: int) -> None:
        import zstandard  # noqa: PLC0415  25 ms that other targets need not pay

        super().__init__()
        self._plain = plain
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, threads=threads, write_checksum=True)
        self._compressor: zstandard.ZstdCompressionObj = compressor.compressobj()
        self._flush_block = zstandard.COMPRESSOBJ_FLUSH_BLOCK

    def write(self, buffers: Sequence[Buffer]) -> None:
        parts = [self._compressor.compress(buffer) for buffer in buffers]
        if self._position == 0:
            parts.append(self._compressor.flush(self._flush_block))
        self._position += sum(map(len, buffers))
        if any(parts):
            self._plain.write([part for part in parts if part])

    def finish(self) -> None:
        self._plain.write([self._compressor.flush()])


class _GzipTarget(_Streaming):
    """Members of 1 MiB, compressed in several threads; every reader of gzip takes them as one file."""

    def __init__(self, plain: ByteTarget) -> None:
        super().__init__()
        self._plain = plain
        self._waiting = bytearray()
        self._most_waiting = 2 * worker_count() * _GZIP_BLOCK_BYTES

    def write(self, buffers: Sequence[Buffer]) -> None:
        is_head = self._position == 0
        for buffer in buffers:
            self._waiting += buffer
            self._position += len(buffer)
            if len(self._waiting) >= self._most_waiting:
                self._pass_on(len(self._waiting) // _GZIP_BLOCK_BYTES * _GZIP_BLOCK_BYTES)
        if is_head:
            self._pass_on(len(self._waiting))

    def finish(self) -> None:
        if self._waiting or self._position == 0:
            self._pass_on(len(self._waiting))

    def _pass_on(self, length: int) -> None:
        with memoryview(self._waiting) as view:
            starts = range(0, max(length, 1), _GZIP_BLOCK_BYTES)
            blocks = [bytes(view[start : min(start + _GZIP_BLOCK_BYTES, length)]) for start in starts]
        self._plain.write(mapped(_gzip_member, blocks))
        del self._waiting[:length]


def _gzip_member(block: bytes) -> bytes:
    import gzip  # noqa: PLC0415

    return gzip.compress(block, _GZIP_LEVEL, mtime=0)


class PipeTarget(_Streaming):
    """The standard input of a program."""

    def __init__(self, pipe: BinaryIO, name: str) -> None:
        super().__init__()
        enlarge_pipe(pipe.fileno())
        self._descriptor = pipe.fileno()
        self._name = name

    def write(self, buffers: Sequence[Buffer]) -> None:
        with written(self._name):
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                while view:
                    view = view[os.write(self._descriptor, view) :]
        self._position += sum(map(len, buffers))
