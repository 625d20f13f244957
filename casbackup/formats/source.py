"""Where archives are read from: files and pipes, plain or compressed."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from casbackup.errors import SourceNotFound, SourceUnreadable
from casbackup.formats.bytesource import DescriptorSource
from casbackup.formats.decompress import decompressed
from casbackup.formats.port import ByteSource

STDIN = "-"


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
