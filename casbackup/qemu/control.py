"""What others may do to a live backup while it runs, and what they can see of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LiveStatus:
    """How a live backup is getting on. Bytes of all disks together, speeds in bytes per second."""

    phase: str = "starting"
    total_bytes: int = 0
    done_bytes: int = 0
    paused: bool = False
    speed_limit_bytes_s: int = 0
    """As asked for; 0: none."""
    taken_bytes_s: int = 0
    waiting_bytes: int = 0
    """In memory, until the target takes them."""
    spooled_bytes: int = 0
    """In the spool file, until the target takes them."""


def _nobody() -> None:
    """Nobody wants to know."""


class LiveControl:
    """Shared between a live backup and whoever controls it; any thread."""

    def __init__(self, *, speed_limit_bytes_s: int = 0, give_up: Callable[[], None] = _nobody) -> None:
        """``give_up`` is called, in any thread, when the backup cannot succeed any more: from then on there is no
        reason to wait for a target that does not answer.
        """
        self.give_up = give_up
        self._lock = threading.Lock()
        self._status = LiveStatus(speed_limit_bytes_s=speed_limit_bytes_s)
        self._cancelled: str | None = None

    @property
    def status(self) -> LiveStatus:
        return self._status

    @property
    def cancelled(self) -> str | None:
        """Why the backup is to end, if it is."""
        return self._cancelled

    def cancel(self, reason: str) -> None:
        """The first reason counts."""
        with self._lock:
            self._cancelled = self._cancelled or reason

    def pause(self) -> None:
        """Stop copying in the background. What the guest overwrites is still saved first."""
        self.update(paused=True)

    def resume(self) -> None:
        self.update(paused=False)

    def limit_speed(self, bytes_s: int) -> None:
        """Copy no faster in the background; 0: as fast as the target takes it."""
        self.update(speed_limit_bytes_s=bytes_s)

    def update(self, **changes: object) -> None:
        with self._lock:
            self._status = replace(self._status, **changes)  # type: ignore[arg-type]
