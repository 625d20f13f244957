"""What a ``Range`` header asks for (RFC 9110, section 14), against what there is."""

from __future__ import annotations

import re
from typing import NamedTuple

from casbackup.errors import UsageError
from casbackup.limits import MAX_HTTP_RANGES

_SPEC = re.compile(r"\s*(?:bytes)\s*=(?P<set>.*)", re.IGNORECASE)
_ONE = re.compile(r"(?P<first>[0-9]{0,19})-(?P<last>[0-9]{0,19})")


class Span(NamedTuple):
    """Bytes [start, end)."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    def content_range(self, size_bytes: int) -> str:
        return f"bytes {self.start}-{self.end - 1}/{size_bytes}"


def parse_ranges(header: str, size_bytes: int) -> list[Span] | None:
    """The ranges that are there, in the order of the question; None when the header is to be ignored: it is not
    understood, and a client must be ready to get everything.

    :raise UsageError: when none of them is there, or when they are so many, or overlap so much, that nobody honest
        asks for them.
    """
    match = _SPEC.fullmatch(header)
    if match is None:
        return None
    specs = [part.strip() for part in match["set"].split(",") if part.strip()]
    if len(specs) > MAX_HTTP_RANGES:
        raise UsageError(f"more than {MAX_HTTP_RANGES} ranges in one request")
    found = [_ONE.fullmatch(spec) for spec in specs]
    parts = [(one["first"], one["last"]) for one in found if one is not None]
    if not parts or len(parts) < len(specs) or not all(_makes_sense(*part) for part in parts):
        return None
    spans = [span for part in parts if (span := _within(*part, size_bytes)) is not None]
    if not spans:
        raise UsageError(f"the range {header!r} lies outside of {size_bytes} bytes")
    if sum(span.length for span in spans) > size_bytes:
        raise UsageError("the ranges overlap")
    return spans


def _makes_sense(first: str, last: str) -> bool:
    return bool(last) if not first else not last or int(first) <= int(last)


def _within(first: str, last: str, size_bytes: int) -> Span | None:
    """A range cut to what is there; None when nothing of it is. Without a first byte, it is the last so many."""
    if not first:
        start, end = max(0, size_bytes - int(last)), size_bytes
    else:
        start, end = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
    return Span(start, end) if start < end else None
