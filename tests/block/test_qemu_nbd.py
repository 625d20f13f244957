"""Images of QEMU's formats through a qemu-nbd of our own, and what is left of it afterwards: nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from casbackup.block import qemu_img
from casbackup.block.device import read_bytes
from casbackup.block.qemu_img import ImageInfo, probe
from casbackup.block.qemu_nbd import QemuImage, QemuNbd
from casbackup.block.qemu_target import create_image_target
from casbackup.block.source import open_source
from casbackup.errors import SourceNotFound, TargetExists, ToolFailed, ToolMissing
from casbackup.units import KiB, MiB

pytestmark = pytest.mark.qemu

SIZE = 4 * MiB
FORMATS = ("qcow2", "vmdk", "vhdx", "vdi", "vpc")


def disk_content() -> bytes:
    content = bytearray(SIZE)
    content[: 100 * KiB] = random.Random(1).randbytes(100 * KiB)
    content[3 * MiB : 3 * MiB + 70 * KiB] = random.Random(2).randbytes(70 * KiB)
    return bytes(content)


def convert(folder: Path, image_format: str, name: str) -> str:
    """The content above as an image file."""
    raw = folder / "content.raw"
    raw.write_bytes(disk_content())
    image = folder / name
    options = ["-o", "force_size=on"] if image_format == "vpc" else []
    command = ["qemu-img", "convert", "-f", "raw", "-O", image_format, *options, str(raw), str(image)]
    subprocess.run(command, check=True)
    return str(image)


@pytest.mark.parametrize("image_format", FORMATS)
def test_formats_are_detected_and_read(images: Path, image_format: str) -> None:
    suffix = "vhd" if image_format == "vpc" else image_format
    path = convert(images, image_format, f"disk.{suffix}")
    assert probe(path) == ImageInfo(image_format, SIZE, ())
    with open_source(path) as device:
        assert device.size_bytes == SIZE
        assert read_bytes(device, 0, SIZE) == disk_content()
        zero = sum(extent.length for extent in device.extents(0, SIZE) if extent.zero)
        assert zero > SIZE // 2 or image_format not in ("qcow2", "vmdk")  # the others have blocks of 1 MiB up
        assert not device.capabilities.writable


def test_names_that_qemu_would_take_for_something_else(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    for name in ("nbd:localhost:1", 'json:{"driver":"null-co"}', "--help", "a b,c=d"):
        convert(images, "qcow2", name)
        assert probe(name).size_bytes == SIZE
        with QemuImage.open(name, "qcow2") as device:
            assert read_bytes(device, 0, KiB) == disk_content()[:KiB]


def test_probe_of_what_is_no_image(images: Path) -> None:
    with pytest.raises(SourceNotFound):
        probe(str(images / "missing"))
    (images / "text").write_text("hello")
    with pytest.raises(ToolFailed, match="not in qcow2 format"):
        probe(str(images / "text"), image_format="qcow2")


def test_references_of_an_image(images: Path) -> None:
    base = convert(images, "qcow2", "base.qcow2")
    overlay = str(images / "overlay.qcow2")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay]
    subprocess.run(command, check=True)
    assert probe(overlay).references == (base,)
    with open_source(overlay) as device:
        assert read_bytes(device, 0, SIZE) == disk_content()


def test_wrong_format_is_said_with_the_words_of_qemu(images: Path) -> None:
    path = convert(images, "vmdk", "disk.vmdk")
    with pytest.raises(ToolFailed, match="Image is not in qcow2 format"):
        QemuImage.open(path, "qcow2")


def test_tools_that_are_missing(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = convert(images, "qcow2", "disk.qcow2")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolMissing, match="qemu-nbd is not installed"):
        QemuImage.open(path, "qcow2")
    with pytest.raises(ToolMissing, match="qemu-img is not installed"):
        probe(path)


def test_tool_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_img, "_TIMEOUT_S", 0.1)
    with pytest.raises(ToolFailed, match=r"did not end within 0\.1 s"):
        qemu_img.run_tool(["sleep", "5"])


def test_output_that_is_not_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for output in ("not json", "[]", "{}", '{"format": "raw", "virtual-size": null}'):
        script = tmp_path / "qemu-img"
        script.write_text(f"#!/bin/sh\necho '{output}'\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(ToolFailed, match="cannot be understood"):
            probe(str(script))


def test_image_that_is_in_use(images: Path) -> None:
    path = convert(images, "qcow2", "disk.qcow2")
    with QemuImage.open(path, "qcow2", writable=True), pytest.raises(ToolFailed, match="lock"):
        QemuImage.open(path, "qcow2")


def test_qemu_nbd_that_dies(images: Path) -> None:
    with QemuImage.open(convert(images, "qcow2", "disk.qcow2"), "qcow2") as device:
        os.kill(device._server._process.pid, signal.SIGKILL)
        with pytest.raises(ToolFailed, match=r"ended with status -9 while serving .*disk\.qcow2"):
            read_bytes(device, 0, 4096)


def test_written_image_whose_server_died_is_not_called_good(images: Path) -> None:
    device = QemuImage.open(convert(images, "qcow2", "disk.qcow2"), "qcow2", writable=True)
    os.kill(device._server._process.pid, signal.SIGKILL)
    with pytest.raises(ToolFailed, match="status -9"):
        device.close()
    device.close()


def test_closing_leaves_nothing(images: Path) -> None:
    path = convert(images, "qcow2", "disk.qcow2")
    for writable in (False, True):
        with QemuImage.open(path, "qcow2", writable=writable) as device:
            server = device._server
            assert os.stat(server._folder).st_mode & 0o777 == 0o700
        assert server._process.returncode == (0 if writable else server._process.returncode)
        assert not os.path.exists(server._folder)
        assert gone(server._process.pid)


@pytest.mark.parametrize("connected", [True, False])
def test_killed_process_leaves_nothing(images: Path, connected: bool) -> None:
    """``kill -9`` of us ends qemu-nbd and removes its folder, also before there is any connection."""
    path = convert(images, "qcow2", "disk.qcow2")
    what = "server.connect()" if connected else "None"
    program = (
        "import sys, time\n"
        "from casbackup.block.qemu_nbd import QemuNbd\n"
        f"server = QemuNbd({path!r}, 'qcow2', writable=False)\n"
        f"connection = {what}\n"
        "print(server._process.pid, server._folder, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        pid, folder = process.stdout.readline().split()
        assert os.path.exists(folder) and not gone(int(pid))
        process.kill()
    deadline = time.monotonic() + 10
    while os.path.exists(folder) or not gone(int(pid)):
        assert time.monotonic() < deadline, "something stayed behind"
        time.sleep(0.01)


def test_server_that_is_never_used_is_ended(images: Path) -> None:
    server = QemuNbd(convert(images, "qcow2", "disk.qcow2"), "qcow2", writable=False)
    server.kill()
    server.kill()
    assert gone(server._process.pid) and not os.path.exists(server._folder)


def gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody has waited for yet counts."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_long_folder_for_temporary_files(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = images / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with QemuImage.open(convert(images, "qcow2", "disk.qcow2"), "qcow2") as device:
        assert read_bytes(device, 0, KiB) == disk_content()[:KiB]
    assert not list(long.iterdir())


def test_new_image_as_target(images: Path) -> None:
    path = images / "restored.qcow2"
    content = disk_content()
    with create_image_target(str(path), SIZE - 100) as target:
        assert target.starts_zero
        assert target.device.size_bytes == SIZE
        assert not path.exists()
        target.device.write(0, content[: 1 * MiB])
        target.device.write(3 * MiB, content[3 * MiB :])
        target.commit()
    assert list_names(images) == ["restored.qcow2"]
    assert probe(str(path)) == ImageInfo("qcow2", SIZE, ())
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
    with open_source(str(path)) as device:
        assert read_bytes(device, 0, SIZE) == content
    assert os.stat(path).st_blocks * 512 < SIZE // 2 + 512 * KiB


@pytest.mark.parametrize("image_format", FORMATS)
def test_new_images_hold_disks_of_any_size(images: Path, image_format: str) -> None:
    path = str(images / "restored")
    for size in (512, 5 * MiB + 512, 7 * MiB - 1):
        with create_image_target(path, size, image_format=image_format, force=True) as target:
            assert target.device.size_bytes == -(-size // 512) * 512
            target.device.write(max(0, size - 100), b"x" * 100)
            target.commit(sync=False)
        with open_source(path, format=image_format) as device:
            assert read_bytes(device, 0, size) == bytes(size - 100) + b"x" * 100


def test_aborted_image_leaves_nothing(images: Path) -> None:
    path = images / "restored.qcow2"
    with create_image_target(str(path), SIZE) as target:
        target.device.write(0, b"x" * MiB)
    assert list_names(images) == []


def test_image_target_replaces_only_when_forced(images: Path) -> None:
    path = images / "restored.qcow2"
    path.write_text("precious")
    with pytest.raises(TargetExists):
        create_image_target(str(path), SIZE)
    with create_image_target(str(path), SIZE, force=True) as target:
        target.device.write(0, b"x" * 512)
        assert path.read_text() == "precious"
        target.commit(sync=False)
    with open_source(str(path)) as device:
        assert read_bytes(device, 0, 513) == b"x" * 512 + b"\0"


def test_image_target_whose_server_died_is_not_committed(images: Path) -> None:
    path = images / "restored.qcow2"
    target = create_image_target(str(path), SIZE)
    with target:
        device = target.device._device  # type: ignore[attr-defined]
        os.kill(device._server._process.pid, signal.SIGKILL)
        with pytest.raises(ToolFailed):
            target.commit()
    assert list_names(images) == []


def test_impossible_image(images: Path) -> None:
    with pytest.raises(ToolFailed, match="Unknown file format"):
        create_image_target(str(images / "restored.x"), SIZE, image_format="x")
    assert list_names(images) == []


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
