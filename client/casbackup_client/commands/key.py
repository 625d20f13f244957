"""``casbackup key``: the keys of encrypted repositories."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup_client.app import App
from casbackup_client.commands.key_copies import export, import_, paper, store
from casbackup_client.commands.key_recipient import recipient
from casbackup_client.newkeys import Wrap, keep_new_key, key_argument, show_key, warning_lines, wrap_options
from casbackup_client.options import CommandGroup, command, global_options, pass_app

if TYPE_CHECKING:
    from casbackup.spec.keyfile import KeyFile
    from casbackup_client.documents import KeyDocument
    from casbackup_client.views import View


@click.group("key", cls=CommandGroup)
@global_options
def key() -> None:
    """Manage the keys of encrypted repositories.

    A key is a file in the key folder (~/.config/casbackup/keys, or CASBACKUP_KEY_FOLDER), wrapped by a passphrase,
    for recipients of age, or both. A KEY is named by its fingerprint or the beginning of it; it may be left out where
    there is only one.

    \b
    casbackup -r /backup/vms init --encrypted
    casbackup key paper -o key.html
    casbackup key import key.json
    """


@command("list")
@pass_app
def list_keys(app: App) -> None:
    """List the keys of the key folder."""
    documents = _documents(app)
    app.output.result({"keys": documents}, lambda: _table(documents))


@command("create")
@wrap_options
@pass_app
def create(app: App, comment: str, recipients: tuple[str, ...], passphrase: bool | None) -> None:
    """Make a key, for `init --encrypted --key`. `init --encrypted` without it makes one itself.

    The passphrase is asked for, unless CASBACKUP_PASSPHRASE or another source is set.
    """
    key_file = keep_new_key(app, Wrap(comment, recipients, passphrase))
    made = f"created key {key_file.fingerprint}"
    show_key(app, key_file, lambda: [made, *warning_lines(key_file.fingerprint)])


@command("show")
@key_argument
@pass_app
def show(app: App, key: str | None) -> None:
    """Show what protects a key. The key itself is not shown; that is what `key paper` is for."""
    key_file = app.keys.named(key)
    show_key(app, key_file, lambda: _details(_document(app, key_file)), essential=True)


@command("passwd")
@key_argument
@click.option("--no-passphrase", is_flag=True, help="Keep the key unprotected, in a file that only its owner can read.")
@pass_app
def passwd(app: App, key: str | None, no_passphrase: bool) -> None:
    """Change a key's passphrase.

    The key stays, and nothing is encrypted anew; recipients stay, too. The new passphrase is asked for, or comes from
    CASBACKUP_NEW_PASSPHRASE. Copies of the key that were made before, also one in a repository, still have the old one:
    see `key store --replace`.
    """
    from casbackup.keys.making import with_passphrase

    before = app.keys.named(key)
    master = app.keys.unlock(before)
    passphrase = None if no_passphrase else app.keys.new_passphrases.new(f"key {before.fingerprint}")
    key_file = with_passphrase(before, master, passphrase)
    app.keys.ring.replace(key_file)
    show_key(app, key_file, lambda: [f"changed what protects key {key_file.fingerprint}"])


def _documents(app: App) -> list[KeyDocument]:
    """Of all that can be read; the others are complained of."""
    from casbackup.errors import EncryptionError

    found = []
    for fingerprint in app.keys.ring.fingerprints():
        try:
            found.append(_document(app, app.keys.ring.read(fingerprint)))
        except EncryptionError as error:
            app.output.complain(str(error))
    return found


def _document(app: App, key_file: KeyFile) -> KeyDocument:
    from casbackup_client.documenting import key_document

    return key_document(key_file, app.keys.ring.path(key_file.fingerprint))


def _table(documents: list[KeyDocument]) -> View:
    from casbackup_client.views import Table, one_line

    rows = [
        (item["fingerprint"], item["created"][:10], _protection(item), one_line(item["comment"])) for item in documents
    ]
    return [Table(("fingerprint", "created", "protected by", "comment"), rows)] if rows else ["no keys"]


def _protection(document: KeyDocument) -> str:
    """In a few words."""
    if document["plain"]:
        return "nothing"
    ways = ["passphrase"] if document["passphrases"] else []
    return ", ".join(ways + (["recipients"] if document["recipients"] else []))


def _details(document: KeyDocument) -> View:
    from casbackup_client.views import Fields

    items = [
        ("fingerprint", document["fingerprint"]),
        ("created", document["created"]),
        ("comment", document["comment"]),
        ("file", document["path"]),
    ]
    items += [
        ("passphrase", f"Argon2id, {cost['iterations']} passes over {cost['memory_kib'] // 1024} MiB")
        for cost in document["passphrases"]
    ]
    items += [("recipient", recipient) for recipient in document["recipients"]]
    items += [("unprotected", "whoever can read the file has the key")] if document["plain"] else []
    return [Fields([item for item in items if item[1]])]


for _command in (list_keys, create, show, passwd, export, import_, paper, store, recipient):
    key.add_command(_command)
