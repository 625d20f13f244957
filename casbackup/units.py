"""Sizes, durations and percentages: constants, parsing, printing."""

from __future__ import annotations

import re

from casbackup.errors import InvalidSize

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|m|h|d|w)\s*")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_size(text: str) -> int:
    """Bytes of ``64MiB``, ``1.5G``, ``4096``. Prefixes are powers of 1024, with or without the ``i``.

    :raise InvalidSize: when the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidSize(f"{text!r} is not a size")
    factor = 1024 ** " kmgtp".index(match[2].lower() or " ")
    return int(float(match[1]) * factor)


def parse_duration(text: str) -> float:
    """Seconds of ``30s``, ``10m``, ``2h``, ``7d``, ``1w``.

    :raise InvalidSize: when the text is not a duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise InvalidSize(f"{text!r} is not a duration")
    return float(match[1]) * _SECONDS[match[2]]


def parse_percentage(text: str) -> float:
    """The number of ``5%`` or ``5``, within 0 < p <= 100.

    :raise InvalidSize: when the text is not such a percentage.
    """
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        raise InvalidSize(f"{text!r} is not a percentage") from None
    if not 0 < value <= 100:
        raise InvalidSize(f"{text!r} is not a percentage above 0 and up to 100")
    return value


def format_size(size_bytes: float) -> str:
    """A size for people: ``0 B``, ``1.50 GiB``; three significant digits."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000:
            break
        value /= 1024
    else:
        unit = "PiB"
    if unit == "B":
        return f"{int(value)} B"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"


def format_duration(seconds: float) -> str:
    """A duration for people: ``0.42 s``, ``3:07``, ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
