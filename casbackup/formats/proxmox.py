"""What Proxmox VE expects around a VMA archive: names of devices and files, and the lines of the configuration that
``qmrestore`` maps disks by.

A disk called like a drive of Proxmox VE (``scsi0``, ``virtio1``, ``efidisk0`` …) is that drive; any other becomes the
next free ``scsiN``. Its device is ``drive-DRIVE``, and the configuration gets the line
``#qmdump#map:DRIVE:DEVICE::raw:``.

The configuration is the config ``qemu-server.conf``, else ``VMID.conf``; without one a minimal one is made, which
names the VM, its disks and a SCSI controller, and gives it 2 GiB of memory and a core. Left out of it is what vzdump
leaves out: snapshots and other sections, locks, unused disks, old maps. A drive that it does not mention is added.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from casbackup.formats.names import DRIVE_PREFIX, vm_component
from casbackup.formats.port import ArchiveConfig, ArchiveHead

FORMAT_NAME = "vma"
CONFIG_NAME = "qemu-server.conf"
FIREWALL_NAME = "qemu-server.fw"

_VMID = re.compile(r"[1-9][0-9]{2,8}")
_FILE_NAME = re.compile(r"vzdump-qemu-([1-9][0-9]{2,8})-")
_DRIVE = re.compile(r"(?:ide|sata|scsi|virtio)[0-9]{1,2}|efidisk0|tpmstate0")
_DRIVE_LINE = re.compile(r"((?:ide|sata|scsi|virtio|efidisk|tpmstate)[0-9]+):")
_VOLUME = re.compile(r"\b(?:vm|base)-([1-9][0-9]{2,8})-(?:disk|cloudinit|state)")
_LEFT_OUT = re.compile(r"unused[0-9]+:|lock:|parent:|#vzdump#|#qmdump#")
_TPM_DRIVE = "tpmstate0"
_NO_VMID = "0"


def archive_head(head: ArchiveHead, vm: str) -> ArchiveHead:
    """The head as Proxmox VE wants it. ``head`` has disks and configs under our names; ``vm`` is ``vm/100``."""
    drives = drive_names([disk.name for disk in head.disks if not disk.is_vmstate])
    disks = [disk if disk.is_vmstate else replace(disk, name=_device(drives[disk.name])) for disk in head.disks]
    return replace(head, disks=tuple(disks), configs=tuple(_configs(head, drives, vm)))


def drive_names(names: Sequence[str]) -> dict[str, str]:
    """Which drive each disk is."""
    drives = {name: name for name in names if _DRIVE.fullmatch(name)}
    free = (f"scsi{number}" for number in range(len(names) + len(drives)) if f"scsi{number}" not in drives)
    for name in names:
        if name not in drives:
            drives[name] = next(free)
    return drives


def vmid(vm: str) -> str | None:
    """The number of ``vm/100``; None when the VM has a name that is no number of Proxmox VE."""
    name = vm.removeprefix("vm/")
    return name if _VMID.fullmatch(name) else None


def file_name(vm: str, time_s: int, suffix: str) -> str:
    """What ``qmrestore`` and the storage of Proxmox VE want a file to be called; the time is local."""
    moment = time.strftime("%Y_%m_%d-%H_%M_%S", time.localtime(time_s))
    return f"vzdump-qemu-{vm.removeprefix('vm/')}-{moment}{suffix}"


def vm_of(path: str, configs: Sequence[ArchiveConfig]) -> str | None:
    """The VM that an archive is of, told from the name of its file or the volumes of its configuration."""
    found = _FILE_NAME.search(path)
    if found is None:
        text = b"".join(c.content for c in configs if c.name == CONFIG_NAME).decode(errors="replace")
        found = _VOLUME.search(text)
    return None if found is None else f"vm/{vm_component(found[1])}"


def _device(drive: str) -> str:
    return f"{DRIVE_PREFIX}{drive}-backup" if drive == _TPM_DRIVE else f"{DRIVE_PREFIX}{drive}"


def _configs(head: ArchiveHead, drives: Mapping[str, str], vm: str) -> list[ArchiveConfig]:
    """The configuration first, then the firewall's rules, then the rest."""
    rest = {config.name: config.content for config in head.configs}
    number = vmid(vm) or _NO_VMID
    text = _taken(rest, CONFIG_NAME, f"{number}.conf")
    firewall = _taken(rest, FIREWALL_NAME, f"{number}.fw")
    sizes = {drives[disk.name]: disk.size_bytes for disk in head.disks if not disk.is_vmstate}
    found = [ArchiveConfig(CONFIG_NAME, _config(text, sizes, vm))]
    if firewall is not None:
        found.append(ArchiveConfig(FIREWALL_NAME, firewall))
    return found + [ArchiveConfig(name, content) for name, content in rest.items()]


def _taken(configs: dict[str, bytes], *names: str) -> bytes | None:
    return next((configs.pop(name) for name in names if name in configs), None)


def _config(text: bytes | None, sizes: Mapping[str, int], vm: str) -> bytes:
    lines = _minimal(vm) if text is None else _kept(text.decode("utf-8", "surrogateescape").splitlines())
    mentioned = {found[1] for line in lines if (found := _DRIVE_LINE.match(line))}
    number = vmid(vm) or _NO_VMID
    for place, (drive, size_bytes) in enumerate(sizes.items()):
        if drive not in mentioned:
            lines.append(f"{drive}: local:vm-{number}-disk-{place},size={-(-size_bytes // 1024)}K")
    lines += [f"#qmdump#map:{drive}:{_device(drive)}::raw:" for drive in sizes]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def _minimal(vm: str) -> list[str]:
    name = "vm" + vm.removeprefix("vm/") if vmid(vm) else vm.removeprefix("vm/")
    dns_name = re.sub(r"[^A-Za-z0-9.-]", "-", name).strip(".-")[:63] or "vm"
    return ["cores: 1", "memory: 2048", f"name: {dns_name}", "scsihw: virtio-scsi-pci"]


def _kept(lines: Sequence[str]) -> list[str]:
    """Lines up to the first section, without those that vzdump leaves out."""
    kept: list[str] = []
    for line in lines:
        if line.startswith("["):
            break
        if not _LEFT_OUT.match(line):
            kept.append(line)
    while kept and not kept[-1]:
        kept.pop()
    return kept
