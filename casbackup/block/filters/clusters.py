"""A state for each cluster of a device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from casbackup.units import KiB

CLUSTER_BYTES = 64 * KiB
"""The unit of QEMU, VMA and dirty bitmaps."""

_RUN = re.compile(rb"\x00+|\x01+|\x02+")


class Run(NamedTuple):
    """Neighbouring clusters of one state, ``first`` up to but without ``stop``."""

    state: int
    first: int
    stop: int


class ClusterMap:
    """One byte a cluster, 0 to begin with; 16 MiB for a disk of 1 TiB, of which only touched pages exist.

    A bytearray of one-byte states is searched by C code: finding the next cluster of a state costs nothing.
    Single operations are atomic in CPython, which the filters' fast paths rely on.
    """

    def __init__(self, size_bytes: int, cluster_bytes: int = CLUSTER_BYTES) -> None:
        self.cluster_bytes = cluster_bytes
        self._size_bytes = size_bytes
        self._states = bytearray(-(-size_bytes // cluster_bytes))

    def __len__(self) -> int:
        return len(self._states)

    def touching(self, offset: int, length: int) -> tuple[int, int]:
        """The first cluster that has bytes of the range, and the one after the last."""
        return offset // self.cluster_bytes, -(-(offset + length) // self.cluster_bytes)

    def within(self, offset: int, length: int) -> tuple[int, int]:
        """The same for the clusters that lie wholly within the range; both may be equal, or none."""
        end = offset + length
        stop = len(self._states) if end == self._size_bytes else end // self.cluster_bytes
        first = -(-offset // self.cluster_bytes)
        return first, max(first, stop)

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """(offset, length) of clusters in bytes; the last cluster of the device may be short."""
        offset = first * self.cluster_bytes
        return offset, min(stop * self.cluster_bytes, self._size_bytes) - offset

    def any(self, state: int, first: int, stop: int) -> bool:
        """Whether one of the clusters has the state."""
        return self._states.find(state, first, stop) >= 0

    def count(self, state: int) -> int:
        return self._states.count(state)

    def next(self, state: int, start: int) -> int | None:
        """The first cluster from ``start`` on that has the state."""
        found = self._states.find(state, start)
        return None if found < 0 else found

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """The clusters as runs of one state, each taken when the iterator comes to it."""
        while first < stop:
            run = self.run_at(first, stop)
            yield run
            first = run.stop

    def run_at(self, first: int, stop: int) -> Run:
        """The run that begins with ``first`` and ends before ``stop`` at the latest."""
        found = _RUN.match(self._states, first, stop)
        assert found is not None, "a state beyond 2"
        return Run(self._states[first], first, found.end())

    def mark(self, state: int, first: int, stop: int) -> None:
        self._states[first:stop] = bytes((state,)) * (stop - first)


def clipped(offset: int, length: int, start: int, stop: int) -> tuple[int, int]:
    """(offset, length) of what the range has in common with ``start`` to ``stop``, all in bytes."""
    first = max(offset, start)
    return first, min(offset + length, stop) - first
