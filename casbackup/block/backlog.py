"""Data of bounded size between those who must not wait and the one who may be slow.

A guest's write waits until the old data, or the new, is here: in memory. What becomes of it, others decide. When they
fail or are too slow the backup is lost, never a write. What the memory has no room for may go to a file before that.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from casbackup.block.buffers import BufferPool
from casbackup.block.device import BlockDevice
from casbackup.block.slots import SLOT_BYTES, Slots
from casbackup.errors import BackupBroken, CasbackupError

BACKGROUND_SHARE = 0.5
"""Of the memory, so much at the most is taken by the background, so that a guest's write finds room."""
_OVERFLOW_SHARE = 0.5
"""When more of the memory is taken, data moves to the file: early enough that a guest does not wait for a disk."""
_LOOK_S = 0.02
"""How soon it is seen that somebody waits for a buffer although less is taken: there are several sizes of them."""
_WINDOW_SHARE = 0.25
"""Of the memory, so much at the most is under way: that cannot move to the file any more."""
_ZERO_ROOM_BYTES = 1
_GATHER_S = 0.002
"""A taker that was idle waits so long for more to come: waking it for each piece costs as much as taking it in."""


class Piece(NamedTuple):
    """A range of a disk. ``room`` holds its data; None: it is in the overflow, at ``position``."""

    disk: str
    offset: int
    length: int
    zero: bool
    room: memoryview | None
    position: int = 0

    @property
    def weight_bytes(self) -> int:
        """What it takes of memory or file, about."""
        return SLOT_BYTES if self.zero else self.length

    @property
    def held_bytes(self) -> int:
        """What it takes of memory, about."""
        return 0 if self.room is None else self.weight_bytes


class Backlog:
    """Pieces of several disks, in no order. Any number of threads may put them in, one takes them out."""

    def __init__(self, pool: BufferPool, overflow: BlockDevice | None = None) -> None:
        """``overflow``: where data goes that the memory has no room for. It stays the caller's; its size is a limit."""
        self._pool = pool
        self._background_spare_bytes = int(pool.limit_bytes * (1 - BACKGROUND_SHARE))
        self._overflow_above_bytes = int(pool.limit_bytes * _OVERFLOW_SHARE)
        self._most_under_way_bytes = int(pool.limit_bytes * _WINDOW_SHARE)
        self._overflow = overflow
        self._slots = Slots(0 if overflow is None else overflow.size_bytes)
        self._pieces: deque[Piece] = deque()
        self._overflown: deque[Piece] = deque()
        self._moving = self._under_way = self._under_way_bytes = 0
        self._held_bytes = 0
        """Of what is under way, what is in memory."""
        self._taker_waits = False
        self._failure: CasbackupError | None = None
        lock = threading.Lock()
        self._changed, self._crowded = threading.Condition(lock), threading.Condition(lock)
        if overflow is not None:
            threading.Thread(target=self._move, args=(overflow,), name="overflow", daemon=True).start()

    @property
    def failure(self) -> CasbackupError | None:
        """Why the backup is broken, if it is. Once set it stays."""
        return self._failure

    @property
    def waiting_bytes(self) -> int:
        """Memory that holds what nobody has taken out yet."""
        return max(0, self._pool.lent_bytes - self._held_bytes)

    @property
    def overflown_bytes(self) -> int:
        """Of the file, so much is taken now."""
        return self._slots.taken_bytes

    # --- putting in

    def room(self, length: int, *, timeout_s: float | None = None, background: bool = False) -> memoryview | None:
        """A buffer of ``length`` bytes, up to 1 MiB, for ``write``; ``give_back`` it otherwise.

        None when none came free within ``timeout_s``, or when the backup is broken.
        """
        spare_bytes = self._background_spare_bytes if background else 0
        return self._pool.take(length, timeout_s=timeout_s, spare_bytes=spare_bytes)

    def room_for_zeros(self, *, timeout_s: float | None = None, background: bool = False) -> memoryview | None:
        """As ``room``, for ``zero``: what bounds the number of pieces."""
        return self.room(_ZERO_ROOM_BYTES, timeout_s=timeout_s, background=background)

    def give_back(self, room: memoryview) -> None:
        """What ``room`` gave is not needed after all."""
        self._pool.give_back(room)

    def write(self, disk: str, offset: int, room: memoryview, length: int | None = None) -> bool:
        """Hand over what ``room`` gave, filled, or only its first ``length`` bytes.

        False when the backup is broken: it is dropped then.
        """
        return self._put(Piece(disk, offset, len(room) if length is None else length, False, room), room)

    def zero(self, disk: str, offset: int, length: int, room: memoryview) -> bool:
        """The range is zero. ``room`` is taken over, of any size; False as for ``write``."""
        return self._put(Piece(disk, offset, length, True, room), room)

    def fail(self, error: CasbackupError) -> None:
        """The backup is broken: nobody waits any more, and everything is dropped. Only the first reason counts."""
        with self._changed:
            if self._failure is not None:
                return
            self._failure = error
            dropped = [*self._pieces, *self._overflown]
            self._pieces.clear()
            self._overflown.clear()
            self._changed.notify_all()
            self._crowded.notify_all()
        self._pool.close()
        self._release(dropped)

    # --- taking out

    def take(self, window_bytes: int) -> Sequence[Piece]:
        """Wait for pieces, and take some; none when the backup is broken.

        No more than about ``window_bytes`` are under way at a time: taken, and not ``consumed``.
        """
        window_bytes = min(window_bytes, self._most_under_way_bytes)
        if not self._wait_for_pieces(window_bytes):
            return ()
        taken: list[Piece] = []
        with self._changed:
            while self._under_way_bytes < window_bytes and (queue := self._pieces or self._overflown):
                piece = queue.popleft()
                self._under_way_bytes += piece.weight_bytes
                self._held_bytes += piece.held_bytes
                taken.append(piece)
            self._under_way += len(taken)
        return taken

    def position(self, piece: Piece) -> int:
        """Where its data lies: in the pool's memory, or if it has no room in the overflow."""
        return piece.position if piece.room is None else self._pool.position(piece.room)

    def consumed(self, pieces: Sequence[Piece]) -> None:
        """What was taken is not needed any more."""
        self._release(pieces)
        with self._changed:
            self._under_way -= len(pieces)
            self._under_way_bytes -= sum(piece.weight_bytes for piece in pieces)
            self._held_bytes -= sum(piece.held_bytes for piece in pieces)
            if self._taker_waits or self._is_settled():
                self._changed.notify_all()
            self._crowded.notify()

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

    # --- inside

    def _put(self, piece: Piece, room: memoryview) -> bool:
        with self._changed:
            if self._failure is None:
                self._pieces.append(piece)
                if self._taker_waits:
                    self._changed.notify_all()
                if self._overflow is not None:
                    self._crowded.notify()
                return True
        self._pool.give_back(room)
        return False

    def _is_settled(self) -> bool:
        busy = self._pieces or self._overflown or self._moving or self._under_way
        return self._failure is not None or not busy

    def _wait_for_pieces(self, window_bytes: int) -> bool:
        """False when the backup is broken."""
        with self._changed:
            idle = not (self._pieces or self._overflown or self._under_way)
            if not self._is_ready(window_bytes):
                self._taker_waits = True
                self._changed.wait_for(lambda: self._is_ready(window_bytes))
                self._taker_waits = False
        if idle:
            time.sleep(_GATHER_S)
        return self._failure is None

    def _is_ready(self, window_bytes: int) -> bool:
        has_some = bool(self._pieces or self._overflown) and self._under_way_bytes < window_bytes
        return has_some or self._failure is not None

    def _release(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.room is not None:
                self._pool.give_back(piece.room)
            else:
                with self._changed:
                    self._slots.give_back(piece.position)

    # --- moving to the file: the newest, for the oldest are wanted next

    def _move(self, overflow: BlockDevice) -> None:
        """In a thread of its own, until the backup is broken."""
        while (found := self._next_to_move()) is not None:
            piece, position = found
            assert piece.room is not None
            try:
                if not piece.zero:
                    overflow.write(position, piece.room[: piece.length])
            except CasbackupError as error:
                self.fail(BackupBroken(f"the spool file cannot be written to: {error.message}"))
            self._pool.give_back(piece.room)
            self._moved(piece._replace(room=None, position=position))

    def _next_to_move(self) -> tuple[Piece, int] | None:
        with self._crowded:
            while self._failure is None:
                if self._is_crowded():
                    position = self._slots.take(self._pieces[-1].weight_bytes)
                    if position is not None:
                        self._moving += 1
                        return self._pieces.pop(), position
                self._crowded.wait(_LOOK_S if self._pieces else None)
        return None

    def _is_crowded(self) -> bool:
        if self._overflow is None or not self._pieces:
            return False
        return self._pool.is_wanted or self._pool.lent_bytes > self._overflow_above_bytes

    def _moved(self, piece: Piece) -> None:
        with self._changed:
            self._moving -= 1
            if self._failure is None:
                self._overflown.append(piece)
                if self._taker_waits:
                    self._changed.notify_all()
