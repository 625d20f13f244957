"""``restore`` and ``dump``: what goes where, what is never overwritten, what is said about losses."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import Casbackup, MiB


@pytest.fixture
def vm(cb: Casbackup) -> Casbackup:
    """A repository with one snapshot of a VM with two disks and a config."""
    config = cb.folder / "100.conf"
    config.write_text("cores: 2\n")
    a, b = cb.disk("a.raw", seed=1), cb.disk("b.raw", seed=2, size_mib=3)
    cb.ok("backup", "vm/100", f"scsi0={a}", f"virtio1={b}", "--config", config)
    return cb


def content(vm: Casbackup, name: str) -> bytes:
    return (vm.folder / name).read_bytes()


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".partial")]


def test_restore_to_a_folder(vm: Casbackup) -> None:
    out = vm.folder / "new" / "out"
    result = vm.ok("restore", "vm/100", "--to", out)
    assert sorted(path.name for path in out.iterdir()) == ["100.conf", "scsi0.raw", "virtio1.raw"]
    assert (out / "scsi0.raw").read_bytes() == content(vm, "a.raw")
    assert (out / "virtio1.raw").read_bytes() == content(vm, "b.raw")
    assert (out / "100.conf").read_text() == "cores: 2\n"
    assert (out / "scsi0.raw").stat().st_blocks * 512 < 3 * MiB
    assert result.text.startswith("restored vm/100@")


def test_restore_one_disk(vm: Casbackup) -> None:
    target, out = vm.folder / "x.img", vm.folder / "out"
    vm.ok("restore", "vm/100", "--disk", f"virtio1={target}", "--sync")
    assert target.read_bytes() == content(vm, "b.raw")
    vm.ok("restore", "vm/100", "--disk", "scsi0", "--to", out)
    assert [path.name for path in out.iterdir()] == ["scsi0.raw"]


def test_nothing_is_overwritten_unless_forced(vm: Casbackup) -> None:
    out = vm.folder / "out"
    out.mkdir()
    (out / "virtio1.raw").write_text("precious")
    assert vm.fails(6, "restore", "vm/100", "--to", out)["code"] == "target-exists"
    assert [path.name for path in out.iterdir()] == ["virtio1.raw"]
    assert (out / "virtio1.raw").read_text() == "precious"
    vm.ok("restore", "vm/100", "--to", out, "--force")
    assert (out / "virtio1.raw").read_bytes() == content(vm, "b.raw")


def test_configs_are_not_overwritten_either(vm: Casbackup) -> None:
    out = vm.folder / "out"
    out.mkdir()
    (out / "100.conf").write_text("precious")
    assert vm.fails(6, "restore", "vm/100", "--to", out)["code"] == "target-exists"
    assert (out / "100.conf").read_text() == "precious"
    assert len(list(out.iterdir())) == 1


def test_in_place_writes_only_what_differs(vm: Casbackup) -> None:
    target = vm.folder / "copy.raw"
    shutil.copy(vm.folder / "a.raw", target)
    with open(target, "r+b") as file:
        file.seek(MiB // 2)
        file.write(b"changed")
        file.seek(5 * MiB)
        file.write(b"not zero")
    restored = vm.json("restore", "vm/100", "--disk", f"scsi0={target}", "--in-place")["disks"][0]
    assert target.read_bytes() == content(vm, "a.raw")
    assert 0 < restored["written_bytes"] <= 256 * 1024
    assert restored["unchanged_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "usage"),
        (["--disk", "scsi0"], "usage"),
        (["--disk", "scsi0={out}", "--disk", "scsi0={out}2"], "duplicate-disk"),
        (["--disk", "scsi0={out}", "--disk", "virtio1={out}"], "usage"),
        (["--disk", "scsi0={out}", "--format", "tar"], "usage"),
        (["--disk", "ide0={out}"], "snapshot-not-found"),
        (["--disk", "scsi0={folder}"], "target-unsuitable"),
        (["--disk", "scsi0={folder}/none/x"], "target-unsuitable"),
        (["--to", "{folder}/a.raw"], "target-unsuitable"),
        (["--to", "{folder}/a.raw/x"], "target-unsuitable"),
        (["--disk", "scsi0=/dev/null"], "target-unsuitable"),
        (["--disk", "scsi0={out}.qcow2", "--in-place"], "usage"),
    ],
)
def test_targets_that_cannot_be(vm: Casbackup, arguments: list[str], code: str) -> None:
    out = vm.folder / "out"
    expected = {"usage": 2, "duplicate-disk": 2, "snapshot-not-found": 14}.get(code, 6)
    filled = [a.format(out=out, folder=vm.folder) for a in arguments]
    assert vm.fails(expected, "restore", "vm/100", *filled)["code"] == code
    assert not out.exists()
    assert leftovers(vm.folder) == []


@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="needs qemu-nbd")
def test_restore_as_qcow2_and_back_it_up_again(vm: Casbackup) -> None:
    vm.ok("restore", "vm/100", "--to", vm.folder / "out", "--format", "qcow2")
    image = vm.folder / "out" / "scsi0.qcow2"
    assert image.read_bytes()[:4] == b"QFI\xfb"
    again = vm.json("backup", "vm/100", f"scsi0={image}")["snapshot"]
    assert again["stats"]["new_bytes"] == 0
    assert vm.ok("dump", "vm/100", "scsi0").out == content(vm, "a.raw")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for loop devices")
def test_restore_to_a_block_device(vm: Casbackup) -> None:
    with loop_device(vm.folder / "small.img", MiB) as device:
        error = vm.fails(6, "restore", "vm/100", "--disk", f"scsi0={device}")
        assert error["code"] == "target-too-small"
    with loop_device(vm.folder / "device.img", 8 * MiB) as device:
        vm.ok("restore", "vm/100", "--disk", f"scsi0={device}")
        error = vm.fails(6, "restore", "vm/100", "--disk", f"scsi0={device}")
        assert error["code"] == "target-exists"
        vm.ok("restore", "vm/100", "--disk", f"scsi0={device}", "--in-place")
        vm.ok("restore", "vm/100", "--disk", f"scsi0={device}", "--force", "--sync")
        with open(device, "rb") as file:
            assert file.read(6 * MiB) == content(vm, "a.raw")
        error = vm.fails(6, "restore", "vm/100", "--disk", f"scsi0={device}", "--force", "--format", "qcow2")
        assert error["code"] == "target-unsuitable"


@contextmanager
def loop_device(path: Path, size_bytes: int) -> Iterator[str]:
    """A file of this size as a block device; the test is skipped where there are none."""
    path.touch()
    os.truncate(path, size_bytes)
    done = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_dump_whole_parts_and_configs(vm: Casbackup) -> None:
    disk = content(vm, "a.raw")
    assert vm.ok("dump", "vm/100", "scsi0").out == disk
    assert vm.ok("dump", "vm/100", "scsi0", "--offset", "1000001", "--length", "70001").out == disk[1000001:1070002]
    assert vm.ok("dump", "vm/100", "scsi0", "--offset", "6MiB").out == b""
    assert vm.ok("dump", "vm/100", "--config", "100.conf").text == "cores: 2\n"
    assert vm.fails(2, "dump", "vm/100", "scsi0", "--offset", "7M", "-o", "x")["code"] == "invalid-value"
    assert vm.fails(2, "dump", "vm/100", "scsi0")["code"] == "usage"  # --json and the data on stdout
    assert vm("dump", "vm/100").status == vm("dump", "vm/100", "scsi0", "--config", "x").status == 2


def test_dump_to_a_file(vm: Casbackup) -> None:
    out = vm.folder / "dumped"
    assert vm.ok("dump", "vm/100", "scsi0", "-o", out).text == f"wrote {6 * MiB} bytes to {out}\n"
    assert out.read_bytes() == content(vm, "a.raw")
    assert vm.fails(6, "dump", "vm/100", "virtio1", "-o", out)["code"] == "target-exists"
    vm.ok("dump", "vm/100", "virtio1", "-o", out, "--force", "-q")
    assert out.read_bytes() == content(vm, "b.raw")
    assert leftovers(vm.folder) == []


def test_a_reference_by_time_and_by_id(vm: Casbackup) -> None:
    first = vm.json("show", "vm/100")["snapshot"]
    vm.ok("backup", "vm/100", f"scsi0={vm.folder / 'b.raw'}")
    for reference in (
        first["reference"],
        first["id"][:10],
        f"vm/100@{first['id'][:6]}",
        f"default:{first['reference']}",
    ):
        assert vm.ok("dump", reference, "scsi0").out == content(vm, "a.raw")
    assert vm.ok("dump", "vm/100@latest", "scsi0").out == content(vm, "b.raw")
