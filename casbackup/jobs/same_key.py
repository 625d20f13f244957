"""Do two repositories have the same key? Only then can blobs and manifests go from one to the other as they are."""

from __future__ import annotations

from casbackup.errors import KeyMismatch
from casbackup.spec.config import RepositoryConfig


def require_same_key(source: RepositoryConfig, destination: RepositoryConfig) -> None:
    """Neither having any counts as the same.

    :raise KeyMismatch: naming both fingerprints.
    """
    if source.key_fingerprint != destination.key_fingerprint:
        raise KeyMismatch(
            f"one repository {_encryption(source)}, the other {_encryption(destination)}:"
            " data cannot go from one to the other as it is stored"
        )


def _encryption(config: RepositoryConfig) -> str:
    return f"is encrypted with key {config.key_fingerprint}" if config.encrypted else "is not encrypted"
