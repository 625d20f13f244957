"""Raw images: holes found and made, and what a pipe cannot tell."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from casbackup.errors import ArchiveLimit, ArchiveUnsupported, SourceChanged
from casbackup.formats.port import ArchiveDisk, ArchiveHead, Data, Zeros
from casbackup.formats.raw import FORMAT, RawReader, RawWriter
from casbackup.formats.source import archive_source
from casbackup.formats.target import archive_target
from casbackup.testing.archives import (
    ArchiveConformance,
    MemorySource,
    MemoryTarget,
    mixed_bytes,
    random_bytes,
    read_archive,
    sample,
    write_archive,
)
from casbackup.units import GiB, KiB, MiB

SUITE = ArchiveConformance(FORMAT, keeps_names=False, keeps_identity=False, detects_truncation=False)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in SUITE.checks()])
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_the_bytes_are_those_of_the_disk() -> None:
    content = sample([3 * MiB + 512], fill=mixed_bytes)
    for seekable in (False, True):
        assert write_archive(RawWriter(), content, seekable=seekable) == content.contents[0]


def test_a_pipe_does_not_tell_the_size() -> None:
    with pytest.raises(ArchiveUnsupported, match="casbackup backup -"):
        RawReader().open(MemorySource(b"x" * 512, seekable=False))


def test_holes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "vm-100.raw"
    with open(path, "wb") as file:
        file.truncate(64 * GiB)
        file.seek(32 * GiB)
        file.write(random_bytes(1 * MiB))
    with archive_source(str(path)) as source:
        archive = RawReader().open(source)
        assert archive.head.disks == (ArchiveDisk("vm-100", 64 * GiB),)
        events = [(type(e), e.offset, len(e.data) if isinstance(e, Data) else e.length) for e in archive.events()]
    assert events[0] == (Zeros, 0, 32 * GiB)
    assert events[-1] == (Zeros, 32 * GiB + 1 * MiB, 32 * GiB - 1 * MiB)
    assert sum(length for _, _, length in events) == 64 * GiB


def test_zeros_become_holes(tmp_path: Path) -> None:
    path = tmp_path / "out.raw"
    data = random_bytes(64 * KiB) + bytes(1 * MiB) + random_bytes(4 * KiB)
    with archive_target(str(path)) as target:
        output = RawWriter().open(target, ArchiveHead((ArchiveDisk("d", 8 * GiB),)))
        output.write(0, 0, data)
        output.zeros(0, len(data), 8 * GiB - len(data))
        output.finish()
    status = os.stat(path)
    assert status.st_size == 8 * GiB
    assert status.st_blocks * 512 < 256 * KiB
    with open(path, "rb") as file:
        assert file.read(len(data)) == data


def test_an_image_that_becomes_shorter() -> None:
    class Shrinking(MemorySource):
        @property
        def size_bytes(self) -> int:
            return 2 * MiB

    archive = RawReader().open(Shrinking(random_bytes(1 * MiB + 5)))
    with pytest.raises(SourceChanged):
        list(archive.events())


@pytest.mark.parametrize(
    "disks",
    [(), (ArchiveDisk("a", 1), ArchiveDisk("b", 1)), (ArchiveDisk("state", 1, is_vmstate=True),)],
    ids=["none", "two", "vmstate"],
)
def test_what_it_cannot_hold(disks: tuple[ArchiveDisk, ...]) -> None:
    with pytest.raises(ArchiveLimit):
        RawWriter().check(ArchiveHead(disks))


def test_data_out_of_order_is_refused() -> None:
    output = RawWriter().open(MemoryTarget(), ArchiveHead((ArchiveDisk("d", 4 * KiB),)))
    with pytest.raises(ValueError, match="do not follow"):
        output.write(0, 512, b"x" * 512)


def test_an_empty_disk() -> None:
    assert read_archive(RawReader(), b"").contents == (b"",)
