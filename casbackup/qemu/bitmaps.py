"""Dirty bitmaps in QEMU: which clusters a guest has written since a snapshot.

**Names.** ``casbackup-TARGET-TOKEN``. TARGET stands for a VM in a repository, so that backups to two repositories do
not disturb each other. TOKEN is new with every backup and stands in the snapshot's manifest: a bitmap is that of a
snapshot, or it is of no use.

**Never cleared.** A backup adds a bitmap of its own a moment before its point in time, reads that of the snapshot
before without changing it, and removes the old one when its own snapshot is committed. Whenever it dies, each bitmap
that is left is true of the snapshot that names it, or no snapshot does. One bitmap that QEMU clears when the job ends
(``on-success``) would be wrong if the commit failed afterwards.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from blake3 import blake3

from casbackup.ids import DiskName, Namespace, VmName
from casbackup.qemu.disks import LiveBitmap, LiveDisk
from casbackup.units import KiB

GRANULARITY_BYTES = 64 * KiB
_PREFIX = "casbackup"
_TOKEN = re.compile("[0-9a-f]{16}")


def new_token() -> str:
    """What the bitmaps of one backup have in common, on all its disks."""
    return secrets.token_hex(8)


def target_of(repository_id: str, namespace: Namespace, vm: VmName) -> str:
    """Stands for a VM in a repository."""
    return blake3(f"{repository_id}\0{namespace}\0{vm}".encode()).hexdigest()[:12]


def bitmap_name(target: str, token: str) -> str:
    return f"{_PREFIX}-{target}-{token}"


def token_of(name: str, target: str) -> str | None:
    """The token in a bitmap's name; None when it is not one of the target's."""
    head, _, token = name.rpartition("-")
    return token if head == f"{_PREFIX}-{target}" and _TOKEN.fullmatch(token) else None


class Tracking:
    """New dirty bitmaps for the next backup: added before the point in time, so they record a little too much."""

    def __init__(self, target: str, token: str) -> None:
        self.token = token
        self.name = bitmap_name(target, token)


class BasedOn(NamedTuple):
    """How a disk is going to be read. ``token``: of the bitmap to use; None: read it all, because of ``reason``.

    ``lost``: there was a bitmap, and it cannot be used.
    """

    token: str | None
    reason: str = ""
    lost: bool = False

    @property
    def is_increment(self) -> bool:
        return self.token is not None


def choose(disk: LiveDisk, target: str, known: Mapping[str, Mapping[DiskName, int]]) -> BasedOn:
    """What a disk can be an increment of.

    ``known``: of the snapshots that have bitmaps, newest first: token -> disk -> its size in bytes.
    """
    if not known:
        return BasedOn(None, "no snapshot has a dirty bitmap yet")
    bitmaps = {token: b for b in disk.bitmaps if (token := token_of(b.name, target)) is not None}
    if not bitmaps:
        return BasedOn(None, "the dirty bitmap is lost, as it is when the VM was started anew", lost=True)
    reasons = []
    for token, sizes in known.items():
        bitmap = bitmaps.get(token)
        if bitmap is not None:
            reason = _why_not(disk, bitmap, sizes)
            if not reason:
                return BasedOn(token)
            reasons.append(reason)
    reasons.append("the dirty bitmap belongs to no snapshot that is still here")
    return BasedOn(None, reasons[0], lost=True)


def _why_not(disk: LiveDisk, bitmap: LiveBitmap, sizes: Mapping[DiskName, int]) -> str:
    if bitmap.inconsistent:
        return "the dirty bitmap is inconsistent: QEMU did not end cleanly"
    if not bitmap.usable:
        return "the dirty bitmap is in use or does not record"
    if disk.name not in sizes:
        return "the snapshot that the dirty bitmap belongs to lacks the disk"
    if sizes[disk.name] != disk.size_bytes:
        return f"the disk had {sizes[disk.name]} bytes and now has {disk.size_bytes}"
    return ""


def stale(disk: LiveDisk, target: str, keep: Sequence[str | None]) -> list[str]:
    """Names of the target's bitmaps on a disk whose tokens are not to be kept."""
    return [
        bitmap.name
        for bitmap in disk.bitmaps
        if (token := token_of(bitmap.name, target)) is not None and token not in keep
    ]


def add_action(disk: LiveDisk, name: str) -> dict[str, Any]:
    """The action of a transaction that begins to record."""
    data = {"node": disk.node, "name": name, "granularity": GRANULARITY_BYTES}
    if disk.keeps_bitmaps:
        data["persistent"] = True
    return {"type": "block-dirty-bitmap-add", "data": data}
