"""A look at any place of an archive: of a file by seeking, of a pipe within what was read last."""

from __future__ import annotations

from casbackup.errors import ArchiveDamaged
from casbackup.formats.port import ByteSource
from casbackup.units import MiB

_STEP_BYTES = MiB


class Window:
    """Bytes of an archive by their offset from its beginning.

    ``damage``: what the source said of bytes that cannot be had, for instance because compressed data is damaged.
    The archive then ends there.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._buffer = bytearray(_STEP_BYTES)
        self._start = self._length = 0
        self._end: int | None = None
        if source.seekable:
            source.seek(0)
            self._end = source.size_bytes
        self.damage: ArchiveDamaged | None = None

    @property
    def end(self) -> int | None:
        """Where the archive ends; of a pipe, once that has been reached."""
        return self._end

    @property
    def can_go_back(self) -> bool:
        """To any offset."""
        return self._source.seekable

    def read(self, offset: int, length: int) -> memoryview:
        """Up to ``length`` bytes from ``offset``; fewer only at the end. Valid until the next call.

        Of a pipe, what lies before ``offset`` may be gone afterwards.
        """
        if not self._start <= offset <= self._start + self._length:
            self._move(offset)
        while (wanted := offset + length - self._start - self._length) > 0 and self._fill(offset, wanted):
            pass
        first = offset - self._start
        return memoryview(self._buffer)[first : min(first + length, self._length)]

    def _move(self, offset: int) -> None:
        """Begin a new window at ``offset``, or where the archive ends if that is before it."""
        if self._source.seekable:
            assert self._end is not None
            self._start, self._length = min(offset, self._end), 0
            self._source.seek(self._start)
            return
        assert offset > self._start, "a pipe cannot go back"
        while offset > self._start + self._length and self._skip():
            pass

    def _skip(self) -> bool:
        self._start += self._length
        self._length = 0
        return self._fill(self._start, _STEP_BYTES)

    def _fill(self, keep_from: int, wanted: int) -> bool:
        """Read more at the window's end, dropping what is before ``keep_from`` if there is no room; False at the
        end of the archive.
        """
        step = min(wanted, max(_STEP_BYTES, len(self._buffer) - self._length))
        if self._length + step > len(self._buffer):
            self._make_room(keep_from, step)
        try:
            got = self._source.read_into(memoryview(self._buffer)[self._length : self._length + step])
        except ArchiveDamaged as error:
            self.damage = error
            got = 0
        self._length += got
        if got < step:
            self._end = self._start + self._length
        return got == step

    def _make_room(self, keep_from: int, step: int) -> None:
        first = max(keep_from - self._start, 0)
        kept = self._buffer[first : self._length]
        if len(kept) + step > len(self._buffer):
            self._buffer = kept + bytes(len(kept) + step)
        else:
            self._buffer[: len(kept)] = kept
        self._start += first
        self._length = len(kept)
