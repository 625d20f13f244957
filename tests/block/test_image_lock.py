"""QEMU's locks: who holds one keeps QEMU and others from writing, and is kept from what they use."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from casbackup.block.image_lock import ImageLock
from casbackup.errors import DiskInUse, SourceNotFound, SourceUnreadable

KiB = 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(64 * KiB))
    return path


def test_only_one_holds_it(image: Path) -> None:
    with ImageLock(str(image)), pytest.raises(DiskInUse, match="is in use"):
        ImageLock(str(image))
    ImageLock(str(image)).close()


def test_closing_twice_is_harmless(image: Path) -> None:
    lock = ImageLock(str(image))
    lock.close()
    lock.close()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        ImageLock(str(tmp_path / "missing"))
    with pytest.raises(SourceUnreadable):
        ImageLock(str(tmp_path))


@pytest.mark.qemu
def test_qemu_heeds_it_and_is_heeded(image: Path) -> None:
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed")
    write = ["qemu-io", "-f", "raw", "-c", "write 0 4k"]
    with ImageLock(str(image)):
        refused = subprocess.run([*write, str(image)], capture_output=True, text=True)
        assert refused.returncode and 'Failed to get "write" lock' in refused.stderr
    assert subprocess.run([*write, str(image)], capture_output=True).returncode == 0
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write(b"write 0 4k\n")
        while b"ops" not in os.read(holder.stdout.fileno(), 4096):
            pass
        with pytest.raises(DiskInUse, match="is in use"):
            ImageLock(str(image))
        holder.stdin.close()
        holder.wait(20)
    ImageLock(str(image)).close()
