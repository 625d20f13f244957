"""Where results go: one JSON document, or text for people, on stdout; remarks on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from casbackup_client.views import Table, View, plain_lines, printable


class Output:
    """Shows results the way the global options ask for."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json = json
        self.quiet = quiet

    def result(self, document: Mapping[str, object], view: Callable[[], View], *, essential: bool = True) -> None:
        """Show a command's outcome: the document with ``--json``, else the view. ``essential`` ones ignore
        ``--quiet``.
        """
        if self.json:
            import json

            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        elif essential or not self.quiet:
            self._show(view())

    def complain(self, text: str) -> None:
        """Something that must be known even with ``--quiet``, on stderr."""
        sys.stderr.write(f"casbackup: {printable(text)}\n")

    def _show(self, view: View) -> None:
        if any(isinstance(block, Table) for block in view) and is_terminal(1):
            from casbackup_client.terminal import draw

            draw(view)
            return
        for line in plain_lines(view):
            sys.stdout.write(line + "\n")


def is_terminal(descriptor: int) -> bool:
    """Is there somebody who sees colours and lines being redrawn?"""
    stream = sys.stdout if descriptor == 1 else sys.stderr
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
