"""Maps of sparse members, in the four forms that GNU tar has used (GNU tar manual, "Storing Sparse Files")."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from casbackup.formats.port import ByteRange
from casbackup.formats.tar.headers import BLOCK_BYTES, InvalidHeader, parse_decimal, parse_number
from casbackup.limits import MAX_TAR_RANGES

_OLD_AT, _OLD_ENTRIES = 386, 4
_OLD_EXTENDED_AT, _OLD_SIZE_AT = 482, 483
_MORE_ENTRIES, _MORE_EXTENDED_AT = 21, 504
_ENTRY_BYTES = 24
_LINES_AT_ONCE = 4096

ReadBlock = Callable[[], bytes]
"""The next block of the archive."""


class SparseMap:
    """Where a sparse member has data: ranges in order, without overlaps."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.data_bytes = 0
        self._end = 0
        self._flat = array("Q")

    def add(self, offset: int, length: int) -> None:
        """:raise InvalidHeader: for a range that overlaps, leaves the file, or is one too many."""
        if offset < self._end or offset + length > self.size_bytes:
            raise InvalidHeader(f"a sparse map with an impossible range [{offset}, {offset + length})")
        self._end = offset + length
        if length:
            if len(self._flat) >= 2 * MAX_TAR_RANGES:
                raise InvalidHeader(f"a sparse map of more than {MAX_TAR_RANGES} ranges")
            self._flat.extend((offset, length))
            self.data_bytes += length

    def __iter__(self) -> Iterator[ByteRange]:
        numbers = iter(self._flat)
        return map(ByteRange, numbers, numbers)


def encode_map(ranges: Iterable[ByteRange], count: int, size_bytes: int) -> Iterator[bytes]:
    """The map of form 1.0 as it stands before the data, without padding.

    A hole at the end is told by an empty range there.
    """
    lines = [str(count)]
    end = 0
    for offset, length in ranges:
        lines += (str(offset), str(length))
        end = offset + length
        if len(lines) > _LINES_AT_ONCE:
            yield _encode_lines(lines)
            lines = []
    if end < size_bytes or not size_bytes:
        lines += (str(size_bytes), "0")
    yield _encode_lines(lines)


def entry_count(ranges: Iterable[ByteRange], size_bytes: int) -> int:
    """The number that ``encode_map`` starts with."""
    count = end = 0
    for offset, length in ranges:
        count += 1
        end = offset + length
    return count + (end < size_bytes or not size_bytes)


def parse_leading_map(read_block: ReadBlock, size_bytes: int) -> SparseMap:
    """Form 1.0: in whole blocks before the data."""
    lines = _Lines(read_block)
    count = lines.next_number()
    if count > MAX_TAR_RANGES + 1:
        raise InvalidHeader(f"a sparse map of {count} ranges")
    found = SparseMap(size_bytes)
    for _ in range(count):
        found.add(lines.next_number(), lines.next_number())
    return found


def parse_numbers(numbers: Sequence[bytes], size_bytes: int) -> SparseMap:
    """Forms 0.0 and 0.1: offsets and lengths in turn, from PAX records."""
    if len(numbers) % 2:
        raise InvalidHeader("a sparse map with an offset but no length")
    found = SparseMap(size_bytes)
    for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
        found.add(parse_decimal(offset), parse_decimal(length))
    return found


def parse_old_map(header: bytes, read_block: ReadBlock) -> SparseMap:
    """GNU tar's old form: in the header, and in blocks behind it."""
    found = SparseMap(parse_number(header[_OLD_SIZE_AT : _OLD_SIZE_AT + 12]))
    more = _add_entries(found, header, _OLD_AT, _OLD_ENTRIES) and header[_OLD_EXTENDED_AT]
    while more:
        block = read_block()
        more = _add_entries(found, block, 0, _MORE_ENTRIES) and block[_MORE_EXTENDED_AT]
    return found


def _add_entries(found: SparseMap, block: bytes, at: int, count: int) -> bool:
    """False when the map ends in this block."""
    for start in range(at, at + count * _ENTRY_BYTES, _ENTRY_BYTES):
        if not block[start]:
            return False
        found.add(parse_number(block[start : start + 12]), parse_number(block[start + 12 : start + 24]))
    return True


def _encode_lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


class _Lines:
    """Numbers, one a line, from as many blocks as it takes."""

    def __init__(self, read_block: ReadBlock) -> None:
        self._read_block = read_block
        self._pending: list[bytes] = []
        self._rest = b""

    def next_number(self) -> int:
        while not self._pending:
            lines = (self._rest + self._read_block()).split(b"\n")
            self._rest = lines.pop()
            if len(self._rest) > BLOCK_BYTES:
                raise InvalidHeader("a sparse map without line feeds")
            self._pending = lines[::-1]
        return parse_decimal(self._pending.pop())
