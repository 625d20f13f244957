"""What formats of a single disk have in common."""

from __future__ import annotations

from casbackup.errors import ArchiveLimit
from casbackup.formats.port import ArchiveHead
from casbackup.units import format_size

SECTOR_BYTES = 512


def check_single_disk(head: ArchiveHead, format_name: str, max_bytes: int) -> None:
    """:raise ArchiveLimit: unless there is exactly one disk, no VM state, of at most ``max_bytes``."""
    if len(head.disks) != 1:
        raise ArchiveLimit(f"{format_name} holds one disk, not {len(head.disks)}")
    disk = head.disks[0]
    if disk.is_vmstate:
        raise ArchiveLimit(f"{format_name} holds disks, no VM state")
    if disk.size_bytes > max_bytes:
        raise ArchiveLimit(
            f"disk {disk.name} has {format_size(disk.size_bytes)}; {format_name} takes up to {format_size(max_bytes)}"
        )


def sectors_for(size_bytes: int) -> int:
    """How many sectors hold so many bytes."""
    return -(-size_bytes // SECTOR_BYTES)
