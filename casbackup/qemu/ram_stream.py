"""Where the pages are in the stream of a migration, so that they can be stored as pages.

Between the pages stand their addresses, so that no page begins where a block of a disk would, and what is saved twice
has nothing in common. Of the stream's format only this is needed (``migration/ram.c`` of QEMU): a record
begins with a big-endian number of 64 bits, an address of pages of 4 KiB with flags in its lowest 12 bits:

    PAGE      0x08    4096 bytes follow
    ZERO      0x02    one byte follows
    CONTINUE  0x20    of the same block of memory as the record before; without it a byte with the length of the
                      block's name and the name come first
    EOS       0x10    the end of a section: a footer of 5 bytes follows, and then the 5 bytes of the next one's header

Nothing depends on getting it right but how well memory is deduplicated. Whatever is not understood is passed over.
"""

from __future__ import annotations

import re

from casbackup.buffers import ByteBuffer
from casbackup.limits import BLOCK_BYTES

STREAM_MAGIC = b"QEVM"
"""A stream begins with it."""
_HEADER_BYTES = 8
_PAGE, _ZERO, _EOS, _CONTINUE = 0x08, 0x02, 0x10, 0x20
_FLAGS = frozenset({_PAGE, _ZERO, _EOS, _PAGE | _CONTINUE, _ZERO | _CONTINUE})
_ADDRESS = rb"\0\0[\s\S]{4}[\0\x10\x20\x30\x40\x50\x60\x70\x80\x90\xa0\xb0\xc0\xd0\xe0\xf0]"
"""Of a multiple of 4 KiB below 2^48, all bytes but the last."""
_END_OF_HEADER = re.compile(rb"[\x28\x22]")
_ZERO_RECORDS = re.compile(rb"(?:" + _ADDRESS + rb"\x22\0)++")
_TWO_ZERO_RECORDS = re.compile(rb"(?:" + _ADDRESS + rb"\x22\0){2}")
_SECTION = re.compile(rb"\0{7}\x10\x7e[\s\S]{4}[\x02\x03][\s\S]{4}")
_MOST_TRIES = 50_000
"""Places in one piece where a record might begin; one that has more of them is not a stream of memory."""


def page_offsets(stream: ByteBuffer, length: int) -> list[int]:
    """Where pages begin that are whole in the first ``length`` bytes of ``stream``, a piece cut out anywhere.

    Ascending; neighbours in the guest's memory are mostly neighbours here, too.
    """
    found: list[int] = []
    position, tries = 0, 0
    while position + _HEADER_BYTES <= length:
        page = _page_at(stream, position, length)
        if page is not None:
            found.append(page)
            position = page + BLOCK_BYTES
        elif other := _ZERO_RECORDS.match(stream, position, length) or _SECTION.match(stream, position, length):
            position = other.end()
        else:
            position, tries = _next_record(stream, position + 1, length, tries)
    return found


def _page_at(stream: ByteBuffer, position: int, length: int) -> int | None:
    """Where the page of the record at ``position`` begins; None if that is not the record of a page, or it is cut."""
    flags = _flags_at(stream, position)
    page = position + _HEADER_BYTES
    if flags == _PAGE and page < length:
        page += 1 + stream[page]
    elif flags != _PAGE | _CONTINUE:
        return None
    end = page + BLOCK_BYTES
    if end > length or (end + _HEADER_BYTES <= length and _flags_at(stream, end) not in _FLAGS):
        return None
    return page


def _flags_at(stream: ByteBuffer, position: int) -> int | None:
    """Those of a record that begins there; None if none can."""
    if stream[position] or stream[position + 1] or stream[position + 6] & 0x0F:
        return None
    return stream[position + 7]


def _next_record(stream: ByteBuffer, position: int, length: int, tries: int) -> tuple[int, int]:
    """Where one begins that is followed by another, ``length`` if there is none; and how often was tried by now."""
    for match in _END_OF_HEADER.finditer(stream, position + _HEADER_BYTES - 1, length):
        tries += 1
        if tries > _MOST_TRIES:
            break
        start = match.start() - _HEADER_BYTES + 1
        if _page_at(stream, start, length) is not None or _TWO_ZERO_RECORDS.match(stream, start, length):
            return start, tries
    return length, tries
