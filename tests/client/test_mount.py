"""Snapshots mounted as folders of files, as programs see them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casbackup.clock import parse_time

from .conftest import Casbackup, MiB
from .serving import ended

Start = Callable[..., subprocess.Popen[bytes]]
Mount = Callable[..., subprocess.Popen[bytes]]
LATEST = "2026-11-05T20:00:00.000Z"


@pytest.fixture
def folder(bare: Casbackup) -> Path:
    path = bare.folder / "mounted"
    path.mkdir()
    return path


@pytest.fixture
def mount(start: Start, folder: Path) -> Iterator[Mount]:
    """Starts ``mount ARGUMENTS`` on ``folder``, and waits until it is mounted."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse is not there, or may not be used")
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    pytest.importorskip("mfusepy")
    processes: list[subprocess.Popen[bytes]] = []

    def run(*arguments: object) -> subprocess.Popen[bytes]:
        process = start("mount", *arguments, folder)
        processes.append(process)
        deadline = time.monotonic() + 30
        while not os.path.ismount(folder):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield run
    for process in processes:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture
def with_config(cb: Casbackup) -> bytes:
    """vm/100 with a disk of data, a hole and data, and a config; the content of the disk."""
    content = cb.disk(data_mib=3, size_mib=40).read_bytes() + b"end"
    (cb.folder / "vm.raw").write_bytes(content)
    (cb.folder / "100.conf").write_text("cores: 2\n")
    cb.ok("backup", "vm/100", f"scsi0={cb.folder / 'vm.raw'}", "--config", cb.folder / "100.conf", "-q")
    return content


def test_the_files_of_a_snapshot(cb: Casbackup, with_config: bytes, folder: Path, mount: Mount) -> None:
    process = mount("vm/100@latest")
    disk = folder / "scsi0.raw"
    assert sorted(os.listdir(folder)) == ["100.conf", "scsi0.raw"]
    assert subprocess.run(["cmp", disk, cb.folder / "vm.raw"]).returncode == 0
    assert (folder / "100.conf").read_text() == "cores: 2\n"
    status = disk.stat()
    assert (status.st_size, status.st_mode & 0o777, status.st_uid) == (len(with_config), 0o400, os.getuid())
    taken = cb.json("show", "vm/100")["snapshot"]["time"]
    assert status.st_mtime_ns == parse_time(taken) * 1_000_000
    assert ended(process) == (0, "", "")
    assert not os.path.ismount(folder) and os.listdir(folder) == []


def test_any_part_and_the_holes(with_config: bytes, folder: Path, mount: Mount) -> None:
    mount("vm/100@latest")
    size = len(with_config)
    with open(folder / "scsi0.raw", "rb", buffering=0) as file:
        for offset, length in ((0, 1), (3 * MiB - 5, 10), (size - 2, 100), (size, 1), (20 * MiB, 4096)):
            assert os.pread(file.fileno(), length, offset) == with_config[offset : offset + length]
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 3 * MiB
        assert 40 * MiB - 4096 <= os.lseek(file.fileno(), 4 * MiB, os.SEEK_DATA) <= 40 * MiB
        assert os.lseek(file.fileno(), 40 * MiB, os.SEEK_HOLE) == size
    copy = folder.parent / "copy.raw"
    subprocess.run(["cp", folder / "scsi0.raw", copy], check=True)
    assert copy.read_bytes() == with_config and copy.stat().st_blocks * 512 < 4 * MiB


def test_nothing_can_be_changed(with_config: bytes, folder: Path, mount: Mount) -> None:
    mount("vm/100@latest")
    with pytest.raises(OSError, match="Read-only"):
        os.open(folder / "scsi0.raw", os.O_RDWR)
    for change in (folder.joinpath("new").touch, (folder / "scsi0.raw").unlink, folder.joinpath("x").mkdir):
        with pytest.raises(OSError, match="Read-only"):
            change()


@pytest.mark.root
def test_other_users(with_config: bytes, folder: Path, mount: Mount) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    mount("vm/100@latest", "--allow-other")
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "scsi0.raw")] == [0o555, 0o444]


def test_a_mount_that_was_killed(cb: Casbackup, with_config: bytes, folder: Path, mount: Mount) -> None:
    process = mount("vm/100@latest")
    process.kill()
    process.wait()
    assert f"umount {folder}" in cb.fails(6, "mount", "vm/100", folder)["message"]
    subprocess.run(["umount", folder], check=True)
    assert os.listdir(folder) == []


def test_a_file_that_is_open_keeps_it_mounted(with_config: bytes, folder: Path, mount: Mount) -> None:
    process = mount("vm/100@latest")
    with open(folder / "scsi0.raw", "rb") as file:
        assert b"busy" in subprocess.run(["umount", folder], capture_output=True).stderr
        assert file.read(MiB) == with_config[:MiB]
        assert ended(process)[0] == 0
        assert not os.path.ismount(folder)
        with pytest.raises(OSError):
            os.pread(file.fileno(), 4096, 20 * MiB)


def test_a_vm(history: Casbackup, folder: Path, mount: Mount) -> None:
    process = mount("vm/100")
    assert sorted(os.listdir(folder)) == [f"2026-11-0{day}T20:00:00.000Z" for day in range(1, 6)]
    for day in (1, 5):
        content = (folder / f"2026-11-0{day}T20:00:00.000Z" / "scsi0.raw").read_bytes()
        assert content == history.ok("dump", f"vm/100@2026-11-0{day}", "scsi0").out
    history.ok("forget", "vm/100@2026-11-01", "-q")
    deadline = time.monotonic() + 20
    while len(os.listdir(folder)) != 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    subprocess.run(["umount", folder], check=True)
    assert process.wait(30) == 0


def test_the_repository(history: Casbackup, folder: Path, mount: Mount) -> None:
    mount()
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.raw"))
    assert len(found) == 6 and found[-1] == f"default/vm/200/{LATEST}/scsi0.raw"
    with pytest.raises(FileNotFoundError):
        (folder / "default" / "vm" / "300").stat()
    with pytest.raises(NotADirectoryError):
        (folder / found[0] / "x").stat()


def test_an_open_file_keeps_its_snapshot(history: Casbackup, folder: Path, mount: Mount) -> None:
    mount("vm/100")
    expected = history.ok("dump", "vm/100@2026-11-01", "scsi0").out
    assert history.json("sessions")["sessions"] == []
    with open(folder / "2026-11-01T20:00:00.000Z" / "scsi0.raw", "rb") as file:
        assert [session["kind"] for session in history.json("sessions")["sessions"]] == ["reader"]
        history.ok("forget", "vm/100@2026-11-01", "-q")
        history.ok("gc", "-q")
        assert file.read() == expected
    deadline = time.monotonic() + 20
    while history.json("sessions")["sessions"]:  # the kernel releases files a little later
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_damage(cb: Casbackup, with_config: bytes, folder: Path, mount: Mount) -> None:
    pack = next((cb.repository / "packs").rglob("*.pack"))
    with open(pack, "r+b") as file:
        file.seek(MiB)
        file.write(b"\x5a\xa5\x5a\xa5")
    process = mount("vm/100@latest")
    with open(folder / "scsi0.raw", "rb") as file, pytest.raises(OSError) as caught:
        file.read()
    assert caught.value.errno == errno.EIO
    status, _out, err = ended(process, signal.SIGINT)
    assert status == 0 and " cannot be read: " in err


def test_bad_input(history: Casbackup, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert history.fails(2, "mount", "vm/100", "vm/200", folder)["code"] == "usage"
    monkeypatch.setattr("casbackup_client.commands.mount._DEVICE", "/nowhere")
    assert history.fails(5, "mount", "vm/100", folder)["code"] == "tool-missing"
    monkeypatch.setattr("casbackup_client.commands.mount._DEVICE", "/dev/null")
    assert history.fails(6, "mount", "vm/100", folder / "missing")["code"] == "mountpoint-unusable"
    assert history.fails(6, "mount", "vm/100", history.folder)["code"] == "mountpoint-unusable"
    pytest.importorskip("mfusepy")
    assert history.fails(14, "mount", "vm/300", folder)["code"] == "snapshot-not-found"
    assert history.fails(14, "mount", "vm/100@2020", folder)["code"] == "snapshot-not-found"
