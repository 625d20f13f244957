"""What a command shows to people, as values: lines and tables; and how they look as plain text.

On a terminal tables are drawn by ``terminal``; everywhere else this is what a log or a pipe gets, and no
other module is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Rows of text below headers. A header that starts with ``>`` belongs to a right-aligned column."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


class Fields(NamedTuple):
    """Names and values, one a line."""

    items: Sequence[tuple[str, str]]


Block = str | Table | Fields
View = Sequence[Block]


def printable(text: str) -> str:
    """The text without characters that would do something to a terminal; names and notes may come from
    anybody.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, thing: str) -> str:
    """``1 pack``, ``2 packs``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def one_line(text: str, length: int = 60) -> str:
    """The beginning of a note, for a table."""
    line = printable(text.replace("\n", " "))
    return line if len(line) <= length else line[: length - 1] + "…"


def is_right_aligned(header: str) -> bool:
    return header.startswith(">")


def title_of(header: str) -> str:
    return header.removeprefix(">")


def plain_lines(view: View) -> Iterator[str]:
    """The view as lines of text."""
    for block in view:
        if isinstance(block, Table):
            yield from _table_lines(block)
        elif isinstance(block, Fields):
            yield from field_lines(block)
        else:
            yield printable(block)


def field_lines(fields: Fields) -> Iterator[str]:
    width = max((len(name) for name, _ in fields.items), default=0)
    for name, value in fields.items:
        indent = "\n" + " " * (width + 2)
        yield f"{name:<{width}}  {indent.join(printable(value).split(chr(10)))}".rstrip()


def _table_lines(table: Table) -> Iterator[str]:
    rows = [
        [title_of(header) for header in table.headers],
        *([printable(cell) for cell in row] for row in table.rows),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.headers))]
    for row in rows:
        cells = (
            f"{cell:>{width}}" if is_right_aligned(header) else f"{cell:<{width}}"
            for header, cell, width in zip(table.headers, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
