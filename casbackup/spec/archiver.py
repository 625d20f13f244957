"""The stream between casbackup and an external archiver (``docs/spec/archiver.md``): a magic, then frames.

off len field               (little-endian)
  0   1 type                1 head, 2 data, 3 zeros, 4 end, 5 error
  1   1 reserved            zero
  2   2 disk                place in the head's list of disks, from 0 on; data and zeros only
  4   4 reserved            zero
  8   8 offset              of the disk, in bytes; data and zeros only
 16   8 length              head, data, error: bytes that follow; zeros: bytes of the disk
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from casbackup.units import MiB

MAGIC = b"casarch1"
FRAME = Struct("<BxH4xQQ")
MAX_HEAD_BYTES = 64 * MiB
MAX_DATA_BYTES = 16 * MiB
MAX_ERROR_BYTES = 2000
"""So that an error fits into a pipe that has any room."""
MAX_DISKS = 1 << 16


class FrameType(IntEnum):
    HEAD = 1
    DATA = 2
    ZEROS = 3
    END = 4
    ERROR = 5
