"""An extent: its header taken apart, and the ranges of disks that its slots stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from casbackup.formats.port import Data, Event, Zeros
from casbackup.spec import vma

_DEVICE = 0xFF << 32
_MASKS = int.from_bytes(b"\xff\xff\0\0\0\0\0\0" * vma.SLOTS, "big")


class Extent(NamedTuple):
    """A header whose checksum holds. ``block_count`` is what it says is stored, ``mask_blocks`` what the masks of its
    slots say; ``slots`` are the used ones, in order.
    """

    block_count: int
    mask_blocks: int
    uuid: bytes
    slots: list[int]


class Place(NamedTuple):
    """Where the clusters of a device go: the disk's place in the head, its size, and whether it is the VM's state."""

    disk: int
    size_bytes: int
    is_state: bool = False


def parse_extent(header: memoryview) -> Extent | str:
    """The extent that these 512 bytes begin, or what is wrong with them, for a message."""
    magic, reserved, block_count, uuid, checksum = vma.EXTENT.unpack_from(header)
    if vma.extent_checksum(header) != checksum:
        return "the checksum of an extent's header is wrong"
    if magic != vma.EXTENT_MAGIC or reserved:
        return "an extent does not begin like one"
    table = vma.SLOT_TABLE.unpack_from(header, vma.EXTENT.size)
    slots = [slot for slot in table if slot & _DEVICE]
    mask_blocks = (int.from_bytes(header[vma.EXTENT.size :], "big") & _MASKS).bit_count()
    if len(slots) < vma.SLOTS:
        mask_blocks -= sum(mask_of(slot).bit_count() for slot in table if not slot & _DEVICE)
    return Extent(block_count, mask_blocks, uuid, slots)


def device_of(slot: int) -> int:
    return slot >> 32 & 0xFF


def cluster_of(slot: int) -> int:
    return slot & 0xFFFF_FFFF


def mask_of(slot: int) -> int:
    return slot >> 48


def slot_problem(slot: int, place: Place | None) -> tuple[str, str] | None:
    """(code, text) of what is wrong with where a slot's cluster lies. The state of a VM may be longer than said."""
    if place is None:
        return "unknown-device", f"there is data of device {device_of(slot)}, which the header does not list"
    if place.is_state:
        return None
    offset = cluster_of(slot) * vma.CLUSTER_BYTES
    if offset >= place.size_bytes:
        return "beyond-end", "there is a cluster beyond the end of the device"
    blocks = -(-(place.size_bytes - offset) // vma.BLOCK_BYTES)
    mask = mask_of(slot)
    if mask >> blocks and mask != vma.FULL_MASK:
        return "beyond-end", "there are blocks beyond the end of the device"
    return None


class Run(NamedTuple):
    """Blocks of a cluster that are all stored or all zero."""

    first: int
    blocks: int
    is_stored: bool


_ZERO = (Run(0, vma.CLUSTER_BLOCKS, False),)
_STORED = (Run(0, vma.CLUSTER_BLOCKS, True),)


def runs_of(mask: int) -> tuple[Run, ...]:
    """The runs of a cluster's blocks, in order, without gaps."""
    if mask == vma.FULL_MASK:
        return _STORED
    return _mixed_runs(mask) if mask else _ZERO


@lru_cache(maxsize=4096)
def _mixed_runs(mask: int) -> tuple[Run, ...]:
    runs: list[Run] = []
    first = 0
    for block in range(1, vma.CLUSTER_BLOCKS + 1):
        is_stored = bool(mask >> first & 1)
        if block == vma.CLUSTER_BLOCKS or bool(mask >> block & 1) is not is_stored:
            runs.append(Run(first, block - first, is_stored))
            first = block
    return tuple(runs)


class Piece(NamedTuple):
    """``length`` bytes from ``offset`` of a disk; ``start``: where they are in the extent's data, None: zeros."""

    disk: int
    offset: int
    length: int
    start: int | None


def pieces_of(slots: Sequence[int], places: Mapping[int, Place]) -> Iterator[Piece]:
    """The ranges of these slots, each cut off at the end of its disk; what lies side by side is one. Devices without
    a place are passed over.
    """
    disk = last_offset = length = 0
    last_start: int | None = None
    position = 0
    for slot in slots:
        place = places.get(device_of(slot))
        if place is None:
            position += mask_of(slot).bit_count() * vma.BLOCK_BYTES
            continue
        base = cluster_of(slot) * vma.CLUSTER_BYTES
        for first, blocks, is_stored in runs_of(mask_of(slot)):
            offset = base + first * vma.BLOCK_BYTES
            room = min(blocks * vma.BLOCK_BYTES, place.size_bytes - offset)
            start = position if is_stored else None
            position += blocks * vma.BLOCK_BYTES if is_stored else 0
            if room <= 0:
                continue
            if length and _follows(disk, last_offset, length, last_start, place.disk, offset, start):
                length += room
                continue
            if length:
                yield Piece(disk, last_offset, length, last_start)
            disk, last_offset, length, last_start = place.disk, offset, room, start
    if length:
        yield Piece(disk, last_offset, length, last_start)


def _follows(
    disk: int, offset: int, length: int, start: int | None, next_disk: int, next_offset: int, next_start: int | None
) -> bool:
    """The next range continues this one, on the disk and in what is stored."""
    if disk != next_disk or offset + length != next_offset:
        return False
    if start is None or next_start is None:
        return start is next_start
    return start + length == next_start


def event_of(piece: Piece, data: memoryview) -> Event:
    """``data``: what is stored in the extent."""
    disk, offset, length, start = piece
    if start is None:
        return Zeros(disk, offset, length)
    return Data(disk, offset, data[start : start + length])
