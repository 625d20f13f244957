"""Options and steps that ``init`` and the commands of ``key`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from casbackup_client.app import App

if TYPE_CHECKING:
    from casbackup.codec.master_key import MasterKey
    from casbackup.spec.keyfile import KeyFile
    from casbackup_client.views import View

F = TypeVar("F", bound=Callable[..., Any])


class Wrap(NamedTuple):
    """The options of ``wrap_options``, as given. ``passphrase`` None: if nothing else protects the key."""

    comment: str
    recipients: tuple[str, ...]
    passphrase: bool | None

    @property
    def is_given(self) -> bool:
        return bool(self.comment or self.recipients or self.passphrase is not None)

    @property
    def is_plain_only(self) -> bool:
        return self.passphrase is False and not self.recipients

    def key_file(self, app: App, key: MasterKey) -> KeyFile:
        """The key wrapped as asked for; asks for a passphrase if one is wanted.

        :raise UsageError: when an option is wrong. :raise PassphraseNeeded: when nobody can be asked.
        """
        from casbackup.keys.making import key_file_of

        asks = self.passphrase if self.passphrase is not None else not self.recipients
        return key_file_of(
            key,
            passphrase=app.keys.passphrases.new(f"key {key.fingerprint}") if asks else None,
            recipients=self.recipients,
            plain=self.passphrase is False,
            comment=self.comment,
        )


def wrap_options(function: F) -> F:
    """The options of ``Wrap``."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


_OPTIONS = (
    click.option("--comment", metavar="TEXT", default="", help="A line that says what the key is for."),
    click.option(
        "--recipient",
        "recipients",
        metavar="RECIPIENT",
        multiple=True,
        help="Wrap the key for this recipient of age: age1..., or an SSH public key. Repeatable.",
    ),
    click.option(
        "--passphrase/--no-passphrase",
        default=None,
        help="Wrap the key by a passphrase, the default without --recipient; or keep it unprotected in a file that "
        "only its owner can read.",
    ),
)


def _complete_key(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    from casbackup_client.completion import fingerprints

    return fingerprints(context.find_object(App) or App(), incomplete)


def key_argument(function: F) -> F:
    """A key of the key folder; None where there is only one."""
    return click.argument("key", metavar="[KEY]", required=False, shell_complete=_complete_key)(function)


def key_option(function: F) -> F:
    """``key_argument`` for commands whose arguments are something else."""
    return click.option("--key", metavar="KEY", shell_complete=_complete_key, help="Which key; default: the only one.")(
        function
    )


def show_key(app: App, key_file: KeyFile, view: Callable[[], View], *, essential: bool = False) -> None:
    """The outcome of a command that is about one key of the key folder."""
    from casbackup_client.documenting import key_document

    document = key_document(key_file, app.keys.ring.path(key_file.fingerprint))
    app.output.result({"key": document}, view, essential=essential)


def keep_new_key(app: App, wrap: Wrap) -> KeyFile:
    """Make a key and keep it in the key folder, durably."""
    from casbackup.codec.master_key import MasterKey
    from casbackup.keys.memory import keep_out_of_dumps

    keep_out_of_dumps()
    key_file = wrap.key_file(app, MasterKey.generate())
    app.keys.ring.add(key_file)
    return key_file


def warning_lines(fingerprint: str) -> list[str]:
    """What must be said of a new key."""
    return [
        "Whoever loses this key loses all that is encrypted with it. Keep a copy in another place:",
        f"  casbackup key paper {fingerprint[:8]} -o key.html    a page to print",
        f"  casbackup key export {fingerprint[:8]} -o key.json   a copy of the file",
    ]
