"""Who may come in."""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

from casbackup.clock import Clock, SystemClock
from casbackup.errors import ServerBusy, TokenInvalid, TokenMissing
from casbackup_server.audit import Audit
from casbackup_server.problems import Refusal
from casbackup_server.rights import ALL, Access, Grant, Right
from casbackup_server.tokens import Token, TokenFile, parse_token

_LONGEST_HEADER = 2048


class Gate(Protocol):
    """Asked once a request. Must be quick: it runs in the event loop."""

    def admit(self, authorization: str | None, address: str, repository: str) -> Access:
        """What whoever shows this may do in a repository.

        :raise TokenMissing, TokenInvalid: when nothing. :raise ServerBusy: when too many wrong ones came from there.
        """

    def note_used(self) -> None:
        """Write down what was used since; called now and then, from a thread."""


class OpenGate:
    """Everybody may do everything: for a server that only its own machine reaches."""

    def admit(self, authorization: str | None, address: str, repository: str) -> Access:
        return Access("nobody", ALL)

    def note_used(self) -> None: ...


class OneTokenGate:
    """Whoever shows the one token that there is may restore; without one, everybody may."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def admit(self, authorization: str | None, address: str, repository: str) -> Access:
        if self._token is not None:
            if authorization is None:
                raise TokenMissing("this gateway wants a token")
            if not hmac.compare_digest(_shown(authorization).encode(), self._token.encode()):
                raise TokenInvalid("this is not the token of this gateway")
        return Access("nobody", Grant(frozenset({Right.RESTORE})))

    def note_used(self) -> None: ...


class Failures:
    """Wrong tokens by address: after ``burst`` of them, one more every ``refill_s`` seconds is looked at.

    Good tokens are never held back by wrong ones from the same address.
    """

    def __init__(
        self,
        burst: int = 10,
        refill_s: float = 6.0,
        addresses: int = 10_000,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = burst
        self._refill_s = refill_s
        self._addresses = addresses
        self._now_s = now_s
        self._full_at_s: OrderedDict[str, float] = OrderedDict()

    def note(self, address: str) -> None:
        """:raise ServerBusy: when there were too many."""
        now_s = self._now_s()
        full_at_s = max(self._full_at_s.pop(address, now_s), now_s) + self._refill_s
        too_many = full_at_s - now_s > self._burst * self._refill_s
        self._full_at_s[address] = min(full_at_s, now_s + self._burst * self._refill_s)
        while len(self._full_at_s) > self._addresses:
            self._full_at_s.popitem(last=False)
        if too_many:
            raise Refusal(429, ServerBusy("too many wrong tokens came from this address"))


class TokenGate:
    """Lets in whoever shows a token of the repository."""

    def __init__(
        self,
        files: Mapping[str, TokenFile],
        audit: Audit,
        *,
        clock: Clock | None = None,
        failures: Failures | None = None,
    ) -> None:
        self._files = files
        self._audit = audit
        self._clock = clock or SystemClock()
        self._failures = failures or Failures()
        self._used: dict[str, dict[str, int]] = {name: {} for name in files}

    def admit(self, authorization: str | None, address: str, repository: str) -> Access:
        if authorization is None:
            raise TokenMissing("this server wants a token")
        token = self._token(authorization, repository)
        if token is None:
            self._failures.note(address)
            self._audit.note("token refused", address=address, repository=repository)
            raise TokenInvalid("the server does not know this token, or it has expired")
        self._used[repository][token.id] = self._clock.now_ms()
        return Access(token.name, token.grant)

    def note_used(self) -> None:
        for repository, file in self._files.items():
            used, self._used[repository] = self._used[repository], {}
            if used:
                file.note_used(used)

    def _token(self, authorization: str, repository: str) -> Token | None:
        """A repository that is not there is like one that does not know the token."""
        parts = parse_token(_shown(authorization))
        file = self._files.get(repository)
        if parts is None or file is None:
            return None
        token = file.get(parts.id)
        return token if token is not None and token.accepts(parts.secret, self._clock.now_ms()) else None


def _shown(authorization: str) -> str:
    """The token in the header: as a bearer's, or as the password of anybody, for programs that know no better."""
    scheme, _, rest = authorization[:_LONGEST_HEADER].partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(rest.strip(), validate=True).decode("ascii").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""
