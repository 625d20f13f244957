"""Saves what a guest is about to overwrite, so that a backup sees the disk as it was at one instant.

    writes --> CopyBeforeWrite --> the disk
                  |        ^
      old data    v        |   what is not overwritten
                saver <-- Background, or SnapshotView for readers

The filter stands in the stack all the time and costs next to nothing until ``begin`` is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from casbackup.block.device import BlockDevice
from casbackup.block.filters.base import Filter
from casbackup.block.filters.gate import Gate
from casbackup.block.filters.point_in_time import PointInTime, Policy
from casbackup.block.filters.saving import Saver
from casbackup.errors import BackupBroken
from casbackup.fs import Buffer

QUIESCE_TIMEOUT_S = 2.0
"""So long at the most do writes wait for those that were under way when a point in time begins."""


class CopyBeforeWrite(Filter):
    """Before the first change of each 64 KiB cluster since ``begin`` its old content is read and saved.

    Several may be stacked, each with a point in time of its own.

    :raise GuestWriteRefused: from changes, with the policy ``BREAK_GUEST_WRITE`` only.
    """

    def __init__(self, device: BlockDevice) -> None:
        """Takes over ``device``."""
        super().__init__(device)
        self._gate = Gate()
        self._point: PointInTime | None = None

    @property
    def point(self) -> PointInTime | None:
        """The point in time that changes are kept from, if there is one."""
        return None if self._point is None or self._point.is_over else self._point

    def begin(self, saver: Saver, policy: Policy | None = None) -> PointInTime:
        """Keep the content of this instant, until ``end`` of what is returned. As ``begin_together``."""
        return begin_together([Start(self, saver)], policy)[0]

    def write(self, offset: int, data: Buffer) -> None:
        with self._changing(offset, len(data)):
            self._below.write(offset, data)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        with self._changing(offset, length):
            self._below.write_zeros(offset, length, may_trim=may_trim)

    def discard(self, offset: int, length: int) -> None:
        with self._changing(offset, length):
            self._below.discard(offset, length)

    def quiesced(self, timeout_s: float) -> contextlib.AbstractContextManager[None]:
        """No change is under way during the block; new ones wait.

        :raise TimeoutError: when those under way do not end within ``timeout_s``.
        """
        return self._gate.closed(timeout_s)

    def close(self) -> None:
        if self._point is not None:
            self._point.end()
        super().close()

    @contextlib.contextmanager
    def _changing(self, offset: int, length: int) -> Iterator[None]:
        with self._gate.passing():
            point = self._point
            if point is not None:
                point.before_change(offset, length)
            yield

    def _begin(self, saver: Saver, policy: Policy) -> PointInTime:
        if self.point is not None:
            raise ValueError("a point in time is being kept already; stack another filter")
        self._point = PointInTime(self._below, saver, policy)
        return self._point


class Start(NamedTuple):
    """A disk whose point in time begins, and where its old data goes."""

    disk: CopyBeforeWrite
    saver: Saver


def begin_together(
    starts: Sequence[Start], policy: Policy | None = None, *, timeout_s: float = QUIESCE_TIMEOUT_S
) -> list[PointInTime]:
    """Keep the content that several disks have at one instant: no write is under way on any of them then.

    Writes wait meanwhile, as long as those that are under way take. Nothing is flushed.

    :raise BackupBroken: when those do not end within ``timeout_s``; nothing has begun then.
    :raise ValueError: when one of the disks keeps a point in time already; nothing has begun then.
    """
    if any(start.disk.point is not None for start in starts):
        raise ValueError("a point in time is being kept already; stack another filter")
    with contextlib.ExitStack() as quiet:
        try:
            for start in starts:
                quiet.enter_context(start.disk.quiesced(timeout_s))
        except TimeoutError as error:
            raise BackupBroken(f"no instant without writes under way: {error}") from error
        return [start.disk._begin(start.saver, policy or Policy()) for start in starts]
