"""Which disks a VM is found to have, and what else is known of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.errors import DiskUnknown
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection, find_disks
from casbackup.qemu.features import detect
from casbackup.qemu.machine import Machine, find_agent
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions, Mode

from .conftest import Gathering, Process, assert_clean, need

pytestmark = pytest.mark.qemu
MiB = 1024 * 1024
OPTIONS = LiveOptions(freeze=FreezePolicy.NEVER)


@pytest.fixture
def vm(place: Path) -> Iterator[Process]:
    """Set up as Proxmox VE does it, and not started."""
    for name in ("root", "data", "cd", "vars", "code", "old"):
        (place / name).write_bytes(os.urandom(64 * 1024))
        os.truncate(place / name, 2 * MiB)
    command = [need("qemu-system-x86_64"), "-M", "pc", "-m", "16", "-accel", "tcg", "-display", "none", "-S"]
    command += ["-nodefaults", "-qmp", f"unix:{place}/qmp.sock,server=on,wait=off", "-device", "virtio-scsi-pci"]
    command += ["-drive", f"file={place}/root,if=none,id=drive-scsi0,format=raw"]
    command += ["-device", "scsi-hd,drive=drive-scsi0,id=scsi0,werror=stop"]
    command += ["-blockdev", f"driver=raw,node-name=data-node,file.driver=file,file.filename={place}/data"]
    command += ["-device", "virtio-blk-pci,drive=data-node,id=virtio1"]
    command += ["-drive", f"file={place}/cd,if=none,id=drive-ide2,media=cdrom,format=raw"]
    command += ["-device", "ide-cd,drive=drive-ide2,id=ide2"]
    command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={place}/code"]
    command += ["-drive", f"if=pflash,unit=1,format=raw,id=drive-efidisk0,file={place}/vars"]
    command += ["-drive", f"file={place}/old,if=none,id=drive-scsi1,format=raw,werror=stop"]
    command += ["-device", "scsi-hd,drive=drive-scsi1,id=scsi1"]
    command += ["-chardev", f"socket,path={place}/qga.sock,server=on,wait=off,id=qga0"]
    made = Process(place, command)
    with contextlib.closing(made):
        yield made


def names(qmp_disks: object) -> list[str]:
    return sorted(disk.name for disk in qmp_disks)  # type: ignore[attr-defined]


def test_disks_have_the_names_of_their_devices(vm: Process) -> None:
    with vm.qmp() as qmp:
        assert names(find_disks(qmp, Selection())) == ["efidisk0", "scsi0", "scsi1", "virtio1"]
        assert names(find_disks(qmp, Selection(only=["scsi0", "ide2"]))) == ["ide2", "scsi0"]
        assert names(find_disks(qmp, Selection(exclude=["efidisk0"]))) == ["scsi0", "scsi1", "virtio1"]
        (named,) = find_disks(qmp, Selection(only=["mine=data-node"]))
        assert (named.name, named.node, named.size_bytes) == ("mine", "data-node", 2 * MiB)
        with pytest.raises(DiskUnknown, match=r"ide2 \(read-only\)"):
            find_disks(qmp, Selection(only=["scsi9"]))
        with pytest.raises(DiskUnknown, match="nothing to back up"):
            find_disks(qmp, Selection(exclude=["efidisk0", "scsi0", "scsi1", "virtio1"]))


def test_what_is_known_of_the_vm(vm: Process, place: Path) -> None:
    with vm.qmp() as qmp:
        machine = Machine(qmp, Selection(), OPTIONS, Mode.PUSH)
        assert b"\n-nodefaults\n" in machine.configs["qemu-command-line"]
        assert b'"virtio1"' in machine.configs["qemu-devices.json"]
        assert find_agent(qmp) == str(place / "qga.sock")
        assert detect(qmp).backup_perf
        warnings = list(machine.warnings())
    if qmp.version < (10, 1, 0):
        assert len(warnings) == 1
        assert "virtio1" in warnings[0]
        assert "scsi0" not in warnings[0]
        assert "scsi1" not in warnings[0], "said with -drive, the device says auto"


def test_disks_of_all_kinds_are_backed_up(vm: Process, place: Path) -> None:
    with vm.qmp() as qmp:
        machine = Machine(qmp, Selection(), OPTIONS, Mode.PUSH)
        gathered = Gathering([disk.size_bytes for disk in machine.disks])
        source = machine.source(LiveControl(), print, None)
        source.run([DiskTask(disk, None) for disk in machine.disks], gathered)
        assert_clean(qmp)
    files = {"scsi0": "root", "virtio1": "data", "efidisk0": "vars", "scsi1": "old"}
    for disk, content in zip(machine.disks, gathered.disks, strict=True):
        assert content == (place / files[disk.name]).read_bytes()
