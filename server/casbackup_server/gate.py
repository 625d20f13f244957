"""Who may come in."""

from __future__ import annotations

from typing import Protocol

from casbackup_server.rights import ALL, Access


class Gate(Protocol):
    """Asked once a request. Must be quick: it runs in the event loop."""

    def admit(self, authorization: str | None, address: str, repository: str) -> Access:
        """What whoever shows this may do in a repository.

        :raise TokenMissing, TokenInvalid: when nothing. :raise ServerBusy: when too many wrong ones came from there.
        """


class OpenGate:
    """Everybody may do everything: for a server that only its own machine reaches."""

    def admit(self, authorization: str | None, address: str, repository: str) -> Access:
        return Access("nobody", ALL)
