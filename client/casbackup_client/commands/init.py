"""``casbackup init``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from casbackup.errors import UsageError
from casbackup_client.app import App
from casbackup_client.newkeys import Wrap, keep_new_key, warning_lines, wrap_options
from casbackup_client.options import command, pass_app

if TYPE_CHECKING:
    from casbackup.spec.keyfile import KeyFile
    from casbackup_client.documents import InitDocument


@command("init")
@click.option(
    "--compression-level",
    type=click.IntRange(-7, 19),
    metavar="N",
    help="zstd level of new data, from -7 (fastest) to 19 (smallest); default: 2.",
)
@click.option("--encrypted", is_flag=True, help="Encrypt all that is backed up. This cannot be changed later.")
@click.option(
    "--key",
    metavar="FINGERPRINT",
    help="With --encrypted: by this key, instead of a new one; default: CASBACKUP_KEY. It need not be on this machine.",
)
@click.option("--store-key", is_flag=True, help="With --encrypted: keep a wrapped copy of the key in the repository.")
@wrap_options
@pass_app
def init(
    app: App,
    compression_level: int | None,
    encrypted: bool,
    key: str | None,
    store_key: bool,
    comment: str,
    recipients: tuple[str, ...],
    passphrase: bool | None,
) -> None:
    """Create a repository.

    It becomes a new or empty folder: `casbackup -r /backup/vms init`. The folder must be on a local file
    system.

    With --encrypted a new key is made and kept in the key folder, wrapped by a passphrase unless --recipient
    or --no-passphrase says otherwise. Without the key nobody can restore, you included.
    """
    from casbackup.repository.repository import Repository
    from casbackup.repository.stored_key import write_stored_key
    from casbackup_client.documenting import key_document, repository_document
    from casbackup_client.keys import note_new

    wrap = Wrap(comment, recipients, passphrase)
    if not encrypted and (key or store_key or wrap.is_given):
        raise UsageError("options for a key were given, but not --encrypted")
    if store_key and wrap.is_plain_only:
        raise UsageError("--store-key needs a key that is wrapped, and --no-passphrase leaves it unprotected")
    path = app.folder_path
    key_file, fingerprint = _key(app, path, key, wrap) if encrypted else (None, "")
    copy = app.keys.copy_for_repository(fingerprint) if store_key else None
    with Repository.create(path, compression_level=compression_level, key_fingerprint=fingerprint) as repository:
        if copy is not None:
            write_stored_key(repository, copy, replace=False)
        document: InitDocument = {"repository": repository_document(repository)}
    note_new(path, fingerprint)
    if key_file is not None:
        document["new_key"] = key_document(key_file, app.keys.ring.path(fingerprint))
    app.output.result(document, lambda: _lines(document), essential=False)


def _key(app: App, path: str, named: str | None, wrap: Wrap) -> tuple[KeyFile | None, str]:
    """The key's fingerprint, and its file if it is new. It is kept before there is a repository that needs it."""
    from casbackup.fs import RealFileSystem
    from casbackup.repository.layout import Layout
    from casbackup.repository.repository import require_free
    from casbackup_client.keys import full_fingerprint

    wanted = full_fingerprint(app.keys.ring, named) if named else app.keys.wanted
    if wanted is not None:
        if wrap.is_given:
            raise UsageError(f"options for a new key were given, and key {wanted} is to be used")
        return None, wanted
    require_free(RealFileSystem(), Layout(path))  # before anybody chooses a passphrase
    key_file = keep_new_key(app, wrap)
    return key_file, key_file.fingerprint


def _lines(document: InitDocument) -> list[str]:
    repository = document["repository"]
    lines = [f"created repository {repository['id'][:8]} in {repository['path']}"]
    if repository["key"] is not None:
        lines.append(f"encrypted with key {repository['key']}")
    return lines + (warning_lines(document["new_key"]["fingerprint"]) if "new_key" in document else [])
