"""Progress of a job: counters that a job advances and somebody else shows."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives a job's advance. Called from worker threads, about once per segment; must be quick.

    The counters are named: ``done`` bytes of the whole, and for a backup ``new``, ``reused`` and ``zero`` bytes.
    """

    def start(self, title: str, total_bytes: int | None) -> None:
        """A phase begins; ``total_bytes`` is None when it is not known beforehand."""

    def advance(self, **counters: int) -> None:
        """Add to the named counters."""

    def finish(self) -> None:
        """The phase is over."""


class NoProgress:
    """Shows nothing."""

    def start(self, title: str, total_bytes: int | None) -> None: ...

    def advance(self, **counters: int) -> None: ...

    def finish(self) -> None: ...
