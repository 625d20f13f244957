"""What ``backup`` reads: the meaning of ``scsi0=vm.raw`` and ``--config 100.conf``, and standard input as a
disk.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

from casbackup.errors import (
    DuplicateDisk,
    Interrupted,
    InvalidName,
    SourceNotFound,
    SourceUnreadable,
    UsageError,
)
from casbackup.ids import DiskName, parse_config_name, parse_disk
from casbackup_client.signals import wakeup_on_signal

if TYPE_CHECKING:
    from casbackup.jobs.backup import DiskInput

STDIN = "-"


class DiskSource(NamedTuple):
    """One ``DISK=SOURCE``."""

    name: DiskName
    spec: str


def parse_disks(texts: Sequence[str]) -> list[DiskSource]:
    """:raise UsageError: for a bad or repeated name, a missing source, or more than one ``-``."""
    disks: list[DiskSource] = []
    for text in texts:
        name, equals, spec = text.partition("=")
        if not equals or not spec:
            raise UsageError(f"{text!r} is not a disk and its source: it must look like scsi0=vm.raw")
        disk = parse_disk(name)
        if any(disk == other.name for other in disks):
            raise DuplicateDisk(f"disk {disk} is given twice")
        disks.append(DiskSource(disk, spec))
    if sum(disk.spec == STDIN for disk in disks) > 1:
        raise UsageError("only one disk can come from standard input")
    return disks


def read_configs(texts: Sequence[str]) -> dict[str, bytes]:
    """Read each ``PATH`` or ``NAME=PATH``; a path alone is named by its last part.

    :raise UsageError: for a bad or repeated name. :raise SourceError: when a file cannot be read.
    """
    configs: dict[str, bytes] = {}
    for text in texts:
        name, path = _config_place(text)
        if parse_config_name(name) in configs:
            raise UsageError(f"config {name} is given twice")
        configs[name] = _content(path)
    return configs


def _config_place(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if equals and path:
        with contextlib.suppress(InvalidName):
            return parse_config_name(name), path
    return os.path.basename(text), text


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise SourceUnreadable(f"{path} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def opened(disks: Sequence[DiskSource], image_format: str | None) -> Iterator[list[DiskInput]]:
    """All sources, open. ``image_format`` is that of all but standard input, which is raw.

    :raise SourceError: when one cannot be opened; the others are closed then.
    """
    with contextlib.ExitStack() as stack:
        yield [_opened(disk, image_format, stack) for disk in disks]


def _opened(disk: DiskSource, image_format: str | None, stack: contextlib.ExitStack) -> DiskInput:
    from casbackup.block.source import open_source
    from casbackup.jobs.backup import DiskInput
    from casbackup.jobs.segments import DeviceSegments, StreamSegments

    if disk.spec == STDIN:
        stream = StandardInput(sys.stdin.fileno(), stack.enter_context(wakeup_on_signal()))
        return DiskInput(disk.name, StreamSegments(cast(BinaryIO, stream)), "stdin")
    device = stack.enter_context(open_source(disk.spec, format=image_format))
    source = disk.spec if "://" in disk.spec else os.path.abspath(disk.spec)
    return DiskInput(disk.name, DeviceSegments(device), source)


class StandardInput:
    """A pipe that can be given up while nothing comes through it. Has of a ``BinaryIO`` what
    ``StreamSegments`` uses.
    """

    def __init__(self, descriptor: int, wakeup: int) -> None:
        self._descriptor = descriptor
        self._wakeup = wakeup

    def readinto(self, buffer: memoryview) -> int:
        """:raise Interrupted: when a signal came."""
        ready, _, _ = select.select([self._descriptor, self._wakeup], [], [])
        if self._wakeup in ready:
            raise Interrupted("stopped by a signal")
        return os.readv(self._descriptor, [buffer])
