"""A wrapped copy of a repository's key beside its data: ``keys/<fingerprint>.json``.

Whoever can read the repository can read it, so it never holds a key that is not wrapped.
"""

from __future__ import annotations

from casbackup.errors import KeyExists, KeyMismatch, UsageError
from casbackup.fs import translated, write_durably
from casbackup.repository.repository import Repository
from casbackup.spec.config import RepositoryConfig
from casbackup.spec.keyfile import KeyFile, decode_key_file, encode_key_file


def read_stored_key(repository: Repository) -> bytes | None:
    """The file's bytes; None if there is no copy."""
    layout, fingerprint = repository.layout, repository.config.key_fingerprint
    if not fingerprint:
        return None
    try:
        with translated(f"cannot read {layout.stored_key(fingerprint)}"):
            return repository.fs.read(layout.stored_key(fingerprint))
    except FileNotFoundError:
        return None


def write_stored_key(repository: Repository, data: bytes, *, replace: bool) -> None:
    """Keep a copy, durably. Keeping the same once more is not an error.

    :raise KeyFileDamaged, KeyMismatch, UsageError: as ``storable`` does.
    :raise KeyExists: when there is another one already and ``replace`` is false.
    """
    repository.require_writable()
    kept = encode_key_file(storable(data, "the copy of the key", repository.config))
    path = repository.layout.stored_key(repository.config.key_fingerprint)
    try:
        with translated(f"cannot write {path}"):
            repository.fs.make_folders(repository.layout.keys)
            write_durably(repository.fs, path, kept, replace=replace)
    except FileExistsError:
        if read_stored_key(repository) != kept:
            raise KeyExists(f"{repository.layout.root} has another copy of its key already") from None


def storable(data: bytes, origin: str, config: RepositoryConfig) -> KeyFile:
    """A key file that may be in this repository.

    :raise KeyFileDamaged: when it is none. :raise KeyMismatch: when it is of another key.
    :raise UsageError: when the key is not wrapped.
    """
    key_file = decode_key_file(data, origin)
    if key_file.fingerprint != config.key_fingerprint:
        wanted = f"has key {config.key_fingerprint}" if config.encrypted else "is not encrypted"
        raise KeyMismatch(f"{origin} has key {key_file.fingerprint}, and the repository {wanted}")
    if key_file.is_plain:
        raise UsageError(f"{origin} holds key {key_file.fingerprint} unprotected: it must not be in a repository")
    return key_file
