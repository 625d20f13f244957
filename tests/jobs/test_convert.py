"""Archive to archive: what goes through temporary files, and what does not."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from casbackup.errors import ArchiveDamaged, ArchiveIncomplete, ArchiveLimit
from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveFormat, ArchiveHead, Data, Event, Order, Zeros
from casbackup.formats.qcow2 import FORMAT as QCOW2
from casbackup.formats.raw import FORMAT as RAW
from casbackup.formats.stream import FORMAT as STREAM
from casbackup.formats.tar import FORMAT as TAR
from casbackup.formats.vma import FORMAT as VMA
from casbackup.jobs import convert as job
from casbackup.jobs.assembler import Assembler
from casbackup.testing.archives import MemoryTarget, mixed_bytes, read_archive

KiB = 1024
SIZES = (6 * 1024 * KiB + 512, 70_144)
CONTENTS = tuple(mixed_bytes(size) for size in SIZES)
HEAD = ArchiveHead(
    tuple(ArchiveDisk(f"drive-scsi{n}", size, n + 1) for n, size in enumerate(SIZES)),
    (ArchiveConfig("a.conf", b"a"),),
    bytes(16),
    77,
)


class Memory:
    def __init__(self, head: ArchiveHead, events: Sequence[Event]) -> None:
        self.head = head
        self._events = events

    def events(self) -> Iterator[Event]:
        yield from self._events


def shuffled(seed: int = 1) -> list[Event]:
    events: list[Event] = []
    for disk, data in enumerate(CONTENTS):
        for offset in range(0, len(data), 12 * KiB):
            part = data[offset : offset + 12 * KiB]
            events.append(Data(disk, offset, part) if part.strip(b"\0") else Zeros(disk, offset, len(part)))
    random.Random(seed).shuffle(events)
    return events


def converted(archive_format: ArchiveFormat, archive: Memory, spool: Path) -> bytes:
    assert archive_format.writer is not None
    writer = archive_format.writer()
    head, _ = job.adapted(archive.head, writer, 5)
    target = MemoryTarget(seekable=not writer.capabilities.streams)
    job.convert(archive, Order.ANY, head, writer, target, spool_folder=str(spool))
    return bytes(target.data)


@pytest.mark.parametrize("archive_format", [VMA, STREAM, TAR], ids=lambda f: f.name)
@pytest.mark.parametrize("pages", [1, 20, 2000])
def test_any_order(archive_format: ArchiveFormat, pages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With too little memory, too: parts of segments wait in a temporary file."""
    monkeypatch.setattr(job, "Assembler", partial(Assembler, budget_bytes=pages * 64 * KiB))
    data = converted(archive_format, Memory(HEAD, shuffled()), tmp_path)
    assert archive_format.reader is not None
    found = read_archive(archive_format.reader(), data)
    assert found.contents == CONTENTS
    assert found.head.configs == HEAD.configs
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("archive_format", [RAW, QCOW2], ids=lambda f: f.name)
def test_formats_of_one_disk(archive_format: ArchiveFormat, tmp_path: Path) -> None:
    head = ArchiveHead(HEAD.disks[:1], HEAD.configs)
    events = [event for event in shuffled() if event.disk == 0]
    data = converted(archive_format, Memory(head, events), tmp_path)
    assert archive_format.reader is not None
    assert read_archive(archive_format.reader(), data, seekable=True).contents == CONTENTS[:1]


@pytest.mark.parametrize("archive_format", [VMA, TAR], ids=lambda f: f.name)
def test_archives_that_are_not_whole(archive_format: ArchiveFormat, tmp_path: Path) -> None:
    with pytest.raises(ArchiveIncomplete):
        converted(archive_format, Memory(HEAD, shuffled()[1:]), tmp_path)
    with pytest.raises(ArchiveDamaged):
        converted(archive_format, Memory(HEAD, [*shuffled(), Zeros(0, 0, 512)]), tmp_path)


def test_what_a_format_cannot_hold() -> None:
    with pytest.raises(ArchiveLimit):
        job.adapted(HEAD, RAW.writer(), 5)
    head, left_out = job.adapted(ArchiveHead(HEAD.disks[:1], HEAD.configs), RAW.writer(), 5)
    assert (head.configs, left_out, head.time_s) == ((), ("a.conf",), 5)
    assert job.adapted(HEAD, VMA.writer(), 5) == (HEAD, ())
