"""age (https://age-encryption.org), as far as keys need it. ``pyrage`` is imported when it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from casbackup.errors import UsageError

if TYPE_CHECKING:
    Identity = Any
    """A secret key of age or SSH, of pyrage's, which has no types."""

_SSH_KEY = b"-----BEGIN"
_SECRET = "AGE-SECRET-KEY-"


def age_encrypted(plain: bytes, recipient: str) -> str:
    """An armoured file.

    :raise UsageError: when it is no recipient.
    """
    import pyrage  # noqa: PLC0415

    return bytes(pyrage.encrypt(plain, [_recipient(recipient)], armored=True)).decode("ascii")


def age_decrypted(file: str, identities: Sequence[Identity]) -> bytes | None:
    """None when it is for none of the identities, or damaged."""
    import pyrage  # noqa: PLC0415

    try:
        return bytes(pyrage.decrypt(file.encode(), list(identities)))
    except pyrage.DecryptError:
        return None


def normal_recipient(text: str) -> str:
    """Without what is a comment: ``age1...``, ``ssh-ed25519 ...`` or ``ssh-rsa ...``.

    :raise UsageError: when it is no recipient.
    """
    _recipient(text)
    return " ".join(text.split()[:2])


def parse_identities(data: bytes, origin: str) -> list[Identity]:
    """Of a file as ``age-keygen`` writes it, or of an SSH key without a passphrase.

    :raise UsageError: when there is none.
    """
    import pyrage  # noqa: PLC0415

    try:
        if data.lstrip().startswith(_SSH_KEY):
            return [pyrage.ssh.Identity.from_buffer(data)]
        lines = [line.strip() for line in data.decode("ascii").splitlines()]
        found = [pyrage.x25519.Identity.from_str(line) for line in lines if line.upper().startswith(_SECRET)]
    except (pyrage.IdentityError, UnicodeDecodeError):
        found = []
    if not found:
        raise UsageError(f"{origin} holds no identity of age, and no SSH key that is not encrypted") from None
    return found


def _recipient(text: str) -> Any:
    import pyrage  # noqa: PLC0415

    kind = pyrage.ssh if text.lstrip().startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(text.strip())
    except pyrage.RecipientError:
        raise UsageError(
            f"{text!r} is no recipient that can be used: age1... without a plugin, ssh-ed25519 ... or ssh-rsa ..."
        ) from None
