"""Key files anew: of a new key, and of one that is to be wrapped otherwise. Wrapping anew leaves the key as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from casbackup.clock import Clock, SystemClock, format_time
from casbackup.codec.master_key import MasterKey
from casbackup.errors import UsageError
from casbackup.keys.age import normal_recipient
from casbackup.keys.wrapping import wrap_by_passphrase, wrap_for_recipient, wrap_plain
from casbackup.spec.keyfile import AgeWrapping, KeyFile, PlainWrapping, Wrapping


def key_file_of(
    key: MasterKey,
    *,
    passphrase: bytes | None = None,
    recipients: Iterable[str] = (),
    plain: bool = False,
    comment: str = "",
    clock: Clock | None = None,
) -> KeyFile:
    """A file of the key, wrapped in every way that is asked for.

    :raise UsageError: when that is none, or too many; when a recipient is none, or the comment is not one line.
    """
    wrappings: list[Wrapping] = [] if passphrase is None else [wrap_by_passphrase(key, passphrase)]
    wrappings += [wrap_for_recipient(key, recipient) for recipient in _distinct(recipients)]
    wrappings += [wrap_plain(key)] if plain else []
    created = format_time((clock or SystemClock()).now_ms())
    try:
        return KeyFile(key.fingerprint, created, comment, tuple(wrappings))
    except ValueError as error:
        raise UsageError(str(error)) from error


def with_passphrase(key_file: KeyFile, key: MasterKey, passphrase: bytes | None) -> KeyFile:
    """In the place of the passphrases before, and of the plain key; None: plain, in the place of them."""
    kept = [wrapping for wrapping in key_file.wrappings if isinstance(wrapping, AgeWrapping)]
    first = wrap_plain(key) if passphrase is None else wrap_by_passphrase(key, passphrase)
    return _with_wrappings(key_file, [first, *kept])


def with_recipients(key_file: KeyFile, key: MasterKey, recipients: Iterable[str]) -> KeyFile:
    """Also for these recipients. One that is there already is wrapped anew.

    :raise UsageError: when one is no recipient, or there are too many.
    """
    added = [wrap_for_recipient(key, recipient) for recipient in _distinct(recipients)]
    kept = _without(key_file, {wrapping.recipient for wrapping in added})
    return _with_wrappings(key_file, [*kept, *added])


def without_recipients(key_file: KeyFile, recipients: Iterable[str]) -> KeyFile:
    """Not for these recipients any more. Copies that were made before still are.

    :raise UsageError: when one is not among them, or nothing else protects the key.
    """
    removed = set(_distinct(recipients))
    absent = removed - set(key_file.recipients)
    if absent:
        raise UsageError(f"key {key_file.fingerprint} is not wrapped for {min(absent)}")
    return _with_wrappings(key_file, _without(key_file, removed))


def without_plain(key_file: KeyFile) -> KeyFile:
    """To be given away.

    :raise UsageError: when nothing else protects the key.
    """
    return _with_wrappings(key_file, [w for w in key_file.wrappings if not isinstance(w, PlainWrapping)])


def _with_wrappings(key_file: KeyFile, wrappings: Sequence[Wrapping]) -> KeyFile:
    if not wrappings:
        raise UsageError(f"then nothing would protect key {key_file.fingerprint}: give it a passphrase first")
    try:
        return replace(key_file, wrappings=tuple(wrappings))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _without(key_file: KeyFile, recipients: set[str]) -> list[Wrapping]:
    return [w for w in key_file.wrappings if not (isinstance(w, AgeWrapping) and w.recipient in recipients)]


def _distinct(recipients: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(normal_recipient, recipients)))
