"""casbackup's own stream: conformance, and what a hostile other side may send."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.errors import ArchiveDamaged, ArchiveError, ArchiveLimit, ToolFailed
from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveHead
from casbackup.formats.stream import FORMAT
from casbackup.formats.stream.reader import StreamReader
from casbackup.formats.stream.writer import StreamWriter, report_error
from casbackup.spec.archiver import FRAME, MAGIC, MAX_DISKS, FrameType
from casbackup.testing.archives import (
    ArchiveConformance,
    MemoryTarget,
    Sample,
    mixed_bytes,
    read_archive,
    write_archive,
)

CONTENT = Sample(
    ArchiveHead(
        (ArchiveDisk("drive-scsi0", 200_000, 1), ArchiveDisk("vmstate", 5000, None, True)),
        (ArchiveConfig("a.conf", b"\0\xff"),),
        bytes(range(16)),
        -5,
    ),
    (mixed_bytes(200_000), mixed_bytes(5000)),
)


@pytest.mark.parametrize(("name", "check"), list(ArchiveConformance(FORMAT).checks()))
def test_conformance(name: str, check: Callable[[], None]) -> None:
    check()


def stream(*frames: bytes, head: object = None) -> bytes:
    content = json.dumps(head or {"disks": [{"name": "d", "size_bytes": 8}]}).encode()
    return MAGIC + FRAME.pack(FrameType.HEAD, 0, 0, len(content)) + content + b"".join(frames)


END = FRAME.pack(FrameType.END, 0, 0, 0)
ZEROS = FRAME.pack(FrameType.ZEROS, 0, 0, 8)


def test_names_that_are_not_text_survive() -> None:
    head = replace(CONTENT.head, disks=(ArchiveDisk("\udcff/..", 1, 2**31),))
    found = read_archive(StreamReader(), write_archive(StreamWriter(), Sample(head, (b"x",))))
    assert found.head == head


def test_a_minimal_stream_of_another_program() -> None:
    found = read_archive(
        StreamReader(),
        stream(FRAME.pack(FrameType.DATA, 0, 2, 3) + b"abc", FRAME.pack(3, 0, 0, 2), FRAME.pack(3, 0, 5, 3), END),
    )
    assert found.contents == (b"\0\0abc\0\0\0",)
    assert found.head == ArchiveHead((ArchiveDisk("d", 8),))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        b"x" * 100,
        stream(),
        stream(ZEROS),
        stream(ZEROS, END[:-1]),
        stream(FRAME.pack(FrameType.ZEROS, 1, 0, 8), END),
        stream(FRAME.pack(FrameType.ZEROS, 0, 1, 8), END),
        stream(FRAME.pack(FrameType.ZEROS, 0, 2**64 - 1, 2**64 - 1), END),
        stream(FRAME.pack(FrameType.DATA, 0, 0, 2**40), END),
        stream(FRAME.pack(FrameType.DATA, 0, 0, 8) + b"short"),
        stream(FRAME.pack(9, 0, 0, 0), END),
        stream(ZEROS, ZEROS, END),
        stream(FRAME.pack(FrameType.HEAD, 0, 0, 0), ZEROS, END),
        MAGIC + FRAME.pack(FrameType.HEAD, 0, 0, 2**40),
        MAGIC + FRAME.pack(FrameType.HEAD, 0, 0, 2) + b"[]",
        MAGIC + FRAME.pack(FrameType.HEAD, 0, 0, 9) + b"[" * 9,
        stream(END, head={"disks": [{"name": 1, "size_bytes": 8}]}),
        stream(END, head={"disks": [{"name": "d", "size_bytes": -1}]}),
        stream(END, head={"disks": [{"name": "d", "size_bytes": 2**80}]}),
        stream(END, head={"disks": [{"name": "d", "size_bytes": True}]}),
        stream(END, head={"disks": [], "uuid": "00"}),
        stream(END, head={"disks": [], "configs": [{"name": "a", "content": "?"}]}),
    ],
)  # fmt: skip
def test_nonsense_is_damage(data: bytes) -> None:
    with pytest.raises(ArchiveDamaged):
        read_archive(StreamReader(), data)


def test_what_never_came_is_missing() -> None:
    with pytest.raises(ArchiveError):
        read_archive(StreamReader(), stream(END))


def test_an_error_of_the_other_side() -> None:
    target = MemoryTarget(seekable=False)
    report_error(target, "tape full")
    for data in (stream(ZEROS, bytes(target.data)), MAGIC + bytes(target.data)):
        with pytest.raises(ToolFailed, match="tape full"):
            read_archive(StreamReader(), data)


def test_limits() -> None:
    disk = ArchiveDisk("d", 1)
    for head in (
        ArchiveHead((disk,) * (MAX_DISKS + 1)),
        ArchiveHead((replace(disk, size_bytes=2**60),)),
        ArchiveHead((disk,), (ArchiveConfig("big", bytes(50 * 2**20)),)),
    ):
        with pytest.raises(ArchiveLimit):
            StreamWriter().check(head)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_garbled_streams_end_in_an_error_or_not_at_all(seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(write_archive(StreamWriter(), CONTENT))
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    del data[chance.choice((len(data), chance.randrange(len(data)))) :]
    try:
        read_archive(StreamReader(), bytes(data))
    except (ArchiveError, ToolFailed):
        return
