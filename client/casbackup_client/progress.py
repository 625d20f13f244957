"""The progress of a job on a terminal: percentage, rate, time left, and for backups new, reused and zero
bytes.

A job that is over within half a second shows nothing and does not pay for loading rich.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from casbackup.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.text import Text

_PATIENCE_S = 0.5
_REDRAW_S = 0.2
_RATE_WINDOW_S = 5.0


class State(NamedTuple):
    """A job's advance at one moment."""

    title: str
    total_bytes: int | None
    counters: dict[str, int]
    elapsed_s: float
    rate: float


class TerminalProgress:
    """Implements ``Progress`` with one line on stderr, redrawn in place. Enter it around the job: leaving
    removes the line.
    """

    def __init__(self, *, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._painter = threading.Thread(target=self._paint, name="progress", daemon=True)
        self._title = ""
        self._total: int | None = None
        self._counters: Counter[str] = Counter()
        self._began_s = time.monotonic()
        self._samples = [(self._began_s, 0)]

    def start(self, title: str, total_bytes: int | None) -> None:
        with self._lock:
            self._title, self._total = title, total_bytes
            self._counters.clear()
            self._began_s = time.monotonic()
            self._samples = [(self._began_s, 0)]

    def advance(self, **counters: int) -> None:
        with self._lock:
            self._counters.update(counters)

    def finish(self) -> None:
        with self._lock:
            self._title = ""

    def state(self) -> State:
        """What to show now. The rate is that of the last seconds, since a mean over holes and data tells
        nothing.
        """
        now = time.monotonic()
        with self._lock:
            done = self._counters["done"]
            self._samples = [s for s in self._samples if now - s[0] <= _RATE_WINDOW_S] or [(self._began_s, 0)]
            since_s, before = self._samples[0]
            self._samples.append((now, done))
            rate = (done - before) / (now - since_s) if now > since_s else 0.0
            return State(self._title, self._total, dict(self._counters), now - self._began_s, rate)

    def __enter__(self) -> TerminalProgress:
        self._painter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._painter.join()

    def _paint(self) -> None:
        if self._over.wait(self._patience_s):
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(file=sys.stderr)
        with Live(console=console, transient=True, auto_refresh=False) as live:
            while not self._over.wait(_REDRAW_S):
                live.update(_line(self.state(), console.width), refresh=True)


def _line(state: State, width: int) -> Text:
    from rich.text import Text

    return Text(describe(state)[:width], no_wrap=True)


def describe(state: State) -> str:
    """One line: ``scsi0  42% 1.20 GiB of 2.85 GiB  812 MiB/s  0:02 left  new 31 MiB  reused 1.10 GiB  zero
    60 MiB``.
    """
    if not state.title:
        return ""
    return "  ".join([state.title, *_advance(state), *_counts(state.counters)])


def _advance(state: State) -> list[str]:
    done = state.counters.get("done", 0)
    rate = f"{format_size(state.rate)}/s"
    if not state.total_bytes:
        return [format_size(done), rate] if done else [format_duration(state.elapsed_s)]
    parts = [
        f"{100 * done // state.total_bytes:3}% {format_size(done)} of {format_size(state.total_bytes)}",
        rate,
    ]
    if state.rate > 0:
        parts.append(f"{_clock((state.total_bytes - done) / state.rate)} left")
    return parts


def _counts(counters: dict[str, int]) -> list[str]:
    """The counters beside ``done``: bytes, but for the ones that count things."""
    shown = [f"{name} {format_size(counters[name])}" for name in ("new", "reused", "zero") if name in counters]
    return shown + [
        f"{value} {name}" for name, value in counters.items() if name not in ("done", "new", "reused", "zero")
    ]


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )
