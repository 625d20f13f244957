"""Which disks a running VM has, under the names that people know them by.

A name is that of the device (``-device virtio-blk-pci,id=virtio0``), else that of the drive without its ``drive-``,
else that of the block node. Media that cannot be written to and removable ones (CD-ROM) are left out, unless they
are asked for. Variables of EFI firmware are a disk like others. qemu-storage-daemon has no devices: there, what it
exports writable counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from casbackup.errors import DiskUnknown, DuplicateDisk, InvalidName
from casbackup.ids import DiskName, parse_disk
from casbackup.qemu.qmp import QmpClient

_DEVICE = re.compile(r"/machine/peripheral/([^/]+)")


@dataclass(frozen=True, slots=True)
class LiveBitmap:
    """A dirty bitmap of a disk. ``usable``: it records, is whole, and nobody else is using it."""

    name: str
    dirty_bytes: int
    usable: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class LiveDisk:
    """A disk of a running VM. ``node``: what block commands call it; ``device``: its QOM path, if it has one."""

    name: DiskName
    node: str
    size_bytes: int
    source: str
    device: str = ""
    drive: str = ""
    """Its name as a drive of the command line (``-drive id=``), if it has one."""
    keeps_bitmaps: bool = False
    """Its image format stores dirty bitmaps, so that they outlive QEMU."""
    bitmaps: tuple[LiveBitmap, ...] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """Which disks to back up. ``only``: names, or ``NAME=NODE`` for a block node that is no device's."""

    only: Sequence[str] = ()
    exclude: Sequence[str] = ()


class _Found:
    """A disk before it is decided whether it is wanted. ``left_out`` says why it usually is not."""

    def __init__(self, disk: LiveDisk, left_out: str = "") -> None:
        self.disk = disk
        self.left_out = left_out


def find_disks(qmp: QmpClient, selection: Selection) -> list[LiveDisk]:
    """The disks to back up, in the VM's order.

    :raise DiskUnknown: when a name is none of the VM's, or nothing is left to back up.
    :raise DuplicateDisk: when two disks have the same name. Other errors as ``QmpClient.execute``.
    """
    nodes = {node["node-name"]: node for node in qmp.execute("query-named-block-nodes") if "node-name" in node}
    found = list(_devices(qmp.execute("query-block"), nodes)) or list(_exports(qmp, nodes))
    chosen = _chosen(found, nodes, selection)
    if not chosen:
        raise DiskUnknown(f"there is nothing to back up; {_listing(found)}")
    names = [disk.name for disk in chosen]
    for name in {name for name in names if names.count(name) > 1}:
        raise DuplicateDisk(f"two disks of the VM are called {name}: choose one of their nodes, as --disk NAME=NODE")
    return chosen


def _devices(entries: Iterable[dict[str, Any]], nodes: dict[str, dict[str, Any]]) -> Iterable[_Found]:
    for entry in entries:
        inserted = entry.get("inserted")
        if not inserted:
            continue
        node = inserted["node-name"]
        device = entry.get("qdev", "")
        disk = _disk(_device_name(entry, node), nodes.get(node, inserted), device, entry.get("device", ""))
        if inserted["ro"]:
            yield _Found(disk, "read-only")
        elif entry.get("removable"):
            yield _Found(disk, "removable")
        else:
            yield _Found(disk)


def _exports(qmp: QmpClient, nodes: dict[str, dict[str, Any]]) -> Iterable[_Found]:
    """Of a qemu-storage-daemon: the nodes that it exports, each once."""
    names = {export["node-name"] for export in qmp.execute("query-block-exports")}
    for name in sorted(names):
        if name in nodes:
            yield _Found(_disk(name, nodes[name]), "read-only" if nodes[name]["ro"] else "")


def _device_name(entry: dict[str, Any], node: str) -> str:
    """What the disk is called by whoever set up the VM."""
    qdev, drive = entry.get("qdev", ""), entry.get("device", "")
    match = _DEVICE.match(qdev)
    if match:
        return match[1]
    if qdev and not qdev.startswith("/"):
        return str(qdev)
    return str(drive or node).removeprefix("drive-")


def _disk(name: str, node: dict[str, Any], device: str = "", drive: str = "") -> LiveDisk:
    image = node["image"]
    return LiveDisk(
        name=_disk_name(name),
        node=node["node-name"],
        size_bytes=image["virtual-size"],
        source=str(image.get("filename", "")),
        device=device,
        drive=drive,
        keeps_bitmaps=_keeps_bitmaps(image),
        bitmaps=tuple(_bitmap(item) for item in node.get("dirty-bitmaps", ()) if "name" in item),
    )


def _disk_name(text: str) -> DiskName:
    """A name of ours that is as near to theirs as the rules of names permit."""
    try:
        return parse_disk(text)
    except InvalidName:
        return parse_disk("disk-" + re.sub("[^A-Za-z0-9._-]", "_", text).strip("_.-")[:48])


def _keeps_bitmaps(image: dict[str, Any]) -> bool:
    specific = image.get("format-specific", {})
    return bool(specific.get("type") == "qcow2" and specific.get("data", {}).get("compat") == "1.1")


def _bitmap(item: dict[str, Any]) -> LiveBitmap:
    inconsistent = bool(item.get("inconsistent", False))
    return LiveBitmap(
        name=item["name"],
        dirty_bytes=item["count"],
        usable=bool(item.get("recording")) and not item.get("busy") and not inconsistent,
        inconsistent=inconsistent,
    )


def _chosen(found: list[_Found], nodes: dict[str, dict[str, Any]], selection: Selection) -> list[LiveDisk]:
    known = {item.disk.name: item.disk for item in found}
    for name in selection.exclude:
        if name not in known:
            raise DiskUnknown(f"the VM has no disk {name!r} to leave out; {_listing(found)}")
    if not selection.only:
        return [item.disk for item in found if not item.left_out and item.disk.name not in selection.exclude]
    named = [_named(text, known, nodes, found) for text in selection.only]
    return [disk for disk in named if disk.name not in selection.exclude]


def _named(
    text: str, known: dict[DiskName, LiveDisk], nodes: dict[str, dict[str, Any]], found: list[_Found]
) -> LiveDisk:
    name, equals, node = text.partition("=")
    if equals:
        if node not in nodes:
            raise DiskUnknown(f"QEMU has no block node {node!r}")
        parse_disk(name)
        return _disk(name, nodes[node])
    disk = known.get(parse_disk(name))
    if disk is None:
        raise DiskUnknown(f"the VM has no disk {name!r}; {_listing(found)}")
    return disk


def _listing(found: list[_Found]) -> str:
    if not found:
        return "it has no disks"
    return "it has " + ", ".join(i.disk.name + (f" ({i.left_out})" if i.left_out else "") for i in found)
