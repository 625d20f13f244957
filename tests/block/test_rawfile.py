"""Raw files: holes, sizes that change, and what the system may answer."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from casbackup.block.device import Extent, read_bytes
from casbackup.block.rawfile import RawFile
from casbackup.errors import SourceChanged, SourceNotFound, SourceUnreadable, TargetUnwritable
from casbackup.units import GiB, KiB, MiB


def test_holes_are_found(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        for offset in (1 * MiB, 3 * MiB):
            file.seek(offset)
            file.write(b"x" * 64 * KiB)
        file.truncate(8 * MiB + 5)
    with RawFile.open(str(path)) as device:
        assert list(device.extents(0, device.size_bytes)) == [
            Extent(0, 1 * MiB, True),
            Extent(1 * MiB, 64 * KiB, False),
            Extent(1 * MiB + 64 * KiB, 2 * MiB - 64 * KiB, True),
            Extent(3 * MiB, 64 * KiB, False),
            Extent(3 * MiB + 64 * KiB, 5 * MiB - 64 * KiB + 5, True),
        ]
        assert list(device.extents(1 * MiB + 3, 10)) == [Extent(1 * MiB + 3, 10, False)]
        assert list(device.extents(8 * MiB, 5)) == [Extent(8 * MiB, 5, True)]


def test_a_huge_sparse_file_is_one_hole(tmp_path: Path) -> None:
    path = sized(tmp_path, 1024 * GiB)
    with RawFile.open(path) as device:
        assert list(device.extents(0, 1024 * GiB)) == [Extent(0, 1024 * GiB, True)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_without_seek_data_everything_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    lseek = os.lseek

    def refuse(descriptor: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(code, "not here")
        return lseek(descriptor, offset, whence)

    with RawFile.open(sized(tmp_path, 1 * MiB)) as device:
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(device.extents(4096, 8192)) == [Extent(4096, 8192, False)]


def test_shrinking_is_noticed(tmp_path: Path) -> None:
    path = sized(tmp_path, 1 * MiB)
    with RawFile.open(path) as device:
        os.truncate(path, 512 * KiB)
        assert device.changed_size() == 512 * KiB
        assert read_bytes(device, 0, 512 * KiB) == bytes(512 * KiB)
        for offset in (512 * KiB - 10, 512 * KiB, 1 * MiB - 1):
            with pytest.raises(SourceChanged, match="shrank while it was read, from 1048576 to 524288 bytes"):
                read_bytes(device, offset, 11 if offset < 1 * MiB - 1 else 1)


def test_the_end_of_a_file_that_shrank_is_no_hole(tmp_path: Path) -> None:
    path = sized(tmp_path, 1 * MiB)
    with RawFile.open(path) as device:
        os.truncate(path, 512 * KiB)
        with pytest.raises(SourceChanged):
            list(device.extents(0, 1 * MiB))
        with pytest.raises(SourceChanged):
            list(device.extents(768 * KiB, 4096))


def test_growing_is_noticed_at_the_end(tmp_path: Path) -> None:
    path = sized(tmp_path, 1 * MiB)
    with RawFile.open(path) as device:
        assert device.changed_size() is None
        os.truncate(path, 2 * MiB)
        assert device.size_bytes == 1 * MiB
        assert list(device.extents(0, 1 * MiB)) == [Extent(0, 1 * MiB, True)]
        assert read_bytes(device, 0, 1 * MiB) == bytes(1 * MiB)
        assert device.changed_size() == 2 * MiB


def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceNotFound, match="does not exist"):
        RawFile.open(str(tmp_path / "missing"))
    with pytest.raises(SourceNotFound):
        RawFile.open(str(Path(sized(tmp_path, 1)) / "below-a-file"))
    with pytest.raises(SourceUnreadable, match="is a folder"):
        RawFile.open(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceUnreadable, match="neither a file nor a block device"):
        RawFile.open(str(tmp_path / "fifo"))
    with pytest.raises(SourceUnreadable, match="neither a file nor a block device"):
        RawFile.open("/dev/null")
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(SourceUnreadable, match="Permission denied"):
        RawFile.open(str(tmp_path / "secret"))


def test_input_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawFile.open(sized(tmp_path, 1 * MiB)) as device:
        monkeypatch.setattr(os, "preadv", failing(errno.EIO))
        with pytest.raises(SourceUnreadable, match="reading at byte 4096 failed: Input/output error"):
            read_bytes(device, 4096, 10)


def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:1000]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:700], offset))
    data = random.Random(1).randbytes(10_000)
    with RawFile.open(sized(tmp_path, 20_000), writable=True) as device:
        device.write(5_000, data)
        assert read_bytes(device, 5_000, 10_000) == data


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_output_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with RawFile.open(sized(tmp_path, 1 * MiB), writable=True) as device:
        monkeypatch.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(TargetUnwritable, match="No space left on device"):
            device.write(0, b"x")
            device.flush()


@pytest.mark.root
def test_a_full_file_system(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]).returncode != 0:
        pytest.skip("no right to mount")
    try:
        with RawFile.open(sized(tmp_path, 4 * MiB), writable=True) as device:
            with pytest.raises(TargetUnwritable, match="No space left on device"):
                device.write(0, bytes(2 * MiB))
            device.write_zeros(0, 4 * MiB)
            device.write(3 * MiB, b"x" * 512 * KiB)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_zeros_give_space_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(4 * MiB))
    with RawFile.open(str(path), writable=True) as device:
        device.write_zeros(1 * MiB, 2 * MiB)
        assert os.stat(path).st_blocks * 512 < 3 * MiB
        device.write_zeros(0, 4 * MiB, may_trim=False)
        assert os.stat(path).st_blocks * 512 >= 4 * MiB
        assert not any(read_bytes(device, 0, 4 * MiB))
        device.write(0, b"x" * MiB)
        device.discard(0, 4 * MiB)
        assert os.stat(path).st_blocks * 512 < 1 * MiB


def test_zeros_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * (3 * MiB + 17))
    monkeypatch.setattr("casbackup.block._linux._libc_fallocate", lambda: refusing)
    with RawFile.open(str(path), writable=True) as device:
        device.write_zeros(5, 3 * MiB)
        device.discard(0, 5)
    assert path.read_bytes() == b"x" * 5 + bytes(3 * MiB) + b"x" * 12


@pytest.mark.root
def test_block_device(loop_device: Callable[[int], str]) -> None:
    path = loop_device(4 * MiB)
    with RawFile.open(path, writable=True) as device:
        assert device.size_bytes == 4 * MiB
        device.write(0, b"x" * 4 * MiB)
        for may_trim in (True, False):
            device.write_zeros(512, 1 * MiB, may_trim=may_trim)
            device.write_zeros(3 * MiB + 1, 3)  # not of whole sectors
        device.flush()
        expected = b"x" * 512 + bytes(1 * MiB) + b"x" * (2 * MiB - 511) + bytes(3)
        assert read_bytes(device, 0, len(expected)) == expected
        assert list(device.extents(0, 4 * MiB)) == [Extent(0, 4 * MiB, False)]
        assert device.changed_size() is None
    with RawFile.open(path) as device:
        assert read_bytes(device, 0, len(expected)) == expected


def test_descriptors_are_closed_and_not_inherited(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with RawFile.open(sized(tmp_path, 1)) as device:
        assert not os.get_inheritable(device._descriptor)
    for path in (str(tmp_path), "/dev/null"):
        with pytest.raises(SourceUnreadable):
            RawFile.open(path)
    assert os.listdir("/proc/self/fd") == before


def sized(folder: Path, size_bytes: int) -> str:
    path = folder / "sized.raw"
    path.touch()
    os.truncate(path, size_bytes)
    return str(path)


def failing(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def refusing(*_: object) -> int:
    import ctypes

    ctypes.set_errno(errno.EOPNOTSUPP)
    return -1
