"""The option for the memory of commands that serve snapshots."""

from __future__ import annotations

import click

from casbackup.errors import InvalidSize

cache_option = click.option("--cache", metavar="SIZE", help="Memory for chunks; default: 128MiB.")


def parse_cache(text: str | None) -> int:
    """Bytes. :raise InvalidSize: when it is no size, or too little to work with."""
    from casbackup.limits import MIN_SERVED_CACHE_BYTES, SERVED_CACHE_BYTES
    from casbackup.units import format_size, parse_size

    size = SERVED_CACHE_BYTES if text is None else parse_size(text)
    if size < MIN_SERVED_CACHE_BYTES:
        raise InvalidSize(f"--cache must be at least {format_size(MIN_SERVED_CACHE_BYTES)}")
    return size
