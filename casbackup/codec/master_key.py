"""The master key of encrypted repositories. All other keys are derived from it, each for one purpose."""

from __future__ import annotations

import os
from typing import NoReturn

from casbackup.codec.crypto import KEY_BYTES, derived_key

_FINGERPRINT_BYTES = 16


class MasterKey:
    """32 secret bytes. They are in no repr, and it cannot be pickled."""

    __slots__ = ("_secret", "fingerprint")

    def __init__(self, secret: bytes) -> None:
        """:raise ValueError: when there are not 32 bytes."""
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a master key has {KEY_BYTES} bytes, not {len(secret)}")
        self._secret = secret
        self.fingerprint = self.derived("casbackup 2026-11-24 key fingerprint")[:_FINGERPRINT_BYTES].hex()
        """32 hexadecimal digits that name the key and tell nothing about it."""

    @classmethod
    def generate(cls) -> MasterKey:
        return cls(os.urandom(KEY_BYTES))

    def derived(self, context: str) -> bytes:
        return derived_key(self._secret, context)

    def reveal(self) -> bytes:
        """The secret itself, for whoever wraps it."""
        return self._secret

    def __repr__(self) -> str:
        return f"MasterKey({self.fingerprint})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a master key is not to be pickled")
