"""Time comes in through this port, so that tests decide what time it is."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol

from casbackup.errors import InvalidSize


class Clock(Protocol):
    """Wall clock and monotonic clock. The wall clock may jump in any direction; nothing may lose data by it."""

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01T00:00:00Z."""

    def monotonic_s(self) -> float:
        """Seconds since some start; never goes backwards."""


class SystemClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        return time.monotonic()


def format_time(time_ms: int) -> str:
    """RFC 3339 in UTC with milliseconds, ``2026-11-22T20:00:00.123Z``; sorts like the time."""
    moment = datetime.fromtimestamp(time_ms // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ms % 1000:03}Z"


def parse_time(text: str) -> int:
    """Milliseconds of an RFC 3339 time; without a zone it is UTC.

    :raise InvalidSize: when the text is not a time.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidSize(f"{text!r} is not a time") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)
