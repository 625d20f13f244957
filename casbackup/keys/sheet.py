"""A recovery sheet: a master key on paper, as text to type and as a QR code with the same text."""

from __future__ import annotations

import html
import io
from typing import Any

from casbackup.codec.master_key import MasterKey
from casbackup.keys.text import code_text, format_key
from casbackup.spec.keyfile import KeyFile

_ERROR_CORRECTION = "m"
_MODULE_PIXELS = 4
_QUIET_MODULES = 4


def text_sheet(key: MasterKey, key_file: KeyFile, *, on_screen: bool = False) -> str:
    """With the QR code in block characters: dark on light as a printer has it, or light on dark as a terminal."""
    about = "\n".join(f"{name}: {value}" for name, value in _about(key_file))
    return f"{_TITLE}\n\n{about}\n\n{_ADVICE}\n\n{format_key(key)}\n{_drawn(_code(key), inverted=on_screen)}"


def html_sheet(key: MasterKey, key_file: KeyFile) -> str:
    """A page that loads nothing from elsewhere."""
    rows = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>\n" for name, value in _about(key_file))
    return _PAGE.format(
        title=_TITLE,
        rows=rows,
        advice=html.escape(_ADVICE),
        key=html.escape(format_key(key)),
        code=_code(key).svg_inline(scale=_MODULE_PIXELS, border=_QUIET_MODULES),
    )


def svg_code(key: MasterKey) -> str:
    """The QR code alone."""
    drawn = io.BytesIO()
    _code(key).save(drawn, kind="svg", scale=_MODULE_PIXELS, border=_QUIET_MODULES)
    return drawn.getvalue().decode()


def _code(key: MasterKey) -> Any:
    import segno  # noqa: PLC0415

    return segno.make(code_text(key), error=_ERROR_CORRECTION, micro=False)


def _drawn(code: Any, *, inverted: bool) -> str:
    """Two rows of the code are one of text."""
    rows = [[bool(dark) != inverted for dark in row] for row in code.matrix_iter(border=_QUIET_MODULES)]
    rows += [[inverted] * len(rows[0])] if len(rows) % 2 else []
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return "".join("".join(map(_block, *pair)) + "\n" for pair in pairs)


def _block(upper: bool, lower: bool) -> str:
    return " ▄▀█"[2 * upper + lower]


def _about(key_file: KeyFile) -> list[tuple[str, str]]:
    found = [("Fingerprint", key_file.fingerprint), ("Made", key_file.created), ("Comment", key_file.comment)]
    return [(name, value) for name, value in found if value]


_TITLE = "casbackup recovery sheet"

_ADVICE = """Whoever has this sheet can read all backups that this key encrypts. Keep it where only
you, or whoever is to follow you, can get at it.

To use it, run `casbackup key import`, type the lines from BEGIN to END, or scan the code,
which holds the same, and end with Ctrl-D. Case and spacing do not matter. The last character
of each group checks the group, so that mistakes in typing are found."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 45em; margin: 2em auto; color: #000; background: #fff; }}
th {{ text-align: left; padding-right: 1em; }}
pre {{ font-size: 130%; border: 1px solid; padding: 1em; }}
@media print {{ body {{ margin: 0; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
{rows}</table>
<p>{advice}</p>
<pre>{key}</pre>
{code}
</body>
</html>
"""
