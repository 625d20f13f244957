"""Saving the memory of a running VM and the state of its devices, at the instant of its disks.

What QEMU sends is the stream of a migration, which ``-incoming`` takes again. Two ways:

**background**: the guest is stopped, the disks' jobs are started, and a migration with ``background-snapshot`` begins;
once QEMU tracks the guest's writes (userfaultfd), the guest goes on. A page that it is about to write is sent first.
The pause takes milliseconds, and grows with the number of pages, not with what is in them.

**paused**: the guest stays stopped until all is sent. QEMU has given its disks away then; it takes them back
(``blockdev-set-active``), and only now the jobs are started.

An ordinary migration beside running jobs fails, and jobs on disks that were given away do, too: hence these orders.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from casbackup.errors import (
    BackupBroken,
    LiveBackupBusy,
    QmpCommandFailed,
    QmpTimeout,
    VmStateFailed,
    VmStateUnsupported,
)
from casbackup.qemu.qmp import TIMEOUT_S, QmpClient
from casbackup.units import TiB

_FD_NAME = "casbackup-vmstate"
_BACKGROUND = "background-snapshot"
_HARMLESS = frozenset({"events"})
"""Capabilities that may stay as they are."""
_BANDWIDTH_BYTES_S = 1 * TiB
"""No limit: a page that the guest waits for would wait for the limit, too."""
_POLL_S = 0.002
_IDLE = frozenset({"none", "completed", "failed", "cancelled"})
"""States of a migration that is none."""
_CANCELS_SINCE = 9, 0, 0
"""Before, a background snapshot that is cancelled or fails leaves the memory protected, and the guest hangs when it
next writes there (seen with 7.2, not with 10.0). It must run to its end, and somebody must take what it sends."""
_STANDING_STILL = frozenset({"paused", "finish-migrate", "postmigrate"})
"""What QEMU calls it when we, or a migration, have stopped the guest. It may also stop for an I/O error of its own."""
_PATIENCE_S = 20.0
"""For a guest to go on."""
_END_S = 600.0
"""For a migration to end that was given up, and may not be cancelled."""


class StateWay(StrEnum):
    """How the memory is saved."""

    AUTO = "auto"
    """In the background, else with the guest paused."""
    BACKGROUND = "background"
    PAUSED = "paused"


class SavedState(NamedTuple):
    """``pause_s``: how long the guest stood still; ``note``: why not in the background, if that was wanted."""

    way: StateWay
    pause_s: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Undo:
    """What to do to QEMU so that it is as before. ``paused``: the guest stands still because of us. ``cancels``: a
    migration may be cancelled.
    """

    paused: bool = False
    cancels: bool = True
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    max_bandwidth: int = 0

    def message(self) -> dict[str, Any]:
        """For another process; ``Undo(**message)`` is the same again."""
        return asdict(self)


class StateSink(Protocol):
    """Whoever takes the state, and cleans up should this process die."""

    def state_stream(self) -> AbstractContextManager[socket.socket]:
        """What QEMU is to send to; it has a copy of its own when this is left."""

    def undo(self, what: Undo | None) -> None:
        """Told what would have to be undone before it is done; None: nothing any more."""


Check = Callable[[], None]
"""Raises if there is a reason to end."""


class StateSaver(Protocol):
    """Saves the state once: ``prepare``, ``save``, ``look`` until it is done, ``finish``; else ``abandon``.

    One thread.
    """

    @property
    def saved(self) -> SavedState | None:
        """Once ``save`` has returned; None: no state is saved."""

    @property
    def is_done(self) -> bool:
        """All is sent."""

    def prepare(self) -> None:
        """Make QEMU ready. The guest notices nothing.

        :raise LiveBackupBusy: when a migration is under way.
        :raise VmStateUnsupported: when QEMU, its host or a device of the VM cannot do it.
        """

    def save(self, take: Callable[[], None], check: Check) -> None:
        """Pause the guest, ``take`` its disks' point in time, begin to save and let the guest go on.

        :raise BackupBroken: when the guest would have to stand still for longer than it may.
        :raise VmStateFailed: when the migration fails. Errors of ``take`` and ``check`` come out, too.
        """

    def look(self) -> None:
        """See whether all is sent. :raise VmStateFailed: when it is not going to be."""

    def finish(self) -> None:
        """QEMU is as before."""

    def abandon(self) -> None:
        """End what is under way, and see to it that the guest runs and QEMU is as before. Never needed after
        ``finish``, but harmless. Errors as ``QmpClient.execute``.
        """


def state_saver(
    qmp: QmpClient, sink: StateSink, way: StateWay | None, *, can_activate: bool, max_pause_s: float
) -> StateSaver:
    """``can_activate``: QEMU has ``blockdev-set-active``. ``max_pause_s``: for the way ``background``."""
    if way is None:
        return _NoState()
    return _Saver(qmp, sink, way, can_activate=can_activate, max_pause_s=max_pause_s)


class _NoState:
    """Only the disks' point in time is taken."""

    saved = None
    is_done = True

    def prepare(self) -> None: ...

    def save(self, take: Callable[[], None], check: Check) -> None:
        take()

    def look(self) -> None: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


class _Saver:
    def __init__(
        self, qmp: QmpClient, sink: StateSink, way: StateWay, *, can_activate: bool, max_pause_s: float
    ) -> None:
        self._qmp = qmp
        self._sink = sink
        self._way = way
        self._can_activate = can_activate
        self._max_pause_s = max_pause_s
        self._undo: Undo | None = None
        self._note = ""
        self.saved: SavedState | None = None
        self.is_done = False

    def prepare(self) -> None:
        _require_able(self._qmp)
        known = {item["capability"]: item["state"] for item in self._qmp.execute("query-migrate-capabilities")}
        disturbing = [name for name, on in known.items() if on and name not in _HARMLESS and name != _BACKGROUND]
        before = dict.fromkeys(disturbing, True)
        if _BACKGROUND in known:  # switched off by ``forget`` if it was on
            before[_BACKGROUND] = False
        bandwidth = self._qmp.execute("query-migrate-parameters")["max-bandwidth"]
        settings = Undo(capabilities=before, max_bandwidth=bandwidth)
        self._change(settings)
        self._way = self._choose(before)
        cancels = self._way is StateWay.PAUSED or self._qmp.version >= _CANCELS_SINCE
        self._change(replace(settings, cancels=cancels))
        self._qmp.execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH_BYTES_S})
        with self._sink.state_stream() as stream:
            self._qmp.pass_fd(_FD_NAME, stream.fileno())

    def save(self, take: Callable[[], None], check: Check) -> None:
        """In the way ``paused`` everything is saved when it returns."""
        assert self._undo is not None
        self._change(replace(self._undo, paused=True))
        began_s = time.monotonic()
        try:
            if self._way is StateWay.BACKGROUND:
                self._save_in_background(take, check, began_s + self._max_pause_s)
            else:
                self._save_paused(take, check)
        finally:
            _resume(self._qmp)
        self.saved = SavedState(self._way, time.monotonic() - began_s, self._note)
        self._change(replace(self._undo, paused=False))

    def look(self) -> None:
        self.is_done = self.is_done or _migration(self._qmp)["status"] == "completed"

    def finish(self) -> None:
        assert self._undo is not None
        _restore_settings(self._qmp, self._undo)
        self._change(None)

    def abandon(self) -> None:
        if self._undo is not None:
            undo(self._qmp, self._undo)
            self._change(None)

    def _change(self, to: Undo | None) -> None:
        self._undo = to
        self._sink.undo(to)

    def _choose(self, before: Mapping[str, bool]) -> StateWay:
        """Switch on what the way needs, and off all else; returns the way."""
        off = dict.fromkeys(before, False)
        if self._way is not StateWay.PAUSED:
            self._note = _try_background(self._qmp, off)
            if not self._note:
                return StateWay.BACKGROUND
            if self._way is StateWay.BACKGROUND:
                raise VmStateUnsupported(f"the memory cannot be saved while the guest runs: {self._note}")
        if not self._can_activate:
            reason = "saving the memory of a paused guest needs QEMU 10.0 or later"
            raise VmStateUnsupported(f"{self._note}; {reason}" if self._note else reason)
        _set_capabilities(self._qmp, off)
        return StateWay.PAUSED

    def _save_in_background(self, take: Callable[[], None], check: Check, deadline_s: float) -> None:
        self._stop()
        take()
        self._require_time(deadline_s)
        self._migrate()
        while not _is_tracking(self._qmp):
            check()
            self._require_time(deadline_s)
            time.sleep(_POLL_S)

    def _require_time(self, deadline_s: float) -> None:
        if time.monotonic() > deadline_s:
            raise BackupBroken(f"the guest would stand still for more than {self._max_pause_s:g} s")

    def _save_paused(self, take: Callable[[], None], check: Check) -> None:
        self._stop()
        self._migrate()
        while not self.is_done:
            check()
            self._qmp.wait_event(10 * _POLL_S)
            self.look()
        self._qmp.execute("blockdev-set-active", {"active": True})
        take()

    def _stop(self) -> None:
        self._qmp.execute("stop", timeout_s=max(TIMEOUT_S, self._max_pause_s))

    def _migrate(self) -> None:
        try:
            self._qmp.execute("migrate", {"uri": f"fd:{_FD_NAME}"})
        except QmpCommandFailed as error:
            raise VmStateFailed(error.message) from error


def undo(qmp: QmpClient, what: Undo) -> None:
    """End the migration and set QEMU back. Done by the backup, and in its place by its sink when it has died.

    :raise QmpTimeout: when the migration does not end. Other errors as ``QmpClient.execute``.
    """
    if what.cancels:
        with contextlib.suppress(QmpCommandFailed):
            qmp.execute("migrate_cancel")
    wake(qmp, what)
    _wait_ended(qmp)
    wake(qmp, what)  # a migration that was about to stop the guest, or to set its state, may have done so meanwhile
    with contextlib.suppress(QmpCommandFailed):
        qmp.execute("closefd", {"fdname": _FD_NAME})
    _restore_settings(qmp, what)


def wake(qmp: QmpClient, what: Undo) -> None:
    """Let the guest go on if it stands still because of us; the rest is left to ``undo``. Errors as ``undo``."""
    if what.paused:
        _resume(qmp)


def forget(qmp: QmpClient) -> None:
    """Switch off what a backup left on that was killed together with its sink: nobody else keeps it on."""
    with contextlib.suppress(QmpCommandFailed):  # a storage daemon does not migrate, or somebody is migrating
        _set_capabilities(qmp, {_BACKGROUND: False})


def _require_able(qmp: QmpClient) -> None:
    """Errors as ``StateSaver.prepare``."""
    info = qmp.execute("query-migrate")
    if info.get("status", "none") not in _IDLE:
        raise LiveBackupBusy(f"QEMU is migrating the VM, or saves its state for somebody: {info['status']}")
    if info.get("blocked-reasons"):
        raise VmStateUnsupported(f"the state of the VM cannot be saved: {'; '.join(info['blocked-reasons'])}")
    status = qmp.execute("query-status")["status"]
    if status != "running":
        raise VmStateUnsupported(f"the guest is not running ({status}): its memory is saved only while it does")


def _try_background(qmp: QmpClient, off: Mapping[str, bool]) -> str:
    """Switch it on; returns why that does not go, if it does not."""
    if _BACKGROUND not in off:
        return "this QEMU has no background snapshots of memory"
    try:
        _set_capabilities(qmp, {**off, _BACKGROUND: True})
    except QmpCommandFailed as error:
        return error.message
    return ""


def _migration(qmp: QmpClient) -> Mapping[str, Any]:
    """:raise VmStateFailed: when it has failed."""
    info: Mapping[str, Any] = qmp.execute("query-migrate")
    if info.get("status", "none") in ("none", "failed", "cancelled"):
        reason = info.get("error-desc") or info.get("status", "QEMU has forgotten about it")
        raise VmStateFailed(f"QEMU could not save the VM's state: {reason}")
    return info


def _is_tracking(qmp: QmpClient) -> bool:
    """Whether the guest may run on: what it writes is saved first. Earlier versions let it run by themselves."""
    info = _migration(qmp)
    ram = info.get("ram", {})
    return info["status"] == "completed" or int(ram.get("normal", 0) + ram.get("duplicate", 0)) > 0


def _resume(qmp: QmpClient) -> None:
    """See to it that the guest does not stand still because of us.

    :raise QmpTimeout: when it does not. Other errors as ``QmpClient.execute``.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while qmp.execute("query-status")["status"] in _STANDING_STILL:
        if time.monotonic() > deadline_s:
            raise QmpTimeout(f"the guest does not go on within {_PATIENCE_S:g} s")
        try:
            qmp.execute("cont")
        except QmpCommandFailed:  # not in every state of a migration; it does not last
            time.sleep(_POLL_S)


def _wait_ended(qmp: QmpClient) -> None:
    deadline_s = time.monotonic() + _END_S
    while qmp.execute("query-migrate").get("status", "none") not in _IDLE:
        if time.monotonic() > deadline_s:
            raise QmpTimeout(f"the migration in QEMU did not end within {_END_S:g} s")
        qmp.wait_event(10 * _POLL_S)


def _restore_settings(qmp: QmpClient, before: Undo) -> None:
    _set_capabilities(qmp, before.capabilities)
    qmp.execute("migrate-set-parameters", {"max-bandwidth": before.max_bandwidth})


def _set_capabilities(qmp: QmpClient, states: Mapping[str, bool]) -> None:
    if states:
        items = [{"capability": name, "state": on} for name, on in states.items()]
        qmp.execute("migrate-set-capabilities", {"capabilities": items})
