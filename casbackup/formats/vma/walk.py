"""From extent to extent through an archive that may be damaged: what is sound is found again behind what is not.

An extent is expected where the one before ends. Where none is, the next one is searched for byte by byte: by the
magic or the uuid, and then by the checksum of its header, which proves it, if need be after putting right what was
flipped in it. The search begins within the extent before, since bytes of it may have been lost. So no damage costs
more than the extents that it touches.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from casbackup.formats.vma.extent import Extent, parse_extent
from casbackup.formats.vma.header import Header, Problem, examine_header
from casbackup.formats.vma.mend import mended_extent
from casbackup.formats.vma.window import Window
from casbackup.spec import vma
from casbackup.units import MiB


class Found(NamedTuple):
    """An extent. ``data_bytes``: how much of its data is there, from ``offset`` + 512 on.

    ``is_shifted``: bytes were lost somewhere in its data, not at the archive's end. ``mended_at``: the byte of its
    header that was wrong and could be put right.
    """

    offset: int
    extent: Extent
    data_bytes: int = 0
    is_shifted: bool = False
    mended_at: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.data_bytes >= self.extent.mask_blocks * vma.BLOCK_BYTES


class Lost(NamedTuple):
    """Bytes that are no extent of this archive."""

    offset: int
    length: int
    code: str
    text: str


Uuids = set[bytes] | None
"""Those of extents to look for; None: any."""

SECOND_ARCHIVE = "second-archive"

_UUID_OFFSET = 8
"""Of the uuid in an extent's header."""

_SEARCH_BYTES = MiB
_MAX_MAGIC_BITS = 4


@dataclass(frozen=True, slots=True)
class Opening:
    """What an archive begins with. ``header`` None: nothing that could be one. ``extents_at``: where to go on."""

    header: Header | None
    problems: tuple[Problem, ...]
    data: bytes
    extents_at: int

    @property
    def has_checksum(self) -> bool:
        """The header's checksum holds, so it says what its writer wrote."""
        return self.header is not None and "header-checksum" not in (problem.code for problem in self.problems)

    @property
    def uuids(self) -> set[bytes]:
        """For ``walk``; without a header it learns the uuid from the first extent."""
        return {self.header.uuid} if self.header is not None else set()


def opening(window: Window) -> Opening:
    """Look at the header, however damaged it is. Extents begin where it says, else where the first one is found."""
    data = bytes(window.read(0, vma.FIXED_BYTES))
    size = vma.HEADER.unpack_from(data)[-1] if len(data) == vma.FIXED_BYTES else 0
    if data.startswith(vma.MAGIC) and vma.FIXED_BYTES < size <= vma.MAX_HEADER_BYTES:
        whole = bytes(window.read(0, size))
        header, problems = examine_header(whole) if len(whole) == size else (None, [])
        if header is not None and "header-checksum" not in (problem.code for problem in problems):
            return Opening(header, tuple(problems), whole, size)
    return _damaged_opening(window)


def _damaged_opening(window: Window) -> Opening:
    data = bytes(window.read(0, vma.MAX_WRITTEN_HEADER_BYTES))
    first = _next_extent(window, 0, None, None)
    end = first if first is not None else window.end or 0
    data = data[:end]
    if len(data) < vma.FIXED_BYTES:
        text = f"the archive's header is missing or cut off: {len(data)} bytes of it are there"
        return Opening(None, (Problem("header-truncated", text, 0),), data, end)
    if not looks_like_header(data):
        text = f"it does not begin like a VMA archive, but with {data[:4].hex(' ')}"
        return Opening(None, (Problem("header-magic", text, 0),), data, end)
    header, problems = examine_header(data)
    return Opening(header, tuple(problems), data, end)


def looks_like_header(data: bytes) -> bool:
    """It begins like an archive, give or take some flipped bits."""
    differing = zip(data, vma.MAGIC, strict=False)
    return sum((a ^ b).bit_count() for a, b in differing) <= _MAX_MAGIC_BITS


def walk(window: Window, start: int, uuids: Uuids, *, whole: bool) -> Iterator[Found | Lost]:
    """Everything from ``start`` to the archive's end, in order, without gaps.

    ``uuids``: of extents that are accepted where they are not expected; None: any. Those of extents that are found
    where they are expected are added. ``whole``: each extent's data is in the window when the extent is given.
    """
    position = start
    while header := window.read(position, vma.EXTENT_BYTES):
        found = _extent_at(position, header, uuids)
        if isinstance(found, str):
            lost = _lost(window, position, found, uuids)
            yield lost
            position += lost.length
            continue
        position = yield from _found(window, found, uuids, whole=whole)


def _extent_at(offset: int, header: memoryview, uuids: Uuids) -> Found | str:
    """The extent there, without its data, or what is wrong."""
    if len(header) < vma.EXTENT_BYTES:
        return f"the archive ends within an extent's header, after {len(header)} bytes"
    extent = parse_extent(header)
    if not isinstance(extent, str):
        return Found(offset, extent)
    for uuid in uuids or ():
        mended = mended_extent(bytes(header), uuid)
        right = parse_extent(memoryview(mended.header)) if mended is not None else extent
        if mended is not None and not isinstance(right, str):
            return Found(offset, right, mended_at=mended.place)
    return extent


def _found(window: Window, found: Found, uuids: Uuids, *, whole: bool) -> Generator[Found, None, int]:
    """Gives the extent with its data; returns where to go on."""
    if uuids is not None:
        uuids.add(found.extent.uuid)
    data_at = found.offset + vma.EXTENT_BYTES
    stored = found.extent.mask_blocks * vma.BLOCK_BYTES
    end = data_at + stored
    base = found.offset if whole or not window.can_go_back else None
    ends = dict.fromkeys((end, data_at + min(found.extent.block_count, vma.MAX_EXTENT_BLOCKS) * vma.BLOCK_BYTES))
    fitting = next((place for place in ends if _is_boundary(window, base, place)), None)
    if fitting is None:
        fitting = _next_extent(window, data_at, end, uuids)
    if fitting is None:
        fitting = min(end, window.end if window.end is not None else end)
    yield found._replace(data_bytes=min(fitting - data_at, stored), is_shifted=fitting < min(end, window.end or end))
    return fitting


def _is_boundary(window: Window, keep_from: int | None, offset: int) -> bool:
    """An extent or another archive begins at ``offset``, or the archive ends. ``keep_from``: all from there on stays
    in the window.
    """
    start = offset if keep_from is None else keep_from
    header = window.read(start, offset - start + vma.EXTENT_BYTES)[offset - start :]
    if not header:
        return window.end == offset
    if len(header) < vma.EXTENT_BYTES:
        return False
    return not isinstance(parse_extent(header), str) or bytes(header[:4]) == vma.MAGIC


def _lost(window: Window, offset: int, text: str, uuids: Uuids) -> Lost:
    begin = bytes(window.read(offset, vma.FIXED_BYTES))
    header_bytes = _sound_header_bytes(window, offset, begin)
    if header_bytes:
        return Lost(offset, header_bytes, SECOND_ARCHIVE, "another archive begins here")
    place = _next_extent(window, offset + 1, None, uuids)
    end = place if place is not None else window.end or offset
    if begin.startswith(vma.EXTENT_MAGIC):
        return Lost(offset, end - offset, "extent-damaged", text)
    where = "follow the last extent" if place is None else "stand between two extents"
    return Lost(offset, end - offset, "trailing-data" if place is None else "junk", f"bytes that are no extent {where}")


def _sound_header_bytes(window: Window, offset: int, begin: bytes) -> int:
    """The size of the archive header that is there, ``begin`` being its beginning; 0 if there is none."""
    if not begin.startswith(vma.MAGIC) or len(begin) < vma.FIXED_BYTES:
        return 0
    *_, checksum, _, _, size = vma.HEADER.unpack_from(begin)
    if not vma.FIXED_BYTES < size <= vma.MAX_HEADER_BYTES:
        return 0
    data = window.read(offset, size)
    return size if len(data) == size and vma.header_checksum(data) == checksum else 0


def _next_extent(window: Window, offset: int, stop: int | None, uuids: Uuids) -> int | None:
    """Where an extent's header that is sound, or can be put right, begins next, in [offset, stop)."""
    while stop is None or offset < stop:
        end = offset + _SEARCH_BYTES if stop is None else min(offset + _SEARCH_BYTES, stop)
        for place in _candidates(window, offset, end, uuids):
            header = window.read(place, vma.EXTENT_BYTES)
            if len(header) == vma.EXTENT_BYTES:
                found = _extent_at(place, header, uuids)
                if not isinstance(found, str) and (uuids is None or found.extent.uuid in uuids):
                    return place
        if window.end is not None and end >= window.end:
            return None
        offset = end
    return None


def _candidates(window: Window, start: int, end: int, uuids: Uuids) -> list[int]:
    """Places in [start, end) that have an extent's magic, or a uuid where an extent has it. All is in the window."""
    view = window.read(start, end - start + vma.EXTENT_BYTES)
    data, found = bytes(view), set[int]()
    for needle, place in ((vma.EXTENT_MAGIC, 0), *((uuid, _UUID_OFFSET) for uuid in uuids or ())):
        at = data.find(needle, place)
        while at >= 0:
            if at - place < end - start:
                found.add(start + at - place)
            at = data.find(needle, at + 1)
    return sorted(found)
