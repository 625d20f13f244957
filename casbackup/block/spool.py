"""Memory of bounded size between those who must not wait and the one who may be slow.

A guest's write waits until the old data, or the new, is here: in memory. What becomes of it, another thread
decides. When that one fails or is too slow the backup is lost, never a write.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import NamedTuple, Protocol

from casbackup.block.buffers import BufferPool
from casbackup.errors import BackupBroken, CasbackupError
from casbackup.limits import SINK_MEMORY_BYTES

BACKGROUND_SHARE = 0.5
"""Of the memory, so much at the most is taken by the background, so that a guest's write finds room."""
_ZERO_ROOM_BYTES = 1
_GATHER_S = 0.002
"""A consumer that was idle waits so long for more to come: waking it for each event costs as much as taking it in."""


class Consumer(Protocol):
    """Gets every range of every disk once, in any order, in one thread that is not the caller's.

    It may raise any error; that breaks the backup. ``data`` is valid until it returns: it copies what it keeps.
    """

    def write(self, disk: str, offset: int, data: memoryview) -> None: ...

    def zero(self, disk: str, offset: int, length: int) -> None: ...


class _Event(NamedTuple):
    disk: str
    offset: int
    length: int
    room: memoryview
    zero: bool


class Spool:
    """Hands events of several disks to one consumer. Any number of threads may put events in."""

    def __init__(self, consumer: Consumer, *, limit_bytes: int = SINK_MEMORY_BYTES) -> None:
        """Starts the thread that calls ``consumer``. ``limit_bytes``: of the memory for data not yet consumed.

        :raise ValueError: for a limit below 2 MiB.
        """
        self._consumer = consumer
        self._pool = BufferPool(limit_bytes)
        self._background_spare_bytes = int(limit_bytes * (1 - BACKGROUND_SHARE))
        self._events: deque[_Event] = deque()
        self._consuming = False
        self._closing = False
        self._failure: CasbackupError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> CasbackupError | None:
        """Why the backup is broken, if it is. Once set it stays."""
        return self._failure

    @property
    def waiting_bytes(self) -> int:
        """Memory that is taken now."""
        return self._pool.lent_bytes

    def room(self, length: int, *, timeout_s: float | None = None, background: bool = False) -> memoryview | None:
        """A buffer of ``length`` bytes, up to 1 MiB, for ``write``; ``give_back`` it otherwise.

        None when none came free within ``timeout_s``, or when the backup is broken.
        """
        spare_bytes = self._background_spare_bytes if background else 0
        return self._pool.take(length, timeout_s=timeout_s, spare_bytes=spare_bytes)

    def room_for_zeros(self, *, timeout_s: float | None = None, background: bool = False) -> memoryview | None:
        """As ``room``, for ``zero``: what bounds the number of events."""
        return self.room(_ZERO_ROOM_BYTES, timeout_s=timeout_s, background=background)

    def give_back(self, room: memoryview) -> None:
        """What ``room`` gave is not needed after all."""
        self._pool.give_back(room)

    def write(self, disk: str, offset: int, room: memoryview) -> bool:
        """Hand over what ``room`` gave, filled. False when the backup is broken: it is dropped then."""
        return self._put(_Event(disk, offset, len(room), room, False))

    def zero(self, disk: str, offset: int, length: int, room: memoryview) -> bool:
        """The range is zero. ``room`` is taken over, of any size; False as for ``write``."""
        return self._put(_Event(disk, offset, length, room, True))

    def fail(self, error: CasbackupError) -> None:
        """The backup is broken: nobody waits any more, and everything is dropped. Only the first reason counts."""
        with self._changed:
            if self._failure is not None:
                return
            self._failure = error
            dropped, self._events = self._events, deque()
            self._changed.notify_all()
        self._pool.close()
        for event in dropped:
            self._pool.give_back(event.room)

    def finish(self, *, timeout_s: float | None = None) -> None:
        """Wait until all that was put in so far has been consumed.

        :raise BackupBroken: when the backup is broken, or it takes longer than ``timeout_s``.
        """
        with self._changed:
            self._changed.wait_for(self._is_settled, timeout_s)
            if self._failure is not None:
                raise BackupBroken(str(self._failure)) from self._failure
            if not self._is_settled():
                raise BackupBroken(f"the data was not stored within {timeout_s:g} s")

    def close(self, *, timeout_s: float = 5.0) -> None:
        """End the thread; what it has not begun is dropped. A consumer that hangs is left behind."""
        self.fail(BackupBroken("the backup was ended"))
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _put(self, event: _Event) -> bool:
        with self._changed:
            if self._failure is None:
                self._events.append(event)
                if not self._consuming:
                    self._changed.notify_all()
                return True
        self._pool.give_back(event.room)
        return False

    def _is_settled(self) -> bool:
        return self._failure is not None or not (self._events or self._consuming)

    def _run(self) -> None:
        while events := self._next():
            for event in events:
                if self._failure is None:
                    self._try_to_consume(event)
                self._pool.give_back(event.room)

    def _next(self) -> deque[_Event]:
        """All events that are there, at least one; none at the end."""
        with self._changed:
            self._consuming = False
            waited = not self._events
            if waited:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._events or self._closing or self._failure is not None)
            self._consuming = bool(self._events)
        if waited and self._consuming:
            time.sleep(_GATHER_S)
        with self._changed:
            events, self._events = self._events, deque()
            return events

    def _try_to_consume(self, event: _Event) -> None:
        try:
            self._consume(event)
        except CasbackupError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001  whatever the consumer does, the guest goes on
            self.fail(BackupBroken(f"the backup failed inside: {type(error).__name__}: {error}"))

    def _consume(self, event: _Event) -> None:
        if event.zero:
            self._consumer.zero(event.disk, event.offset, event.length)
        else:
            self._consumer.write(event.disk, event.offset, event.room)
