"""What a backlog says of itself; what it does is tested with a sink and with an overflow."""

from __future__ import annotations

from casbackup.block.backlog import Backlog
from casbackup.block.buffers import BufferPool
from casbackup.block.memory import MemoryDevice
from tests.waiting import wait_until

MiB = 1024 * 1024


def put(backlog: Backlog, number: int) -> None:
    room = backlog.room(MiB)
    assert room is not None
    assert backlog.write("0", number * MiB, room)


def test_what_is_under_way_does_not_wait_any_more() -> None:
    backlog = Backlog(BufferPool(16 * MiB))
    for number in range(3):
        put(backlog, number)
    assert backlog.waiting_bytes == 3 * MiB
    taken = backlog.take(2 * MiB)
    assert len(taken) == 2
    assert backlog.waiting_bytes == MiB
    backlog.consumed(taken)
    assert backlog.waiting_bytes == MiB
    backlog.consumed(backlog.take(2 * MiB))
    assert backlog.waiting_bytes == 0


def test_what_is_under_way_from_the_file_takes_no_memory() -> None:
    """It must not make the memory look emptier than it is, or nobody would slow down."""
    backlog = Backlog(BufferPool(4 * MiB), MemoryDevice(bytearray(8 * MiB)))
    for number in range(4):
        put(backlog, number)
    wait_until(lambda: backlog.waiting_bytes <= 2 * MiB and backlog.overflown_bytes >= 2 * MiB)
    in_memory = backlog.waiting_bytes
    assert in_memory > 0
    while in_memory:
        piece = backlog.take(MiB)
        backlog.consumed(piece)
        in_memory -= sum(item.length for item in piece)
    assert backlog.waiting_bytes == 0
    from_file = backlog.take(MiB)
    assert [piece.room for piece in from_file] == [None]
    put(backlog, 5)
    assert backlog.waiting_bytes == MiB
    backlog.consumed(from_file)
    assert backlog.waiting_bytes == MiB
