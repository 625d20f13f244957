"""The VMA archive of Proxmox VE: an archive header, then extents until the end of the file (``docs/spec/vma.md``).

Integers are big-endian, except the lengths of blobs. A device is cut into clusters of 64 KiB; each has one slot in
one extent, which says which of its 16 blocks are stored. MD5 covers headers only: data has no checksum.
"""

from __future__ import annotations

from hashlib import md5
from struct import Struct

from casbackup.fs import Buffer
from casbackup.units import KiB, MiB

BLOCK_BYTES = 4 * KiB
CLUSTER_BLOCKS = 16
CLUSTER_BYTES = CLUSTER_BLOCKS * BLOCK_BYTES
SECTOR_BYTES = 512

MAGIC = b"VMA\0"
VERSION = 1
HEADER = Struct(">4sI16sq16sIII1984x")
"""magic, version, uuid, time in Unix seconds, md5, offset and size of the blob buffer, bytes of the whole header."""
CONFIGS = 256
CONFIG_POINTERS = Struct(f">{CONFIGS}I")
CONFIG_NAMES_OFFSET = HEADER.size
CONFIG_CONTENTS_OFFSET = CONFIG_NAMES_OFFSET + CONFIG_POINTERS.size
DEVICES_OFFSET = 4096
DEVICE_SLOTS = 256
DEVICE = Struct(">I4xQ16x")
"""pointer to the name, size in bytes. The place in the table is the device's id; id 0 means "no device"."""
FIXED_BYTES = DEVICES_OFFSET + DEVICE_SLOTS * DEVICE.size
"""The header up to the blob buffer."""
MD5_OFFSET, MD5_BYTES = 32, 16

BLOB_LENGTH = Struct("<H")
MAX_BLOB_BYTES = 0xFFFF
FIRST_BLOB = 1
"""Pointers are offsets in the blob buffer of a blob's length; 0 means "none", so byte 0 is padding."""

MAX_DEVICES = 254
"""Slot 255 can be written, but the reference program's reader does not look at it."""
STATE_NAME = "vmstate"
"""The device of this name is the VM's state: its clusters come in order."""
MAX_DEVICE_BYTES = CLUSTER_BYTES << 32
"""Cluster numbers have 32 bits."""

MAX_WRITTEN_HEADER_BYTES = 512 * KiB
"""The largest header that the reference program writes."""
MAX_HEADER_BYTES = 64 * MiB
"""The largest that is read: more than all pointers of a header can use."""

EXTENT_MAGIC = b"VMAE"
EXTENT = Struct(">4sHH16s16s")
"""magic, reserved, number of blocks that follow, uuid, md5; then the slots."""
EXTENT_MD5_OFFSET = 24
SLOTS = 59
SLOT_TABLE = Struct(f">{SLOTS}Q")
"""Each: mask of stored blocks (16 bits, the lowest is the first block), reserved (8), device (8), cluster (32)."""
WRITTEN_SLOTS = 58
"""The reference program leaves the last slot empty."""
EXTENT_BYTES = EXTENT.size + SLOT_TABLE.size
MAX_EXTENT_BLOCKS = SLOTS * CLUSTER_BLOCKS
FULL_MASK = 0xFFFF


def header_checksum(header: Buffer) -> bytes:
    """The MD5 of a whole archive header, its own field taken as zero."""
    return _checksum(memoryview(header), MD5_OFFSET)


def extent_checksum(header: Buffer) -> bytes:
    """The MD5 of the 512 bytes of an extent's header, its own field taken as zero."""
    return _checksum(memoryview(header), EXTENT_MD5_OFFSET)


def slot(mask: int, device_id: int, cluster: int) -> int:
    return mask << 48 | device_id << 32 | cluster


def _checksum(header: memoryview, place: int) -> bytes:
    state = md5(header[:place], usedforsecurity=False)
    state.update(bytes(MD5_BYTES))
    state.update(header[place + MD5_BYTES :])
    return state.digest()
