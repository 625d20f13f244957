"""Options of writers, whose values come from a command line as text."""

from __future__ import annotations

from collections.abc import Sequence

from casbackup.errors import UsageError


def chosen(option: str, value: object, choices: Sequence[str]) -> str:
    """:raise UsageError: unless ``value`` is one of the choices."""
    if value not in choices:
        raise UsageError(f"{option} is {value!r}; it may be {', '.join(choices)}")
    return str(value)


def whole_number(option: str, value: object, allowed: range) -> int:
    """:raise UsageError: unless ``value`` is a number within ``allowed``, or its digits."""
    text = str(value)
    if not text.isdecimal() or len(text) > 9 or int(text) not in allowed:
        raise UsageError(f"{option} is {value!r}; it may be {allowed[0]} to {allowed[-1]}")
    return int(text)
