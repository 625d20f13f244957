"""``casbackup key export``, ``import``, ``paper`` and ``store``: copies of a key in other places."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from casbackup.errors import KeyExists, KeyMissing, TargetExists, UsageError
from casbackup_client.app import App
from casbackup_client.newkeys import Wrap, key_argument, show_key, wrap_options
from casbackup_client.options import command, pass_app

if TYPE_CHECKING:
    from casbackup.codec.master_key import MasterKey
    from casbackup.spec.keyfile import KeyFile

_MAX_SHEET_BYTES = 1024 * 1024
_FORMATS = ("text", "html", "svg")
_FORMAT_OF_ENDING = {".html": "html", ".htm": "html", ".svg": "svg"}


def _output_option(function: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "-o", "--output", metavar="FILE", type=click.Path(), help="Write to a new file that only you can read."
    )(function)


@command("export")
@key_argument
@_output_option
@click.option("--plain", is_flag=True, help="Write the key itself, as text, unprotected.")
@pass_app
def export(app: App, key: str | None, output: str | None, plain: bool) -> None:
    """Write a copy of a key file to stdout or a new file.

    The copy opens like the file itself. A key that is kept unprotected is wrapped by a passphrase in the copy, which
    is asked for or comes from CASBACKUP_NEW_PASSPHRASE.
    """
    from casbackup.keys.text import format_key
    from casbackup.spec.keyfile import encode_key_file

    key_file = app.keys.named(key)
    content = format_key(app.keys.unlock(key_file)) if plain else encode_key_file(_wrapped(app, key_file)).decode()
    _give(app, key_file.fingerprint, content, output)


@command("import")
@click.argument("file", metavar="[FILE]", type=click.Path(), required=False)
@click.option("--from-repository", is_flag=True, help="Import the copy that the repository has.")
@wrap_options
@pass_app
def import_(
    app: App,
    file: str | None,
    from_repository: bool,
    comment: str,
    recipients: tuple[str, ...],
    passphrase: bool | None,
) -> None:
    """Add a key to the key folder, from a file or a sheet.

    FILE is a key file, which stays wrapped as it is; or the text of a recovery sheet, whose key is wrapped like a new
    one. Without FILE it is read from standard input, so a sheet can be typed: case and spacing do not matter, and the
    group with a mistake is named.

    Compare the fingerprint of a copy from a repository with one that you know: whoever keeps the repository could have
    put another key there.
    """
    wrap = Wrap(comment, recipients, passphrase)
    if from_repository and file is not None:
        raise UsageError("give either FILE or --from-repository")
    key_file = _of_repository(app) if from_repository else _read(app, file, wrap)
    if key_file is None:
        raise KeyMissing("the repository has no copy of its key")
    app.keys.ring.add(key_file)
    show_key(app, key_file, lambda: [f"imported key {key_file.fingerprint}"])


@command("paper")
@key_argument
@_output_option
@click.option(
    "--format",
    "kind",
    metavar="text|html|svg",
    type=click.Choice(_FORMATS),
    help="A text, a page, or the QR code alone; default: by the ending of FILE (.html, .svg), or text.",
)
@pass_app
def paper(app: App, key: str | None, output: str | None, kind: str | None) -> None:
    """Make a recovery sheet to print.

    It has the key as text that is safe to type, and as a QR code, unprotected. `key import` reads it back. Do not leave
    the file on a disk.
    """
    from casbackup.keys.sheet import html_sheet, svg_code, text_sheet

    key_file = app.keys.named(key)
    master = app.keys.unlock(key_file)
    kind = kind or _FORMAT_OF_ENDING.get(os.path.splitext(output or "")[1].lower(), "text")
    if kind == "svg":
        content = svg_code(master)
    elif kind == "html":
        content = html_sheet(master, key_file)
    else:
        content = text_sheet(master, key_file, on_screen=output is None and sys.stdout.isatty())
    _give(app, key_file.fingerprint, content, output)


@command("store")
@click.option("--replace", is_flag=True, help="Replace the copy that is there; on a server this needs the right admin.")
@pass_app
def store(app: App, replace: bool) -> None:
    """Keep a wrapped copy of a key in its repository.

    Whoever has its passphrase can then restore with nothing but the repository. So the passphrase must be one that
    nobody guesses: whoever keeps the repository can try as many as they like.
    """
    with app.stored_peer() as peer:
        fingerprint = peer.config.key_fingerprint
        if not fingerprint:
            raise UsageError("the repository is not encrypted")
        peer.store_key(app.keys.copy_for_repository(fingerprint), replace=replace)
    key_file = app.keys.ring.read(fingerprint)
    show_key(app, key_file, lambda: [f"stored a copy of key {key_file.fingerprint} in the repository"])


def _wrapped(app: App, key_file: KeyFile) -> KeyFile:
    """The file without the unprotected key."""
    from casbackup.keys.making import with_passphrase, without_plain

    if not key_file.is_plain or len(key_file.wrappings) > 1:
        return without_plain(key_file)
    key = app.keys.unlock(key_file)
    return with_passphrase(key_file, key, app.keys.new_passphrases.new(f"the copy of key {key_file.fingerprint}"))


def _of_repository(app: App) -> KeyFile | None:
    from casbackup.repository.stored_key import storable
    from casbackup_client.keys import COPY

    with app.stored_peer() as peer:
        app.keys.check(peer.config)
        data = peer.stored_key()
        return None if data is None else storable(data, COPY, peer.config)


def _read(app: App, path: str | None, wrap: Wrap) -> KeyFile:
    """A key file as it is, or that of a key on a sheet, wrapped as asked for."""
    from casbackup.keys.text import parse_key
    from casbackup.spec.keyfile import decode_key_file

    origin, data = path or "what came from standard input", _content(app, path)
    if data.lstrip().startswith(b"{"):
        if wrap.is_given:
            raise UsageError(f"{origin} is a key file, which is imported as it is: change it afterwards")
        return decode_key_file(data, origin)
    key = parse_key(data.decode("utf-8", "replace"), origin)
    _refuse_known(app, key)
    return wrap.key_file(app, key)


def _refuse_known(app: App, key: MasterKey) -> None:
    """Before anybody chooses a passphrase for it."""
    if os.path.lexists(app.keys.ring.path(key.fingerprint)):
        raise KeyExists(f"key {key.fingerprint} is in {app.keys.ring.folder} already")


def _content(app: App, path: str | None) -> bytes:
    if path is not None:
        with open(path, "rb") as file:
            return file.read(_MAX_SHEET_BYTES)
    if sys.stdin.isatty():
        app.output.complain("type the lines of the sheet, and end with Ctrl-D")
    return sys.stdin.buffer.read(_MAX_SHEET_BYTES)


def _give(app: App, fingerprint: str, content: str, path: str | None) -> None:
    if path is not None:
        _write_private(path, content.encode())
    document = {"fingerprint": fingerprint, "path": path, "content": content if path is None else None}
    said = content.rstrip("\n").split("\n") if path is None else [f"wrote {path}, for key {fingerprint}"]
    app.output.result(document, lambda: said, essential=path is None)


def _write_private(path: str, data: bytes) -> None:
    """To a new file, durably. Not by renaming: not every stick has links."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise TargetExists(f"{path} exists") from None
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        os.unlink(path)
        raise
