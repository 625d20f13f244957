"""Places in an area of fixed size: which are taken, not what is in them."""

from __future__ import annotations

from casbackup.units import KiB, MiB

SLOT_BYTES = 4 * KiB
"""The smallest place."""
BLOCK_BYTES = 1 * MiB
"""The largest."""


class Slots:
    """An area in blocks of 1 MiB, each whole or in places of one size, a power of two from 4 KiB on.

    Places that became free last are taken first: in memory they are still in the processor's cache, and a file grows
    no further than it has to. Not for several threads at once.
    """

    def __init__(self, area_bytes: int) -> None:
        """What ``area_bytes`` has beyond whole MiB is not used."""
        self._blocks = list(range(area_bytes // BLOCK_BYTES - 1, -1, -1))
        self._sizes: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}
        self._partial: dict[int, list[int]] = {}
        self.taken_bytes = 0

    def fits(self, length: int) -> bool:
        """Whether ``take`` would find a place."""
        return bool(self._blocks or self._partial.get(rounded(length)))

    def take(self, length: int) -> int | None:
        """Where a place for ``length`` bytes begins, 1 to BLOCK_BYTES; None when there is none."""
        size = rounded(length)
        partial = self._partial.setdefault(size, [])
        if not partial:
            if not self._blocks:
                return None
            self._split(self._blocks.pop(), size)
        block = partial[-1]
        free = self._free[block]
        position = free.pop()
        if not free:
            partial.pop()
        self.taken_bytes += size
        return position

    def give_back(self, position: int) -> None:
        """Free what ``take`` gave."""
        block = position // BLOCK_BYTES
        size, free = self._sizes[block], self._free[block]
        self.taken_bytes -= size
        if not free:
            self._partial[size].append(block)
        free.append(position)
        if len(free) * size == BLOCK_BYTES:
            self._partial[size].remove(block)
            self._blocks.append(block)

    def _split(self, block: int, size: int) -> None:
        start = block * BLOCK_BYTES
        self._sizes[block] = size
        self._free[block] = list(range(start + BLOCK_BYTES - size, start - 1, -size))
        self._partial[size].append(block)


def rounded(length: int) -> int:
    """The size of the place that ``length`` bytes take."""
    assert 0 < length <= BLOCK_BYTES
    return 1 << (max(length, SLOT_BYTES) - 1).bit_length()
