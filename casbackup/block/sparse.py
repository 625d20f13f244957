"""Devices of any size that take room only for what is written to them: scratch space for filters."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator

from casbackup.block.device import Capabilities, Closing, Extent, merged
from casbackup.block.rawfile import RawFile
from casbackup.errors import TargetUnwritable
from casbackup.fs import Buffer
from casbackup.units import KiB

_CLUSTER_BYTES = 64 * KiB


class SparseMemory(Closing):
    """Zeros, but for the clusters of 64 KiB that were written to. Zeroing or discarding whole ones frees them."""

    def __init__(self, size_bytes: int, *, limit_bytes: int | None = None) -> None:
        """``limit_bytes``: so much of it may hold data at a time; None: all of it."""
        self.size_bytes = size_bytes
        self.capabilities = Capabilities(
            writable=True,
            can_write_zeros=True,
            zero_is_cheap=True,
            can_trim=True,
            knows_zeros=True,
            multi_conn=True,
            preferred_block_bytes=_CLUSTER_BYTES,
        )
        self._limit_clusters = None if limit_bytes is None else limit_bytes // _CLUSTER_BYTES
        self._clusters: dict[int, bytearray] = {}
        self._adding = threading.Lock()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for number, start, stop, at in _pieces(offset, len(buffer)):
            cluster = self._clusters.get(number)
            piece = bytes(stop - start) if cluster is None else memoryview(cluster)[start:stop]
            buffer[at : at + stop - start] = piece

    def write(self, offset: int, data: Buffer) -> None:
        """:raise TargetUnwritable: at the limit."""
        view = memoryview(data)
        for number, start, stop, at in _pieces(offset, len(view)):
            self._cluster(number)[start:stop] = view[at : at + stop - start]

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        end = offset + length
        for number in self._present(offset, end):
            first = number * _CLUSTER_BYTES
            start, stop = max(first, offset), min(first + _CLUSTER_BYTES, end)
            if stop - start == min(_CLUSTER_BYTES, self.size_bytes - first):
                self._clusters.pop(number, None)
            elif (cluster := self._clusters.get(number)) is not None:
                cluster[start - first : stop - first] = bytes(stop - start)

    def discard(self, offset: int, length: int) -> None:
        self.write_zeros(offset, length)

    def flush(self) -> None:
        """Nothing here survives a crash, so there is nothing to do."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return merged(self._spans(offset, offset + length))

    def changed_size(self) -> int | None:
        return None

    def close(self) -> None:
        self._clusters = {}

    def used_bytes(self) -> int:
        """What the clusters take, in bytes."""
        return len(self._clusters) * _CLUSTER_BYTES

    def _cluster(self, number: int) -> bytearray:
        found = self._clusters.get(number)
        if found is not None:
            return found
        with self._adding:
            if self._limit_clusters is not None and len(self._clusters) >= self._limit_clusters:
                raise TargetUnwritable(
                    f"the limit of {self._limit_clusters * _CLUSTER_BYTES} bytes of memory is reached"
                )
            return self._clusters.setdefault(number, bytearray(_CLUSTER_BYTES))

    def _present(self, start: int, end: int) -> list[int]:
        """Clusters with data that touch the range, in order. Costs the smaller of their number and the range's."""
        numbers = range(start // _CLUSTER_BYTES, -(-end // _CLUSTER_BYTES))
        if len(numbers) <= len(self._clusters):
            return [number for number in numbers if number in self._clusters]
        return sorted(number for number in list(self._clusters) if number in numbers)

    def _spans(self, position: int, end: int) -> Iterator[Extent]:
        for number in self._present(position, end):
            start = max(number * _CLUSTER_BYTES, position)
            stop = min((number + 1) * _CLUSTER_BYTES, end)
            if start > position:
                yield Extent(position, start - position, True)
            yield Extent(start, stop - start, False)
            position = stop
        if position < end:
            yield Extent(position, end - position, True)


def temporary_device(size_bytes: int, folder: str | None = None) -> RawFile:
    """A sparse file without a name in ``folder``, or where temporary files go. It is gone when it is closed.

    :raise TargetUnwritable: when it cannot be made, for instance because such a file would be too large.
    """
    place = folder or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(prefix="casbackup-", dir=place, buffering=0) as file:
            file.truncate(size_bytes)
            descriptor = os.dup(file.fileno())
    except OSError as error:
        raise TargetUnwritable(f"{place}: no temporary file of {size_bytes} bytes: {error.strerror}") from error
    return RawFile(descriptor, f"a temporary file in {place}", writable=True)


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """(cluster, start and stop within it, position within the range) of a range's pieces."""
    at = 0
    while at < length:
        number, start = divmod(offset + at, _CLUSTER_BYTES)
        stop = min(_CLUSTER_BYTES, start + length - at)
        yield number, start, stop, at
        at += stop - start
