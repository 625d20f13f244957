"""Archives on the command line: which format is meant, and opening what is read and written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from casbackup.errors import ArchiveUnknown, ArchiveUnsupported, UsageError

if TYPE_CHECKING:
    from casbackup.formats.port import Archive, ArchiveFormat, ArchiveReader, ArchiveWriter, ByteSource, ByteTarget
    from casbackup.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])

PIPE = "-"
_DEFAULT_FORMAT = "vma"
_COMPRESSED = {".zst": "zstd", ".gz": "gzip", ".lzo": "lzop", ".bz2": None, ".xz": None}


def file_argument(function: F) -> F:
    """FILE, of the commands that need no repository."""
    return click.argument("path", metavar="FILE", type=click.Path())(function)


format_option = click.option(
    "--format", "format_name", metavar="FORMAT", help="Of the archive; default: told by its first bytes."
)


class Input(NamedTuple):
    """An archive to read: its format, and its bytes, decompressed."""

    format: ArchiveFormat
    source: ByteSource

    def open(self) -> tuple[Archive, ArchiveReader]:
        """:raise ArchiveUnsupported: when the format can only be written."""
        if self.format.reader is None:
            raise ArchiveUnsupported(f"archives of format {self.format.name} can only be written")
        reader = self.format.reader()
        return reader.open(self.source), reader


@contextlib.contextmanager
def opened_input(path: str, format_name: str | None, *, fallback: str | None = None) -> Iterator[Input]:
    """The archive at ``path``, or of standard input. Its format is told by its first bytes, unless it is named.

    ``fallback``: what an archive is taken for whose first bytes say nothing.

    :raise ArchiveUnknown: when they say nothing, or there is no format of that name.
    """
    from casbackup.formats.source import archive_source

    if path == PIPE and sys.stdin.isatty():
        raise UsageError("an archive cannot be read from a terminal")
    with archive_source(path) as source:
        if format_name is None:
            yield _recognised(source, path, fallback)
        else:
            yield Input(find_format(format_name), source)


def _recognised(source: ByteSource, path: str, fallback: str | None) -> Input:
    from casbackup.formats.bytesource import beginning
    from casbackup.formats.registry import recognise

    first, source = beginning(source)
    try:
        return Input(recognise(first, source.name), source)
    except ArchiveUnknown:
        found = fallback or ("raw" if plain_name(path).endswith((".raw", ".img")) else None)
        if found is None:
            raise
        return Input(find_format(found), source)


def find_format(name: str) -> ArchiveFormat:
    """:raise ArchiveUnknown: when there is none."""
    from casbackup.formats.registry import format_by_name

    return format_by_name(name)


def format_to_write(name: str | None, path: str | None) -> ArchiveFormat:
    """The format that was named, else that of the path's ending; VMA where there is none to tell by."""
    from casbackup.formats.registry import format_by_suffix

    if name is not None:
        return find_format(name)
    if path is None or path == PIPE or os.path.isdir(path):
        return find_format(_DEFAULT_FORMAT)
    return format_by_suffix(plain_name(path))


def compression_to_write(name: str | None, path: str | None) -> str:
    """The compression that was named, else that of the path's ending."""
    if name is not None:
        return name
    suffix = os.path.splitext(path or "")[1].lower()
    compression = _COMPRESSED.get(suffix, "none")
    if compression is None:
        raise UsageError(f"{path}: {suffix} cannot be written, only read")
    return compression


def plain_name(path: str) -> str:
    """The name without the ending of a compression, in lower case."""
    stem, suffix = os.path.splitext(path.lower())
    return stem if suffix in _COMPRESSED else path.lower()


def writer_of(archive_format: ArchiveFormat, options: Sequence[str]) -> ArchiveWriter:
    """:raise UsageError: for an option that the format does not have, or that is no ``NAME=VALUE``."""
    if archive_format.writer is None:
        raise ArchiveUnsupported(f"archives of format {archive_format.name} can only be read")
    known = [name for name, _ in archive_format.options]
    values: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in known:
            listed = ", ".join(known) or "none"
            raise UsageError(f"{option!r} is no option of format {archive_format.name}; it has: {listed}")
        values[name] = value
    return archive_format.writer(**values)


@contextlib.contextmanager
def opened_target(path: str, compression: str, writer: ArchiveWriter, *, force: bool) -> Iterator[ByteTarget]:
    """:raise UsageError: for a terminal. :raise ArchiveUnsupported: for a pipe, where the format needs a file."""
    from casbackup.formats.target import archive_target

    if path == PIPE and sys.stdout.isatty():
        raise UsageError("an archive cannot be written to a terminal; give a file, or redirect the output")
    with archive_target(path, compression=compression, force=force) as target:
        if not (target.seekable or writer.capabilities.streams):
            raise ArchiveUnsupported("this format can only be written to a file, uncompressed")
        yield target


class CountedSource:
    """A source whose reading is shown."""

    def __init__(self, source: ByteSource, progress: Progress) -> None:
        self._source = source
        self._progress = progress
        self._shown = 0
        progress.start(source.name, source.size_bytes)

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def seekable(self) -> bool:
        return self._source.seekable

    @property
    def size_bytes(self) -> int | None:
        return self._source.size_bytes

    def read_into(self, buffer: memoryview) -> int:
        got = self._source.read_into(buffer)
        self._show()
        return got

    def seek(self, offset: int) -> None:
        self._source.seek(offset)
        self._show()

    def tell(self) -> int:
        return self._source.tell()

    def _show(self) -> None:
        """The farthest place so far, so that who goes back is not counted twice."""
        position = self._source.tell()
        if position > self._shown:
            self._progress.advance(done=position - self._shown)
            self._shown = position
