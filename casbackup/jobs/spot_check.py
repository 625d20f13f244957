"""Whether a dirty bitmap tells the truth: samples of what it calls unchanged are compared with what is stored.

The samples are read shortly before the point in time. What the increment does not bring afterwards has not been written
between the snapshot before and that point, so it must have been then what it is in that snapshot. Nearly everything is
compared by its hash alone; only slices of chunks are fetched.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from casbackup.block.device import BlockDevice
from casbackup.codec.hashing import IdKeys
from casbackup.errors import DataDamage
from casbackup.formats.coverage import Coverage
from casbackup.limits import BLOCK_BYTES, SEGMENT_BYTES
from casbackup.peer.disk import BlobCache
from casbackup.spec.node import Extent
from casbackup.spec.record import BlobKind
from casbackup.tree.reader import DiskTree
from casbackup.units import MiB

_MOST_DIFFERENCES_BYTES = 256 * MiB
"""Of differences that are remembered; where there are more, any of them is likely to show."""


class _Difference(NamedTuple):
    """A range that reads differently from what is stored. Perhaps it was changed, and comes with the increment."""

    disk: int
    offset: int
    length: int


class SpotCheck:
    """``sample`` before the point in time, ``contradiction`` when the increment is here."""

    def __init__(self, share: float, cache: BlobCache, ids: IdKeys, rng: random.Random | None = None) -> None:
        """``share``: of each disk that is sampled, 0 to 1."""
        self._share = share
        self._cache = cache
        self._ids = ids
        self._rng = rng or random.SystemRandom()
        self._differences: list[_Difference] = []
        self._differing_bytes = 0
        self._buffer = memoryview(bytearray(SEGMENT_BYTES))

    def sample(self, disk: int, base: DiskTree, device: BlockDevice) -> int:
        """Compare some segments of a disk with the snapshot before; returns how many bytes."""
        segments = math.ceil(device.size_bytes / SEGMENT_BYTES)
        chosen = self._rng.sample(range(segments), math.ceil(segments * self._share))
        return sum(self._compare(disk, number, base, device) for number in sorted(chosen))

    def contradiction(self, disk: int, brought: Coverage) -> tuple[int, int] | None:
        """(offset, length) of something that differed although the increment did not bring it; None: all is well.

        ``brought``: what it did bring. It is changed, and of no use afterwards.
        """
        for difference in self._differences:
            if difference.disk == disk:
                before = brought.add(difference.offset, difference.length)
                if sum(item.length for item in before) < difference.length:
                    return difference.offset, difference.length
        return None

    def _compare(self, disk: int, number: int, base: DiskTree, device: BlockDevice) -> int:
        start = number * SEGMENT_BYTES
        length = min(SEGMENT_BYTES, device.size_bytes - start)
        view = self._buffer[:length]
        device.read_into(start, view)
        for offset, extent in base.extents(start, start + length):
            data = view[offset - start : offset - start + extent.length]
            if self._differing_bytes < _MOST_DIFFERENCES_BYTES and not self._is_stored(data, extent):
                self._note(disk, offset, data, extent)
        return length

    def _is_stored(self, data: memoryview, extent: Extent) -> bool:
        if extent.is_zero:
            return data == bytes(extent.length)
        return self._ids.id(BlobKind.CHUNK, data) == extent.id or data == self._stored(extent)

    def _stored(self, extent: Extent) -> memoryview:
        """:raise DataDamage: when it is lost."""
        if extent.is_zero:
            return memoryview(bytes(extent.length))
        plain = self._cache.get([extent.id])[extent.id]
        if isinstance(plain, DataDamage):
            raise plain
        return memoryview(plain)[extent.skip : extent.skip + extent.length]

    def _note(self, disk: int, offset: int, data: memoryview, extent: Extent) -> None:
        """Remember what differs, block by block: chunks are larger than the clusters of a bitmap."""
        stored = self._stored(extent)
        for start in range(0, extent.length, BLOCK_BYTES):
            if data[start : start + BLOCK_BYTES] != stored[start : start + BLOCK_BYTES]:
                length = min(BLOCK_BYTES, extent.length - start)
                self._differences.append(_Difference(disk, offset + start, length))
                self._differing_bytes += length
