"""What ``open_source`` takes a path or URI for."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from casbackup.block.device import read_bytes
from casbackup.block.source import detect_format, open_source
from casbackup.errors import NbdConnectionFailed, SourceNotFound, SourceUnreadable, ToolFailed, UsageError

QCOW2 = b"QFI\xfb\x00\x00\x00\x03"
VDI = b"<<< QEMU VM Virtual Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe"


@pytest.mark.parametrize(
    ("name", "start", "expected"),
    [
        ("disk.qcow2", QCOW2, "qcow2"),
        ("disk", QCOW2, "qcow2"),
        ("disk", b"QFI\xfb\x00\x00\x00\x02", "qcow2"),
        ("disk", b"QFI\xfb\x00\x00\x00\x63", "raw"),
        ("disk.raw", QCOW2, "raw"),
        ("disk.IMG", QCOW2, "raw"),
        ("disk.vmdk", b"KDMV", "vmdk"),
        ("disk.vmdk", b"# Disk DescriptorFile", "vmdk"),
        ("disk-flat.vmdk", b"\0", "raw"),
        ("disk.VHDX", b"vhdxfile", "vhdx"),
        ("disk.vdi", VDI, "vdi"),
        ("disk", b"", "raw"),
        ("disk", b"\xeb\x63\x90", "raw"),
    ],
)
def test_detection(tmp_path: Path, name: str, start: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(start and start.ljust(4096, b"\0"))
    assert detect_format(str(path)) == expected


def test_fixed_vhd_has_its_mark_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(bytes(1 << 20) + b"conectix".ljust(512, b"\0"))
    assert detect_format(str(path)) == "vpc"


@pytest.mark.parametrize("name", ["disk.qcow2", "disk.vhdx", "disk.vdi", "disk.vhd"])
def test_names_that_promise_what_the_content_is_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"x" * 4096)
    with pytest.raises(SourceUnreadable, match="is named like a"):
        open_source(str(path))
    with open_source(str(path), format="raw") as device:
        assert read_bytes(device, 0, 4096) == b"x" * 4096


def evil_header(secret: str) -> bytes:
    """What a guest writes to a raw disk: a qcow2 of 1 MiB whose backing file is a file of the host."""
    name = secret.encode()
    places = (72, len(name), 16, 1 << 20, 0, 1, 65536, 131072, 1, 0, 0)
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, *places)
    return (header + name).ljust(4 * 65536, b"\0")


@pytest.mark.parametrize("name", ["vm-100-disk-0.raw", "vm-100-disk-0.img"])
def test_guest_cannot_turn_a_raw_disk_into_an_image(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:hash")
    disk = tmp_path / name
    disk.write_bytes(evil_header(str(secret)))
    with open_source(str(disk)) as device:
        assert read_bytes(device, 0, device.size_bytes) == disk.read_bytes()


@pytest.mark.qemu
def test_guest_cannot_make_us_read_files_of_the_host(images: Path) -> None:
    secret = images / "secret"
    secret.write_text("root:hash".ljust(512))
    disk = images / "vm-100-disk-0"
    disk.write_bytes(evil_header(str(secret)))
    with pytest.raises(SourceUnreadable, match=r"refers to .*secret"):
        open_source(str(disk))
    with open_source(str(disk), format="raw") as device:
        assert read_bytes(device, 0, 4) == b"QFI\xfb"


@pytest.mark.root
def test_block_devices_are_raw(loop_device: Callable[[int], str]) -> None:
    path = loop_device(1 << 20)
    with open(path, "wb") as file:
        file.write(QCOW2)
    with open_source(path) as device:
        assert read_bytes(device, 0, 8) == QCOW2


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(SourceUnreadable, match="is a folder"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match="unknown image format 'nbd'"):
        open_source(str(tmp_path), format="nbd")
    with pytest.raises(UsageError, match="always raw"):
        open_source("nbd://localhost/disk", format="qcow2")
    with pytest.raises(UsageError, match="unknown parameter"):
        open_source("nbds://localhost/disk?tls-psk-file=x")
    with pytest.raises(NbdConnectionFailed):
        open_source(f"nbd+unix:///?socket={tmp_path}/none")


@pytest.mark.qemu
def test_given_format_that_is_wrong(images: Path) -> None:
    (images / "disk.raw").write_bytes(bytes(4096))
    with pytest.raises(ToolFailed, match="not in qcow2 format"):
        open_source(str(images / "disk.raw"), format="qcow2")


def test_nbd_uri(nbdkit: Any) -> None:
    with nbdkit("data", "0x61 @0xfff 0") as uri, open_source(uri) as device:
        assert read_bytes(device, 0, 2) == b"a\0"
        with pytest.raises(ValueError, match="not within"):
            read_bytes(device, 4096, 1)


def test_source_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    with open_source(str(tmp_path / "disk")) as device, pytest.raises(ValueError, match="not writable"):
        device.write(0, b"x")


def test_a_raw_source_does_not_load_what_it_does_not_need() -> None:
    program = (
        "import sys, casbackup.block.source, casbackup.block.target\n"
        "heavy = ('subprocess', 'socket', 'json', 'asyncio', 'urllib', 'tempfile')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done
