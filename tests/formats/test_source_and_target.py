"""Files and pipes that archives come from and go to."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import zstandard

from casbackup.errors import (
    ArchiveDamaged,
    CasbackupError,
    SourceNotFound,
    SourceUnreadable,
    TargetClosed,
    TargetExists,
    TargetFull,
    TargetUnsuitable,
    ToolMissing,
    UsageError,
)
from casbackup.formats.bytesource import DescriptorSource, beginning
from casbackup.formats.decompress import decompressed
from casbackup.formats.port import ByteRange, ByteSource
from casbackup.formats.source import archive_source
from casbackup.formats.target import archive_target, written

MiB = 1024 * 1024
DATA = random.Random(1).randbytes(3 * MiB) + bytes(MiB) + b"end"

needs_lzop = pytest.mark.skipif(shutil.which("lzop") is None, reason="lzop is not installed")


def everything(source: ByteSource, piece: int = 100_000) -> bytes:
    found = bytearray()
    buffer = memoryview(bytearray(piece))
    while got := source.read_into(buffer):
        found += buffer[:got]
        assert source.tell() == len(found)
    return bytes(found)


def zstd_frames(data: bytes) -> bytes:
    half = len(data) // 2
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    parts = [zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in (data[:half], data[half:])]
    return parts[0] + skippable + parts[1]


COMPRESSED = {
    "plain": lambda data: data,
    "gzip": lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
    "zstd": zstd_frames,
    "bzip2": lambda data: bz2.compress(data[:1000]) + bz2.compress(data[1000:]),
    "xz": lzma.compress,
}


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("piped", [False, True])
def test_compressed_sources(kind: str, piped: bool, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(COMPRESSED[kind](DATA))
    with opened(path, piped) as source:
        first, source = beginning(source)
        assert first == DATA[: len(first)]
        assert source.seekable == (kind == "plain" and not piped)
        assert everything(source) == DATA


@needs_lzop
@pytest.mark.parametrize("piped", [False, True])
def test_lzop(piped: bool, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(subprocess.run(["lzop", "-c"], input=DATA, capture_output=True, check=True).stdout)
    with opened(path, piped) as source:
        assert everything(source) == DATA
    path.write_bytes(path.read_bytes()[:-100])
    with opened(path, piped) as source, pytest.raises(ArchiveDamaged, match="lzop"):
        everything(source)


def test_without_lzop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "archive").write_bytes(b"\x89LZO\0\r\n\x1a\n")
    with pytest.raises(ToolMissing, match="lzop is not installed"), archive_source(str(tmp_path / "archive")):
        pass
    with pytest.raises(ToolMissing), archive_target(str(tmp_path / "new"), compression="lzop"):
        pass
    assert os.listdir(tmp_path) == ["archive"]


class opened:
    """A file as a source, directly or through a pipe."""

    def __init__(self, path: Path, piped: bool) -> None:
        self._path = path
        self._piped = piped

    def __enter__(self) -> ByteSource:
        if self._piped:
            ours, theirs = os.pipe()
            self._thread = threading.Thread(target=self._pump, args=(theirs,))
            self._thread.start()
            self._descriptor = ours
            self._context = decompressed(DescriptorSource(ours, "pipe"))
        else:
            self._context = archive_source(str(self._path))
        return self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)
        if self._piped:
            os.close(self._descriptor)
            self._thread.join()

    def _pump(self, descriptor: int) -> None:
        with open(descriptor, "wb") as pipe:
            try:
                pipe.write(self._path.read_bytes())
                pipe.flush()
            except BrokenPipeError:
                pass


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bzip2", "xz"])
def test_damaged_compression(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    data = bytearray(COMPRESSED[kind](DATA))
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with archive_source(str(path)) as source, pytest.raises(ArchiveDamaged, match="cannot be decompressed"):
        everything(source)


def test_holes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(8 * MiB)
        os.pwrite(file.fileno(), b"x" * 65536, 4 * MiB)
    with archive_source(str(path)) as source:
        assert isinstance(source, DescriptorSource)
        assert source.next_data(0) == ByteRange(4 * MiB, 65536)
        assert source.next_data(5 * MiB) is None
        assert source.tell() == 0
        source.seek(4 * MiB - 1)
        buffer = memoryview(bytearray(2))
        assert (source.read_into(buffer), bytes(buffer), source.size_bytes) == (2, b"\0x", 8 * MiB)


def test_sources_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound), archive_source(str(tmp_path / "nothing")):
        pass
    with pytest.raises(SourceUnreadable, match="folder"), archive_source(str(tmp_path)):
        pass


@pytest.mark.parametrize("compression", ["none", "zstd", "gzip", pytest.param("lzop", marks=needs_lzop)])
def test_what_is_written_is_read_back(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    with archive_target(str(path), compression=compression) as target:
        assert target.seekable == (compression == "none")
        for start in range(0, len(DATA), 300_000):
            target.write([DATA[start : start + 1000], memoryview(DATA)[start + 1000 : start + 300_000]])
        assert target.tell() == len(DATA)
        assert not path.exists()
    with archive_source(str(path)) as source:
        assert everything(source) == DATA


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_the_same_input_gives_the_same_bytes(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    found = set[bytes]()
    for _ in range(2):
        with archive_target(str(path), compression=compression, force=True) as target:
            for start in range(0, len(DATA), 300_000):
                target.write([memoryview(DATA)[start : start + 300_000]])
        found.add(path.read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("compression", ["none", "zstd", "gzip", pytest.param("lzop", marks=needs_lzop)])
def test_nothing_is_left_after_a_failure(compression: str, tmp_path: Path) -> None:
    with pytest.raises(KeyError), archive_target(str(tmp_path / "archive"), compression=compression) as target:
        target.write([DATA])
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_the_head_comes_at_once(compression: str, tmp_path: Path) -> None:
    """Whoever waits for the head of a stream gives up after a while."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(TargetClosed), archive_target(fifo, compression=compression) as target:
        os.set_blocking(reader, True)
        target.write([DATA[:4000]])
        with decompressed(DescriptorSource(reader, "fifo")) as plain:
            buffer = memoryview(bytearray(4000))
            assert plain.read_into(buffer) == 4000
            assert bytes(buffer) == DATA[:4000]
        os.close(reader)
        for _ in range(100):
            target.write([random.Random(2).randbytes(MiB)])
        raise AssertionError("nobody noticed")


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(b"precious")
    with pytest.raises(TargetExists), archive_target(str(path)):
        pass
    with pytest.raises(KeyError), archive_target(str(path), force=True) as target:
        target.write([b"new"])
        raise KeyError
    assert path.read_bytes() == b"precious"


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(TargetUnsuitable), archive_target(str(tmp_path)):
        pass
    with pytest.raises(TargetUnsuitable), archive_target(str(tmp_path / "no" / "folder")):
        pass
    with pytest.raises(UsageError), archive_target(str(tmp_path / "x"), compression="rar"):
        pass


def test_system_errors_become_ours() -> None:
    def raised(number: int) -> CasbackupError:
        with pytest.raises(CasbackupError) as caught, written("x"):
            raise OSError(number, os.strerror(number))
        return caught.value

    assert isinstance(raised(errno.ENOSPC), TargetFull)
    assert isinstance(raised(errno.EDQUOT), TargetFull)
    assert isinstance(raised(errno.EPIPE), TargetClosed)
    assert raised(errno.EIO).code == "target-unwritable"


def test_a_full_disk() -> None:
    with pytest.raises(TargetFull), archive_target("/dev/full") as target:
        target.write([DATA])
