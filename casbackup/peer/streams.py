"""Who reads a disk from front to back, and what such a reader will want next. Does no I/O and keeps no data."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from casbackup.limits import SEGMENT_BYTES
from casbackup.units import MiB

_SEQUENTIAL_BYTES = 1 * MiB
"""Read in order before anything is fetched ahead: more than a guest's file system reads at a place by chance."""
_STEP_BYTES = 4 * MiB
"""For each of these that was read in order, one segment more is fetched ahead."""
_READERS = 8
"""That are remembered, the least recent forgotten: connections of a program that copies, and some at random."""


@dataclass(slots=True)
class _Reader:
    """``segment``: where it is now. ``position``: the end of what it has read there. ``ahead``: on their way."""

    segment: int
    position: int
    read_bytes: int = 0
    ahead: list[int] = field(default_factory=list)

    @property
    def is_sequential(self) -> bool:
        return self.read_bytes >= _SEQUENTIAL_BYTES


class Streams:
    """One disk's readers: who reads where a read ended, holes left out, is taken for the same one."""

    def __init__(self, next_data: Callable[[int], int | None], most_ahead: int) -> None:
        """``next_data``: the first segment from a number on that may hold data.

        ``most_ahead``: segments that may be ahead of all readers together; each sequential one gets at least one.
        """
        self._next_data = next_data
        self._most_ahead = most_ahead
        self._readers: list[_Reader] = []
        self._lock = threading.Lock()

    def note(self, offset: int, length: int) -> list[int]:
        """Somebody reads that range now. Returns the segments to fetch ahead, each told once a reader."""
        with self._lock:
            reader = self._reader(offset // SEGMENT_BYTES, offset)
            if offset >= reader.position:  # what is read again, or backwards, tells nothing
                reader.read_bytes += length
                reader.position = offset + length
            last = (offset + length - 1) // SEGMENT_BYTES
            if last > reader.segment:
                self._move(reader, last)
            return self._extend(reader) if reader.is_sequential else []

    def _reader(self, segment: int, offset: int) -> _Reader:
        """The reader that is there already, or comes there next, or a new one; it becomes the most recent."""
        found = next((r for r in self._readers if r.segment == segment), None)
        if found is None:
            found = next((r for r in self._readers if self._expects(r, segment)), None)
            if found is None:
                found = _Reader(segment, offset)
            else:
                self._move(found, segment)
        if found in self._readers:
            self._readers.remove(found)
        self._readers = [found, *self._readers[: _READERS - 1]]
        return found

    def _expects(self, reader: _Reader, segment: int) -> bool:
        return segment in reader.ahead or self._next_data(reader.segment + 1) == segment

    def _move(self, reader: _Reader, segment: int) -> None:
        reader.segment = segment
        reader.ahead = [number for number in reader.ahead if number > segment]

    def _extend(self, reader: _Reader) -> list[int]:
        share = self._most_ahead // sum(r.is_sequential for r in self._readers)
        depth = max(1, min(share, reader.read_bytes // _STEP_BYTES))
        new: list[int] = []
        while len(reader.ahead) < depth:
            number = self._next_data((reader.ahead[-1] if reader.ahead else reader.segment) + 1)
            if number is None:
                break
            reader.ahead.append(number)
            new.append(number)
        return new
