"""Where a restore may write to, and what is left when it fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from casbackup.block.device import read_bytes
from casbackup.block.target import open_raw_target
from casbackup.errors import TargetExists, TargetTooSmall, TargetUnsuitable, TargetUnwritable
from casbackup.units import MiB


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [True, False])
def test_new_file(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "disk.raw"
    with open_raw_target(str(path), 1 * MiB + 3) as target:
        assert target.starts_zero and target.device.size_bytes == 1 * MiB + 3
        target.device.write(4096, b"x" * 4096)
        assert not path.exists()
        target.commit(sync=sync)
    assert names(tmp_path) == ["disk.raw"]
    assert path.read_bytes() == bytes(4096) + b"x" * 4096 + bytes(1 * MiB + 3 - 8192)
    assert os.stat(path).st_blocks * 512 < 64 * 1024
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_aborted_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_raw_target(str(tmp_path / "disk.raw"), 4096) as target:
        target.device.write(0, b"x")
        raise RuntimeError
    assert names(tmp_path) == []
    target.abort()
    with pytest.raises(ValueError, match="closed"):
        target.device.write(0, b"x")


def test_empty_disk(tmp_path: Path) -> None:
    with open_raw_target(str(tmp_path / "disk.raw"), 0) as target:
        target.commit()
    assert (tmp_path / "disk.raw").read_bytes() == b""


def test_existing_file_is_replaced_only_when_forced(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_text("precious")
    path.chmod(0o640)
    with pytest.raises(TargetExists, match=r"disk\.raw exists"):
        open_raw_target(str(path), 4096)
    with open_raw_target(str(path), 4096, force=True) as target:
        assert path.read_text() == "precious"
        target.commit()
    assert path.read_bytes() == bytes(4096)
    assert os.stat(path).st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["disk.raw"]


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "disk.raw").write_text("old")
    link = tmp_path / "disk.raw"
    link.symlink_to("real/disk.raw")
    with open_raw_target(str(link), 4096, force=True) as target:
        target.commit()
    assert link.is_symlink() and link.read_bytes() == bytes(4096)


def test_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with open_raw_target(str(path), 4096) as target:
        path.write_text("precious")
        with pytest.raises(TargetExists, match="has appeared meanwhile"):
            target.commit()
    assert path.read_text() == "precious" and names(tmp_path) == ["disk.raw"]


def test_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    path = tmp_path / "disk.raw"
    with open_raw_target(str(path), 4096) as target:
        target.commit()
    assert names(tmp_path) == ["disk.raw"]
    with open_raw_target(str(tmp_path / "other.raw"), 4096) as target:
        (tmp_path / "other.raw").write_text("precious")
        with pytest.raises(TargetExists):
            target.commit()


@pytest.mark.parametrize("size", [4096, 100, 8192])
def test_in_place(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"a" * 4096)
    inode = os.stat(path).st_ino
    with open_raw_target(str(path), size, in_place=True) as target:
        assert not target.starts_zero and target.device.size_bytes == size
        assert read_bytes(target.device, 0, size) == (b"a" * 4096).ljust(size, b"\0")[:size]
        target.device.write(0, b"b")
        target.commit()
    assert os.stat(path).st_ino == inode
    assert path.read_bytes() == b"b" + (b"a" * 4095).ljust(size - 1, b"\0")[: size - 1]


def test_in_place_where_nothing_is_makes_a_new_file(tmp_path: Path) -> None:
    with open_raw_target(str(tmp_path / "disk.raw"), 4096, in_place=True) as target:
        assert target.starts_zero
        target.commit()
    assert names(tmp_path) == ["disk.raw"]


def test_what_is_no_place_for_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, text in (
        (tmp_path, "is a folder"),
        (tmp_path / "fifo", "neither a file nor a block device"),
        (Path("/dev/null"), "neither a file nor a block device"),
        (tmp_path / "missing" / "disk.raw", "does not exist"),
    ):
        with pytest.raises(TargetUnsuitable, match=text):
            open_raw_target(str(path), 4096, force=True)
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(TargetUnwritable, match="Permission denied"):
        open_raw_target(str(tmp_path / "disk.raw"), 4096)


def test_full_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    with monkeypatch.context() as patched:
        patched.setattr(os, "truncate", failing(errno.ENOSPC))
        with pytest.raises(TargetUnwritable, match="No space left"):
            open_raw_target(str(path), 4096)
    with open_raw_target(str(path), 4096) as target:
        monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(TargetUnwritable, match=r"disk\.raw: writing at byte 0 failed: No space left"):
            target.device.write(0, b"x")
    assert names(tmp_path) == []


def test_failed_flush_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_raw_target(str(tmp_path / "disk.raw"), 4096) as target:
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(TargetUnwritable, match="Input/output error"):
            target.commit()
    assert names(tmp_path) == []


@pytest.mark.root
def test_block_device(loop_device: Callable[[int], str]) -> None:
    path = loop_device(4 * MiB)
    with pytest.raises(TargetTooSmall, match="has 4194304 bytes, the disk 4194305"):
        open_raw_target(path, 4 * MiB + 1, force=True)
    with open_raw_target(path, 1 * MiB) as target:
        assert not target.starts_zero
        target.device.write(0, b"x" * MiB)
        with pytest.raises(ValueError, match="not within"):
            target.device.write(1 * MiB, b"x")
        target.commit()
    with open(path, "rb") as file:
        assert file.read() == b"x" * MiB + bytes(3 * MiB)


@pytest.mark.root
def test_block_device_in_use_is_refused(loop_device: Callable[[int], str], tmp_path: Path) -> None:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    path = loop_device(4 * MiB)
    subprocess.run(["mkfs.ext4", "-q", path], check=True)
    folder = tmp_path / "mounted here"
    folder.mkdir()
    if subprocess.run(["mount", path, str(folder)]).returncode != 0:
        pytest.skip("no right to mount")
    try:
        with pytest.raises(TargetUnsuitable, match=r"is mounted at .*/mounted here"):
            open_raw_target(path, 1 * MiB)
        with open_raw_target(path, 1 * MiB, force=True) as target:
            assert len(read_bytes(target.device, 0, 4096)) == 4096
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
def test_block_device_that_the_system_holds_is_refused(loop_device: Callable[[int], str]) -> None:
    """Not mounted where we can see it: here, held by another exclusive user."""
    path = loop_device(1 * MiB)
    holder = os.open(path, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(TargetUnsuitable, match="in use by the system"):
            open_raw_target(path, 4096)
    finally:
        os.close(holder)
    open_raw_target(path, 4096).abort()


def failing(code: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail
