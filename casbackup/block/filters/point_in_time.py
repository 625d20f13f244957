"""The content of a device at one instant, while it is being written to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from casbackup.block.buffers import MAX_BUFFER_BYTES
from casbackup.block.device import BlockDevice
from casbackup.block.filters.clusters import CLUSTER_BYTES, ClusterMap, Run
from casbackup.block.filters.ranges import RangeLocks
from casbackup.block.filters.saving import Saver
from casbackup.errors import BackupBroken, CasbackupError, GuestWriteRefused

UNSAVED = 0
SAVED = 1

STEP_CLUSTERS = MAX_BUFFER_BYTES // CLUSTER_BYTES
"""Clusters that are read at a time, and so how many a write may have to wait for."""

_LOOK_S = 0.1
"""How soon whoever waits for the saver sees that all is over."""


class OnFailure(Enum):
    """Who loses when old data cannot be saved."""

    BREAK_GUEST_WRITE = "break-guest-write"
    """The write that would have overwritten it is refused; the point in time stays whole."""
    BREAK_BACKUP = "break-backup"
    """The point in time is lost; the write goes on as if there had been none."""


@dataclass(frozen=True, slots=True)
class Policy:
    on_failure: OnFailure = OnFailure.BREAK_BACKUP
    timeout_s: float | None = 2.0
    """How long one write may wait for the saving of what it overwrites before that counts as failed."""


class PointInTime:
    """Each cluster of 64 KiB is saved once: before it is overwritten, or earlier by the background.

    What is not saved is unchanged, so the old content is either on the device or with the saver. A cluster is
    held while it is read and handed over, and saved when the saver has it in its memory, not when it is stored.
    """

    def __init__(self, device: BlockDevice, saver: Saver, policy: Policy) -> None:
        """``device`` stays the caller's, who calls ``before_change`` before every change from now on."""
        self.device = device
        self.clusters = ClusterMap(device.size_bytes)
        self._saver = saver
        self._policy = policy
        self._locks = RangeLocks()
        self._failure: CasbackupError | None = None
        self._ended = False
        self._guests = 0
        self._guest_done = threading.Condition()

    @property
    def failure(self) -> CasbackupError | None:
        """Why the point in time is lost, if it is."""
        return self._failure

    @property
    def is_over(self) -> bool:
        return self._ended or self._failure is not None

    @property
    def unsaved_bytes(self) -> int:
        """How much is not saved yet, in whole clusters."""
        return self.clusters.count(UNSAVED) * CLUSTER_BYTES

    def before_change(self, offset: int, length: int) -> None:
        """Save what is not saved of the clusters that the range touches.

        :raise GuestWriteRefused: when that failed and the policy is ``BREAK_GUEST_WRITE``. No other error.
        """
        first, stop = self.clusters.touching(offset, length)
        if self.is_over or not self.clusters.any(UNSAVED, first, stop):
            return
        with self._guest_waits():
            try:
                self.save(first, stop, timeout_s=self._policy.timeout_s)
            except Exception as error:  # noqa: BLE001  whatever goes wrong, the policy says who loses
                self._lose(f"bytes {offset} to {offset + length} were not saved before a write: {error}", error)

    def save(
        self, first: int, stop: int, *, zero: bool | None = None, timeout_s: float | None, background: bool = False
    ) -> None:
        """Save the clusters from ``first`` up to ``stop`` that are not saved. Ends early when all is over.

        ``zero``: whether they are known to be zero, or known not to be, all of them.

        :raise TimeoutError: when it took longer than ``timeout_s``.
        :raise CasbackupError: when a cluster cannot be read, or the saver cannot take it.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.is_over:
            found = self.clusters.next(UNSAVED, first)
            if found is None or found >= stop:
                return
            most = stop if zero else min(stop, found + STEP_CLUSTERS)
            self._save_run(self.clusters.run_at(found, most), zero, deadline, background)

    @contextlib.contextmanager
    def held(self, first: int, stop: int, *, timeout_s: float | None = None) -> Iterator[Run]:
        """During the block nobody saves the clusters, so unsaved ones stay unchanged.

        Gives the run of one state that begins with ``first``; it may end before ``stop``.
        """
        with self._locks.hold(first, stop, timeout_s=timeout_s):
            yield self.clusters.run_at(first, stop)

    def let_guests_go_first(self, at_most_s: float) -> None:
        """Wait while a guest's write is waiting, but no longer than ``at_most_s``."""
        if self._guests:
            with self._guest_done:
                self._guest_done.wait_for(lambda: not self._guests, at_most_s)

    def fail(self, error: CasbackupError) -> None:
        """The point in time is lost: writes go through as they come. Only the first reason counts."""
        if self._failure is None:
            self._failure = error

    def end(self) -> None:
        """Nobody needs it any more. Harmless when it is over."""
        self._ended = True

    def check(self) -> None:
        """:raise BackupBroken: when it is over, and why."""
        if self._failure is not None:
            raise BackupBroken(str(self._failure)) from self._failure
        if self._ended:
            raise BackupBroken("the backup was ended")

    def _save_run(self, run: Run, zero: bool | None, deadline: float | None, background: bool) -> None:
        """Save a run of unsaved clusters; does nothing if one of them is no longer so when it is held."""
        offset, length = self.clusters.span(run.first, run.stop)
        room = self._room(1 if zero else length, deadline, background)
        if room is None:
            return
        handed_over = False
        try:
            with self.held(run.first, run.stop, timeout_s=_left(deadline)) as now:
                if now == run:
                    is_zero = self._is_zero(offset, length) if zero is None else zero
                    if not is_zero:
                        self.device.read_into(offset, room)
                    handed_over = True
                    self._hand_over(offset, length, room, is_zero)
                    self.clusters.mark(SAVED, run.first, run.stop)
        finally:
            if not handed_over:
                self._saver.give_back(room)

    def _room(self, length: int, deadline: float | None, background: bool) -> memoryview | None:
        """A room of the saver's; None when all is over meanwhile.

        :raise TimeoutError: when there was none by ``deadline``.
        """
        while not self.is_over:
            left = _left(deadline)
            step_s = _LOOK_S if left is None else min(left, _LOOK_S)
            room = self._saver.room(length, timeout_s=step_s, background=background)
            if room is not None:
                return room
            if left is not None and left <= _LOOK_S:
                raise TimeoutError("the backup does not take data fast enough")
        return None

    def _hand_over(self, offset: int, length: int, room: memoryview, zero: bool) -> None:
        if zero:
            self._saver.save_zeros(offset, length, room)
        else:
            self._saver.save(offset, room)

    def _is_zero(self, offset: int, length: int) -> bool:
        if not self.device.capabilities.knows_zeros:
            return False
        extent = next(self.device.extents(offset, length))
        return extent.zero and extent.length == length

    @contextlib.contextmanager
    def _guest_waits(self) -> Iterator[None]:
        with self._guest_done:
            self._guests += 1
        try:
            yield
        finally:
            with self._guest_done:
                self._guests -= 1
                self._guest_done.notify_all()

    def _lose(self, reason: str, error: Exception) -> None:
        """A guest's write could not wait for its old data to be saved."""
        if self.is_over:
            return
        if self._policy.on_failure is OnFailure.BREAK_GUEST_WRITE:
            raise GuestWriteRefused(reason) from error
        failure = BackupBroken(reason)
        failure.__cause__ = error
        self.fail(failure)


def _left(deadline: float | None) -> float | None:
    """Seconds to a time of the monotonic clock, never below zero."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
