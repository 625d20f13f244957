"""Every limit of casbackup in one table. ``docs/reference/limits.md`` is generated from here."""

from __future__ import annotations

from casbackup.units import GiB, KiB, MiB, TiB

BLOCK_BYTES = 4 * KiB
"""The unit of chunk boundaries: guest file systems allocate in blocks of this size."""

SEGMENT_BYTES = 4 * MiB
"""A leaf of the disk tree; chunks never cross it."""

SEGMENT_BLOCKS = SEGMENT_BYTES // BLOCK_BYTES

FANOUT = 256
"""Children of an inner node of the disk tree."""

MAX_LEVEL = 4
"""Levels of inner nodes: 4 MiB * 256**4 = 16 PiB, beyond the largest disk."""

MAX_DISK_BYTES = 1024 * TiB
"""The largest disk."""

MAX_DISKS = 254
"""Disks of one snapshot; the limit of the VMA format, so that every snapshot can be exported."""

MAX_CONFIGS = 256
MAX_CONFIG_BYTES = 16 * MiB
MAX_LABELS = 64
MAX_NOTES_BYTES = 64 * KiB

MAX_BLOB_BYTES = 16 * MiB
"""Plain size of one blob; chunks are far smaller, config blobs may reach it."""

PACK_BYTES = 64 * MiB
"""A pack is sealed once it holds this much."""

MAX_PACK_BYTES = 2 * GiB
"""Offsets within a pack are 32-bit."""

MAX_MANIFEST_BYTES = 4 * MiB
MAX_INDEX_BYTES = 4 * TiB
INITIAL_INDEX_MAP_BYTES = 256 * MiB

INDEX_BATCH_ENTRIES = 50_000
"""Entries that one index transaction changes at the most, so that other writers get their turn."""
