"""Views on a terminal. Importing this loads rich, so it is imported only when a table is drawn on one."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from casbackup_client.views import Fields, Table, View, field_lines, is_right_aligned, printable, title_of


def draw(view: View, console: Console | None = None) -> None:
    """Print the view to the terminal that is standard output."""
    console = console or Console(highlight=False, soft_wrap=False)
    for block in view:
        if isinstance(block, Table):
            console.print(_table(block))
        else:
            lines = field_lines(block) if isinstance(block, Fields) else [printable(block)]
            for line in lines:
                console.print(Text(line), soft_wrap=True)


def _table(table: Table) -> RichTable:
    drawn = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for header in table.headers:
        drawn.add_column(title_of(header), justify="right" if is_right_aligned(header) else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    return drawn
