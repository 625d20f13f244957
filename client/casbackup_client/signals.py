"""SIGINT, SIGTERM and SIGHUP stop a command cleanly: they raise ``Interrupted`` in the main thread."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from casbackup.errors import Interrupted

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

LEAVING_S = 10.0
"""How long what is under way to a server may take once a signal came."""

_told: list[Callable[[], None]] = []


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """While entered, the first of the signals raises ``Interrupted``; the same one again ends the process
    at once.

    That is safe: whatever is half-done then is what a crash leaves, too. A signal that is ignored (nohup,
    background jobs of a shell) stays ignored. Without effect outside of the main thread, which gets no
    signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def told_of_signals(action: Callable[[], None]) -> Iterator[None]:
    """While entered, ``action`` is called, within the signal's handler, before a signal raises ``Interrupted``."""
    _told.append(action)
    try:
        yield
    finally:
        _told.remove(action)


def leave_soon() -> None:
    """Have done what is done when a signal comes, in any thread, without one."""
    for action in list(_told):
        action()


def _interrupt(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    leave_soon()
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def wakeup_on_signal() -> Iterator[int]:
    """Gives a descriptor that becomes readable when a signal comes, for threads that would wait for ever
    for something else.
    """
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False) if in_main else -1
    try:
        yield ours
    finally:
        if in_main:
            signal.set_wakeup_fd(before)
        os.close(theirs)
        os.close(ours)
