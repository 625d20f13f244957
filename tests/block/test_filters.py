"""What each filter does besides being a device."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from casbackup.block.device import Extent, read_bytes
from casbackup.block.filters.check_write import CheckWrite
from casbackup.block.filters.copy_on_read import CopyOnRead
from casbackup.block.filters.faults import Fault, Faults, Rule
from casbackup.block.filters.gate import Gate
from casbackup.block.filters.operation import Operation
from casbackup.block.filters.overlay import Overlay
from casbackup.block.filters.ranges import RangeLocks
from casbackup.block.filters.throttle import BURST_S, Throttle
from casbackup.block.filters.trace import Record, Trace
from casbackup.block.filters.window import Window
from casbackup.block.memory import MemoryDevice
from casbackup.block.sparse import SparseMemory, temporary_device
from casbackup.errors import SourceChanged, SourceUnreadable, TargetUnwritable
from casbackup.testing.clock import FakeClock
from casbackup.units import GiB, KiB, TiB

CLUSTER = 64 * KiB
SIZE = 8 * CLUSTER + 1000
READ, WRITE = frozenset({Operation.READ}), frozenset({Operation.WRITE})


class Shrunk(MemoryDevice):
    now_bytes: int | None = None

    def changed_size(self) -> int | None:
        return self.now_bytes


# --- window


@pytest.mark.parametrize(("start", "size"), [(-1, 5), (0, SIZE + 1), (SIZE, 1), (512, -1)])
def test_a_window_outside(start: int, size: int) -> None:
    with pytest.raises(ValueError, match="not within"):
        Window(MemoryDevice(SIZE), start, size)


def test_a_window_of_whole_blocks() -> None:
    device = MemoryDevice(1000)
    device.capabilities = replace(device.capabilities, min_block_bytes=512)
    assert Window(device, 512, 488).size_bytes == 488
    for start, size in ((1, 512), (0, 511)):
        with pytest.raises(ValueError, match="whole blocks of 512"):
            Window(device, start, size)


def test_a_window_of_a_device_that_shrinks() -> None:
    device = Shrunk(SIZE)
    window = Window(device, 1000, 1000)
    for now, expected in ((None, None), (SIZE * 2, None), (2000, None), (1999, 999), (500, 0)):
        device.now_bytes = now
        assert window.changed_size() == expected


# --- trace


def test_a_trace_tells_of_every_call() -> None:
    clock, records = FakeClock(), list[Record]()
    slow = Faults(MemoryDevice(SIZE), Rule(READ, Fault.DELAY, delay_s=0.5), sleep=clock.pass_time)
    trace = Trace(slow, records.append, clock=clock)
    read_bytes(trace, 100, 50)
    trace.write(1, b"abc")
    trace.write_zeros(2, 10)
    trace.discard(3, 11)
    list(trace.extents(0, SIZE))
    trace.flush()
    assert records[0] == Record(Operation.READ, 100, 50, 0.5, None) and records[0].end == 150
    assert [(r.operation.value, r.offset, r.length, r.error) for r in records[1:]] == [
        ("write", 1, 3, None),
        ("write zeros", 2, 10, None),
        ("discard", 3, 11, None),
        ("extents", 0, SIZE, None),
        ("flush", 0, 0, None),
    ]
    slow.set_rules(Rule(READ))
    with pytest.raises(SourceUnreadable):
        read_bytes(trace, 0, 1)
    assert isinstance(records[-1].error, SourceUnreadable)
    slow.set_rules(Rule(frozenset({Operation.EXTENTS})))
    with pytest.raises(SourceUnreadable):
        list(trace.extents(0, SIZE))
    assert records[-1].operation is Operation.EXTENTS and isinstance(records[-1].error, SourceUnreadable)


def test_a_trace_of_extents_that_nobody_wants_to_the_end() -> None:
    records = list[Record]()
    extents = Trace(MemoryDevice(b"a" * 4096 + bytes(SIZE - 4096)), records.append).extents(0, SIZE)
    next(extents)
    assert not records
    extents.close()  # type: ignore[attr-defined]
    assert [(record.operation, record.error) for record in records] == [(Operation.EXTENTS, None)]


# --- faults


def test_faults_strike_the_nth_call_and_so_often() -> None:
    device = Faults(MemoryDevice(SIZE), Rule(READ, nth=3, times=2))
    results = [fails(lambda: read_bytes(device, 0, 1)) for _ in range(6)]
    assert results == [False, False, True, True, False, False]
    assert not fails(lambda: device.write(0, b"x"))


def test_faults_strike_a_range() -> None:
    device = Faults(MemoryDevice(SIZE), Rule(READ | WRITE, offset=100, length=10))
    for offset, length, expected in ((0, 100, False), (0, 101, True), (109, 1, True), (110, 5, False), (0, SIZE, True)):
        assert fails(lambda offset=offset, length=length: read_bytes(device, offset, length)) is expected
        assert fails(lambda offset=offset, length=length: device.write(offset, bytes(length))) is expected


def test_every_operation_can_fail() -> None:
    device = MemoryDevice(SIZE)
    faults = Faults(device, Rule(frozenset(Operation)))
    for call, error in (
        (lambda: read_bytes(faults, 0, 1), SourceUnreadable),
        (lambda: faults.extents(0, 1), SourceUnreadable),
        (lambda: faults.write(0, b"x"), TargetUnwritable),
        (lambda: faults.write_zeros(0, 1), TargetUnwritable),
        (lambda: faults.discard(0, 1), TargetUnwritable),
        (faults.flush, TargetUnwritable),
    ):
        with pytest.raises(error, match="on purpose"):
            call()  # type: ignore[operator]
    assert device.content() == bytes(SIZE)


def test_short_reads_and_writes() -> None:
    device = MemoryDevice(b"a" * SIZE)
    faults = Faults(device, Rule(READ | WRITE, Fault.SHORT, error=SourceChanged))
    buffer = bytearray(1000)
    with pytest.raises(SourceChanged, match="read at byte 0"):
        faults.read_into(0, memoryview(buffer))
    assert buffer == b"a" * 500 + bytes(500)
    with pytest.raises(SourceChanged):
        faults.write(0, b"b" * 1000)
    assert device.content()[:501] == b"b" * 500 + b"a"


def test_delays_add_up_and_come_before_the_failure() -> None:
    clock = FakeClock()
    slow = Rule(READ, Fault.DELAY, delay_s=2)
    device = Faults(MemoryDevice(SIZE), slow, Rule(READ, delay_s=3), slow, sleep=clock.pass_time)
    assert fails(lambda: read_bytes(device, 0, 1))
    assert clock.monotonic_s() == 7


def fails(call: Callable[[], object]) -> bool:
    try:
        call()
    except (SourceUnreadable, TargetUnwritable):
        return True
    return False


# --- throttle


def throttled(**limits: float) -> tuple[Throttle, FakeClock]:
    clock = FakeClock()
    return Throttle(MemoryDevice(SIZE), clock=clock, sleep=clock.pass_time, **limits), clock


def test_bytes_a_second() -> None:
    device, clock = throttled(bytes_per_s=1000)
    for _ in range(100):
        read_bytes(device, 0, 50)
        device.write(0, bytes(50))
    assert 9.79 <= clock.monotonic_s() <= 10


def test_calls_a_second() -> None:
    device, clock = throttled(calls_per_s=10, bytes_per_s=1e9)
    for _ in range(25):
        read_bytes(device, 0, 50)
        device.write_zeros(0, 50)
        device.discard(0, 50)
        device.flush()
        list(device.extents(0, SIZE))
    assert 9.79 <= clock.monotonic_s() <= 10


def test_pauses_do_not_add_up_to_a_burst() -> None:
    device, clock = throttled(bytes_per_s=1000)
    clock.pass_time(1000)
    start_s = clock.monotonic_s()
    for _ in range(10):
        read_bytes(device, 0, 100)
    assert clock.monotonic_s() - start_s >= 0.9 - BURST_S


def test_limits_change() -> None:
    device, clock = throttled(bytes_per_s=1)
    device.set_limits()
    for _ in range(10):
        read_bytes(device, 0, 100)
    assert clock.monotonic_s() == 0
    for limits in ({"bytes_per_s": 0}, {"calls_per_s": -1}):
        with pytest.raises(ValueError, match="for ever"):
            device.set_limits(**limits)


# --- check-write


def test_check_write_finds_what_differs() -> None:
    content = random.Random(1).randbytes(SIZE)
    device = MemoryDevice(content)
    checked = CheckWrite(device, MemoryDevice(content))
    checked.write(100, b"abc")
    device.write(SIZE - 10, bytes([content[SIZE - 10] ^ 1]))
    assert read_bytes(checked, 0, SIZE - 10)[100:103] == b"abc"
    with pytest.raises(AssertionError, match=f"byte {SIZE - 10} is 0x"):
        read_bytes(checked, 0, SIZE)


def test_check_write_takes_what_a_discard_leaves() -> None:
    class Strange(MemoryDevice):
        def discard(self, offset: int, length: int) -> None:
            self.write(offset, b"?" * length)

    checked = CheckWrite(Strange(SIZE), MemoryDevice(SIZE))
    checked.discard(0, SIZE)
    assert read_bytes(checked, 0, SIZE) == b"?" * SIZE


def test_an_oracle_that_cannot_follow() -> None:
    blocks = MemoryDevice(SIZE)
    blocks.capabilities = replace(blocks.capabilities, min_block_bytes=512)
    for oracle, text in (
        (MemoryDevice(1), "has 1 bytes"),
        (MemoryDevice(SIZE, writable=False), "writable"),
        (blocks, "blocks"),
    ):
        with pytest.raises(ValueError, match=text):
            CheckWrite(MemoryDevice(SIZE), oracle)


# --- overlay


def test_an_overlay_lists_what_changed() -> None:
    base = random.Random(2).randbytes(SIZE)
    overlay = Overlay(MemoryDevice(base, writable=False), SparseMemory(SIZE))
    assert list(overlay.changed()) == [] and overlay.changed_bytes() == 0
    overlay.write(CLUSTER - 1, b"ab")
    overlay.write(2 * CLUSTER, bytes(CLUSTER))
    overlay.write_zeros(4 * CLUSTER, CLUSTER)
    overlay.discard(5 * CLUSTER - 5, CLUSTER + 10)
    overlay.write(SIZE - 1, b"z")
    assert list(overlay.changed()) == [
        Extent(0, 3 * CLUSTER, False),
        Extent(4 * CLUSTER, 2 * CLUSTER, True),
        Extent(8 * CLUSTER, 1000, False),
    ]
    expected = bytearray(base)
    expected[CLUSTER - 1 : CLUSTER + 1] = b"ab"
    expected[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)
    expected[4 * CLUSTER : 6 * CLUSTER] = bytes(2 * CLUSTER)
    expected[SIZE - 1 :] = b"z"
    assert read_bytes(overlay, 0, SIZE) == expected
    saved = bytearray(base)
    for extent in overlay.changed():
        saved[extent.offset : extent.end] = read_bytes(overlay, extent.offset, extent.length)
    assert saved == expected


def test_an_overlay_reads_below_only_what_it_must() -> None:
    records = list[Record]()
    overlay = Overlay(Trace(MemoryDevice(SIZE, writable=False), records.append), SparseMemory(SIZE))
    overlay.write(CLUSTER, b"x" * 2 * CLUSTER)
    overlay.write(SIZE - 1000, b"x" * 1000)
    assert not records
    overlay.write(4 * CLUSTER + 5, b"x" * 2 * CLUSTER)
    assert [(record.offset, record.length) for record in sorted(records, key=lambda record: record.offset)] == [
        (4 * CLUSTER, CLUSTER),
        (6 * CLUSTER, CLUSTER),
    ]


def test_neighbours_within_a_cluster_do_not_disturb_each_other() -> None:
    """Both copy the same cluster up at the same time."""
    for _ in range(20):
        overlay = Overlay(MemoryDevice(b"a" * CLUSTER, writable=False), SparseMemory(CLUSTER))
        writers = [threading.Thread(target=overlay.write, args=(n * 100, b"%d" % n * 100)) for n in range(8)]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
        assert read_bytes(overlay, 0, 800) == b"".join(b"%d" % n * 100 for n in range(8))


@pytest.mark.parametrize("scratch", [SparseMemory(1), MemoryDevice(SIZE, writable=False)])
def test_scratch_space_of_no_use(scratch: SparseMemory | MemoryDevice) -> None:
    with pytest.raises(ValueError, match="scratch"):
        Overlay(MemoryDevice(SIZE), scratch)
    with pytest.raises(ValueError, match="cache"):
        CopyOnRead(MemoryDevice(SIZE), scratch)


def test_a_limit_of_memory() -> None:
    device = SparseMemory(1 * TiB, limit_bytes=2 * CLUSTER)
    device.write(1 * TiB - 1, b"x")
    device.write(0, b"x")
    with pytest.raises(TargetUnwritable, match="limit of 131072 bytes"):
        device.write(5 * GiB, b"x")
    device.discard(0, CLUSTER)
    device.write(5 * GiB, b"x")
    assert device.used_bytes() == 2 * CLUSTER
    device.write_zeros(0, 1 * TiB)
    assert device.used_bytes() == 0


def test_a_temporary_file_is_gone_with_its_device(tmp_path: str) -> None:
    with temporary_device(1 * TiB, str(tmp_path)) as device:
        device.write(1 * TiB - 1, b"x")
        assert read_bytes(device, 1 * TiB - 2, 2) == b"\0x"
    with pytest.raises(TargetUnwritable, match="no temporary file"):
        temporary_device(1, f"{tmp_path}/missing")


# --- copy-on-read


def test_every_cluster_is_read_once() -> None:
    content, records = random.Random(3).randbytes(SIZE), list[Record]()
    device = CopyOnRead(Trace(MemoryDevice(content), records.append), SparseMemory(SIZE))
    assert read_bytes(device, 100, 10) == content[100:110]
    assert [(r.offset, r.length) for r in records] == [(0, CLUSTER)]
    for _ in range(3):
        assert read_bytes(device, 0, SIZE) == content
    assert sum(record.length for record in records) == SIZE


def test_writes_reach_the_cache_too() -> None:
    below = MemoryDevice(b"a" * SIZE)
    device = CopyOnRead(below, SparseMemory(SIZE))
    read_bytes(device, 0, 2 * CLUSTER)
    device.write(CLUSTER - 5, b"b" * 10)
    device.write(3 * CLUSTER - 5, b"c" * 10)
    device.write_zeros(100, 10)
    device.discard(200, 10)
    assert read_bytes(device, 0, SIZE) == below.content()
    assert below.content()[CLUSTER - 5 : CLUSTER + 5] == b"b" * 10


def test_a_cache_that_fails_costs_speed_only() -> None:
    below, cache = MemoryDevice(b"a" * SIZE), Faults(SparseMemory(SIZE))
    device = CopyOnRead(below, cache)
    read_bytes(device, 0, 2 * CLUSTER)
    cache.set_rules(Rule(frozenset(Operation)))
    device.write(10, b"b")
    assert read_bytes(device, 0, SIZE) == below.content()
    cache.set_rules()
    assert read_bytes(device, 0, SIZE) == below.content()
    assert read_bytes(device, 10, 1) == b"b"


def test_a_write_that_fails_below_is_not_in_the_cache() -> None:
    below = Faults(MemoryDevice(b"a" * SIZE))
    device = CopyOnRead(below, SparseMemory(SIZE))
    read_bytes(device, 0, SIZE)
    below.set_rules(Rule(WRITE, Fault.SHORT))
    with pytest.raises(TargetUnwritable):
        device.write(0, b"b" * 1000)
    assert read_bytes(device, 0, SIZE) == b"b" * 500 + b"a" * (SIZE - 500)


# --- what they are made of


def test_overlapping_ranges_take_turns() -> None:
    locks, order = RangeLocks(), list[str]()

    def second() -> None:
        with locks.hold(5, 10):
            order.append("second")

    with locks.hold(0, 6):
        with locks.hold(6, 8), pytest.raises(TimeoutError), locks.hold(7, 9, timeout_s=0.01):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.02)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_gate_waits_for_those_inside_and_keeps_others_out() -> None:
    gate, order = Gate(), list[str]()

    def passing(name: str) -> None:
        with gate.passing():
            order.append(name)

    with gate.passing(), pytest.raises(TimeoutError), gate.closed(0.01):
        pass
    with gate.closed(1):
        thread = threading.Thread(target=passing, args=("late",))
        thread.start()
        time.sleep(0.02)
        order.append("closed")
    thread.join()
    assert order == ["closed", "late"]
