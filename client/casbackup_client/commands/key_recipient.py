"""``casbackup key recipient``: who can open a key with an identity of age."""

from __future__ import annotations

import click

from casbackup_client.app import App
from casbackup_client.newkeys import key_option, show_key
from casbackup_client.options import CommandGroup, command, global_options, pass_app


@click.group("recipient", cls=CommandGroup)
@global_options
def recipient() -> None:
    """Say for whom a key is wrapped.

    Recipients are those of age: age1..., ssh-ed25519 ..., ssh-rsa ...

    \b
    age-keygen -o identity.txt
    casbackup key recipient add age1...
    casbackup --identity identity.txt restore vm/100 --to .
    """


@command("list")
@key_option
@pass_app
def list_recipients(app: App, key: str | None) -> None:
    """List a key's recipients."""
    key_file = app.keys.named(key)
    show_key(app, key_file, lambda: key_file.recipients or ["no recipients"], essential=True)


@command("add")
@click.argument("recipients", metavar="RECIPIENT...", nargs=-1, required=True)
@key_option
@pass_app
def add(app: App, recipients: tuple[str, ...], key: str | None) -> None:
    """Wrap a key also for these recipients. What opens it now must be at hand."""
    from casbackup.keys.making import with_recipients

    before = app.keys.named(key)
    master = app.keys.unlock(before)
    key_file = with_recipients(before, master, recipients)
    app.keys.ring.replace(key_file)
    show_key(app, key_file, lambda: [f"key {key_file.fingerprint} is wrapped for:", *key_file.recipients])


@command("remove")
@click.argument("recipients", metavar="RECIPIENT...", nargs=-1, required=True)
@key_option
@pass_app
def remove(app: App, recipients: tuple[str, ...], key: str | None) -> None:
    """Do not wrap a key for these recipients any more. Copies that were made before still open for them."""
    from casbackup.keys.making import without_recipients

    key_file = without_recipients(app.keys.named(key), recipients)
    app.keys.ring.replace(key_file)
    left = key_file.recipients or ("nobody",)
    show_key(app, key_file, lambda: [f"key {key_file.fingerprint} is wrapped for:", *left])


for _command in (list_recipients, add, remove):
    recipient.add_command(_command)
