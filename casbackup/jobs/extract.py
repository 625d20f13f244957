"""The disks and configs of an archive as files in a folder, without a repository.

Names are made safe (``formats.names``), so nothing leaves the folder whatever the archive says. Files are sparse, and
get their names when everything is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from casbackup.block.pending import PendingFile, translated
from casbackup.block.target import Target, open_raw_target
from casbackup.errors import ArchiveDamaged, TargetUnsuitable, UsageError
from casbackup.formats.coverage import ArchiveCoverage
from casbackup.formats.names import file_names
from casbackup.formats.port import Archive, ArchiveConfig, ArchiveHead, Data, Event
from casbackup.formats.zeroruns import runs
from casbackup.progress import NoProgress, Progress
from casbackup.spec.manifest import MissingRange
from casbackup.units import KiB

_HOLE_BYTES = 64 * KiB


@dataclass(frozen=True, slots=True)
class ExtractedDisk:
    """``number``: its place in the archive's head."""

    number: int
    path: str


@dataclass(slots=True)
class ExtractReport:
    """What was written. ``missing`` is only ever filled, and ``damage`` set, if ``allow_incomplete``."""

    disks: list[ExtractedDisk]
    configs: list[str]
    missing: list[MissingRange] = field(default_factory=list)
    damage: ArchiveDamaged | None = None


def extract(
    archive: Archive,
    folder: str,
    *,
    only: Sequence[str] = (),
    force: bool = False,
    allow_incomplete: bool = False,
    sync: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write ``DISK.raw`` for each disk, and the configs. ``only``: these disks, by our names or the archive's, and
    no configs. ``allow_incomplete``: what is missing reads as zeros. ``sync``: return when all has reached the disk.

    After an error no new file is left.

    :raise UsageError: for a disk that the archive does not have.
    :raise ArchiveDamaged: / :raise ArchiveIncomplete: when the archive is not what it should be.
    :raise TargetError: when a file exists, without ``force``, or cannot be written.
    """
    head, progress = archive.head, progress or NoProgress()
    disk_files, config_files = file_names(head)
    chosen = chosen_disks(head, disk_files, only)
    with ExitStack() as stack:
        _make_folder(folder)
        targets = {
            number: stack.enter_context(
                open_raw_target(os.path.join(folder, disk_files[number]), head.disks[number].size_bytes, force=force)
            )
            for number in chosen
        }
        configs = [] if only else list(zip(config_files, head.configs, strict=True))
        pending = [_pending(os.path.join(folder, name), config, force, sync, stack) for name, config in configs]
        report = ExtractReport(
            [ExtractedDisk(number, os.path.join(folder, disk_files[number])) for number in chosen],
            [os.path.join(folder, name) for name, _ in configs],
        )
        progress.start(folder, sum(disk.size_bytes for disk in head.disks))
        _fill(archive, targets, allow_incomplete, report, progress)
        for target in targets.values():
            target.commit(sync=sync)
        for file in pending:
            file.publish(sync=sync)
    progress.finish()
    return report


def chosen_disks(head: ArchiveHead, disk_files: Sequence[str], only: Sequence[str]) -> list[int]:
    """:raise UsageError: for a name that no disk has."""
    known: dict[str, int] = {}
    for number, (disk, file) in enumerate(zip(head.disks, disk_files, strict=True)):
        known.setdefault(os.path.splitext(file)[0], number)
        known.setdefault(disk.name, number)
    for name in only:
        if name not in known:
            names = ", ".join(os.path.splitext(file)[0] for file in disk_files) or "none"
            raise UsageError(f"the archive has no disk {name}; it has: {names}")
    return sorted({known[name] for name in only}) if only else list(range(len(head.disks)))


def _fill(
    archive: Archive, targets: dict[int, Target], allow_incomplete: bool, report: ExtractReport, progress: Progress
) -> None:
    coverage = ArchiveCoverage(archive.head)
    for event in _readable(coverage.passing(archive.events()), allow_incomplete, report):
        if isinstance(event, Data):
            if (target := targets.get(event.disk)) is not None:
                _write(target, event.offset, memoryview(event.data))
            progress.advance(done=len(event.data))
        else:
            progress.advance(done=event.length, zero=event.length)
    if allow_incomplete:
        missing = (MissingRange(disk, gap.offset, gap.length) for disk, gap in coverage.missing())
        report.missing = [gap for gap in missing if gap.disk in targets]
    else:
        coverage.require_complete()


def _readable(events: Iterable[Event], allow_incomplete: bool, report: ExtractReport) -> Iterator[Event]:
    try:
        yield from events
    except ArchiveDamaged as error:
        if not allow_incomplete:
            raise
        report.damage = error


def _write(target: Target, offset: int, data: memoryview) -> None:
    for run in runs(data, _HOLE_BYTES):
        if not run.is_zero:
            target.device.write(offset + run.start, data[run.start : run.end])


def _pending(path: str, config: ArchiveConfig, force: bool, sync: bool, stack: ExitStack) -> PendingFile:
    pending = PendingFile(path, replace=force)
    stack.callback(pending.discard)
    with translated(path), open(pending.temporary, "wb") as file:
        file.write(config.content)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    return pending


def _make_folder(path: str) -> None:
    with translated(path):
        try:
            os.makedirs(path, exist_ok=True)
        except FileExistsError as error:
            raise TargetUnsuitable(f"{path} is a file, not a folder") from error
