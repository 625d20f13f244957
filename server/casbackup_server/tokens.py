"""Tokens of a repository: ``tokens.json`` in its folder (``docs/spec/tokens.md``).

A token is ``cb1_ID_SECRET``: the id finds it, the secret is 256 random bits. Only the secret's hash is kept: nobody can
guess so much, so one BLAKE3 is as good as any slow hash. When a token was used last stands in ``tokens.used.json``,
which may be lost.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar

from blake3 import blake3

from casbackup.clock import Clock, SystemClock
from casbackup.errors import ConfigDamaged, RepositoryBusy, UsageError
from casbackup.fs import FileSystem, RealFileSystem, translated, write_durably
from casbackup.limits import MAX_TOKENS
from casbackup.repository.layout import Layout
from casbackup_server.rights import Grant, Right

T = TypeVar("T")

_CONTEXT = "casbackup 2026-11-24 token"
_TOKEN = re.compile("cb1_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@/-]{0,127}")
_SECRET_BYTES = 32
_LOCK_TRIES = 50
_LOCK_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token. ``hash``: of its secret; ``old_hash`` of the one before the last rotation, which is
    good until ``old_until_ms``. Times are milliseconds since 1970; ``expires_ms`` None: never.
    """

    id: str
    name: str
    hash: str
    grant: Grant
    created_ms: int
    expires_ms: int | None = None
    old_hash: str | None = None
    old_until_ms: int = 0

    def accepts(self, secret: str, now_ms: int) -> bool:
        """Is it the secret, and still good?"""
        given = _hash(secret)
        current = hmac.compare_digest(given, self.hash)
        former = self.old_hash is not None and hmac.compare_digest(given, self.old_hash) and now_ms < self.old_until_ms
        return (current or former) and not self.is_expired(now_ms)

    def is_expired(self, now_ms: int) -> bool:
        return self.expires_ms is not None and now_ms >= self.expires_ms


class NewToken(NamedTuple):
    """``text`` is what a client shows. It cannot be had a second time."""

    token: Token
    text: str


class TokenParts(NamedTuple):
    id: str
    secret: str


def parse_token(text: str) -> TokenParts | None:
    match = _TOKEN.fullmatch(text)
    return None if match is None else TokenParts(match[1], match[2])


class TokenFile:
    """The tokens of one repository. Changes are serial, between processes too; reading notices them at once."""

    def __init__(self, root: str, *, fs: FileSystem | None = None, clock: Clock | None = None) -> None:
        layout = Layout(root)
        self._path = os.path.join(layout.root, "tokens.json")
        self._used_path = os.path.join(layout.root, "tokens.used.json")
        self._lock_path = os.path.join(layout.locks, "tokens")
        self._fs = fs or RealFileSystem()
        self._clock = clock or SystemClock()
        self._seen: tuple[int, int, int] | None = None
        self._tokens: dict[str, Token] = {}

    def all(self) -> list[Token]:
        """By name.

        :raise ConfigDamaged: when the file is not understood.
        """
        return sorted(self._read().values(), key=lambda token: (token.name, token.id))

    def get(self, token_id: str) -> Token | None:
        """The token with this id as the file has it now; a look at its state is all that this costs, as a rule."""
        state = _state(self._path)
        if state != self._seen:
            self._tokens = self._read()
            self._seen = state
        return self._tokens.get(token_id)

    def create(self, name: str, grant: Grant, lifetime_ms: int | None = None) -> NewToken:
        """:raise UsageError: for a bad name, one that is taken, or no right."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is not a valid name of a token")
        if not grant.rights:
            raise UsageError("a token without any right would be of no use")
        now_ms = self._clock.now_ms()
        secret = _new_secret()
        expires_ms = None if lifetime_ms is None else now_ms + lifetime_ms
        token = Token(os.urandom(6).hex(), name, _hash(secret), grant, now_ms, expires_ms)

        def add(tokens: dict[str, Token]) -> None:
            if any(other.name == name for other in tokens.values()):
                raise UsageError(f"there is already a token {name!r}")
            if len(tokens) >= MAX_TOKENS:
                raise UsageError(f"more than {MAX_TOKENS} tokens")
            tokens[token.id] = token

        self._change(add)
        return NewToken(token, _text(token.id, secret))

    def revoke(self, reference: str) -> Token:
        """Remove the token with this name or id: from now on it is refused.

        :raise UsageError: when there is none.
        """

        def drop(tokens: dict[str, Token]) -> Token:
            return tokens.pop(_find(tokens, reference).id)

        return self._change(drop)

    def rotate(self, reference: str, grace_ms: int = 0, lifetime_ms: int | None = None) -> NewToken:
        """Give a token a new secret. The old one is good for ``grace_ms`` more; ``lifetime_ms`` counts from now, None
        leaves the expiry as it is.

        :raise UsageError: when there is no such token.
        """
        now_ms = self._clock.now_ms()
        secret = _new_secret()

        def change(tokens: dict[str, Token]) -> Token:
            token = _find(tokens, reference)
            changed = replace(token, hash=_hash(secret), old_hash=token.hash, old_until_ms=now_ms + grace_ms)
            if lifetime_ms is not None:
                changed = replace(changed, expires_ms=now_ms + lifetime_ms)
            tokens[token.id] = changed
            return changed

        token = self._change(change)
        return NewToken(token, _text(token.id, secret))

    def used(self) -> dict[str, int]:
        """When each token was used last, in milliseconds since 1970, as far as that is known."""
        with suppress(OSError, ValueError, AttributeError):
            content = json.loads(self._fs.read(self._used_path))
            return {str(key): value for key, value in content.items() if isinstance(value, int)}
        return {}

    def note_used(self, used: dict[str, int]) -> None:
        """Add to what is known of the last use. It does not matter if that fails."""
        with suppress(OSError):
            content = json.dumps({**self.used(), **used})
            write_durably(self._fs, self._used_path, content.encode(), replace=True)

    def _read(self) -> dict[str, Token]:
        try:
            data = self._fs.read(self._path)
        except FileNotFoundError:
            return {}
        try:
            content = json.loads(data)
            return {item["id"]: _decoded(item) for item in content["tokens"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigDamaged(f"{self._path} is not understood: {error}") from error

    def _change(self, change: Callable[[dict[str, Token]], T]) -> T:
        with translated(f"cannot change {self._path}"), self._locked():
            tokens = self._read()
            result = change(tokens)
            write_durably(self._fs, self._path, _encoded(tokens.values()), replace=True)
            return result

    @contextmanager
    def _locked(self) -> Iterator[None]:
        for _ in range(_LOCK_TRIES):
            lock = self._fs.lock(self._lock_path, shared=False)
            if lock is not None:
                break
            time.sleep(_LOCK_PAUSE_S)
        else:
            raise RepositoryBusy(f"somebody else is changing {self._path}")
        try:
            yield
        finally:
            lock.release()


def _find(tokens: dict[str, Token], reference: str) -> Token:
    for token in tokens.values():
        if reference in (token.id, token.name):
            return token
    raise UsageError(f"there is no token {reference!r}")


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _new_secret() -> str:
    return base64.urlsafe_b64encode(os.urandom(_SECRET_BYTES)).rstrip(b"=").decode()


def _text(token_id: str, secret: str) -> str:
    return f"cb1_{token_id}_{secret}"


def _hash(secret: str) -> str:
    return blake3(secret.encode(), derive_key_context=_CONTEXT).hexdigest()


def _encoded(tokens: Iterable[Token]) -> bytes:
    items = [
        {**asdict(token), "grant": {**asdict(token.grant), "rights": sorted(token.grant.rights)}} for token in tokens
    ]
    return json.dumps({"casbackup": "tokens", "version": 1, "tokens": items}, indent=1).encode() + b"\n"


def _decoded(item: dict[str, Any]) -> Token:
    grant = item["grant"]
    return Token(
        **{
            **item,
            "grant": Grant(
                frozenset(Right(right) for right in grant["rights"]),
                tuple(grant["namespaces"]),
                tuple(grant["vms"]),
                bool(grant["isolated"]),
            ),
        }
    )
