"""Copy before write: the snapshot is the disk at the instant, each cluster is saved once, and the guest wins."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casbackup.block.device import BlockDevice, read_bytes
from casbackup.block.filters.background import Background
from casbackup.block.filters.copy_before_write import CopyBeforeWrite, Start, begin_together
from casbackup.block.filters.faults import Fault, Faults, Rule
from casbackup.block.filters.operation import Operation
from casbackup.block.filters.overlay import Overlay
from casbackup.block.filters.point_in_time import OnFailure, PointInTime, Policy
from casbackup.block.filters.saving import CallbackSaver, ScratchSaver, SpoolSaver
from casbackup.block.filters.snapshot_view import SnapshotView
from casbackup.block.filters.trace import Record, Trace
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.block.sparse import SparseMemory
from casbackup.block.spool import Spool
from casbackup.errors import BackupBroken, GuestWriteRefused, SourceUnreadable, TargetUnwritable
from casbackup.units import KiB, MiB
from tests.waiting import wait_until

CLUSTER = 64 * KiB
SIZE = 20 * CLUSTER + 12_345
CHANGES = (Operation.WRITE, Operation.WRITE_ZEROS, Operation.DISCARD)
REFUSE = OnFailure.BREAK_GUEST_WRITE


class Saved:
    """What a backup got, as a disk, and how often it got each byte."""

    def __init__(self, size_bytes: int) -> None:
        self.content = bytearray(b"\xee" * size_bytes)
        self.times = Counter[int]()
        self.zero_bytes = 0
        self._lock = threading.Lock()

    def __call__(self, offset: int, length: int, data: memoryview | None) -> None:
        with self._lock:
            self.content[offset : offset + length] = bytes(length) if data is None else data
            self.zero_bytes += length if data is None else 0
            assert offset % CLUSTER == 0
            self.times.update(range(offset // CLUSTER, -(-(offset + length) // CLUSTER)))

    def check(self, expected: bytes) -> None:
        assert self.content == expected
        assert self.times == dict.fromkeys(range(-(-len(expected) // CLUSTER)), 1)


class Step(NamedTuple):
    action: str
    offset: int
    length: int


positions = st.integers(0, SIZE) | st.integers(0, SIZE // CLUSTER).map(lambda number: number * CLUSTER)
steps = st.builds(
    lambda action, one, other: Step(action, min(one, other), abs(one - other)),
    st.sampled_from(["write", "write", "zero", "discard", "flush", "read", "step", "step"]),
    positions,
    positions,
)
plans = st.lists(steps, max_size=40)


def sparse_content(seed: int = 1) -> bytes:
    """Data with some clusters of zeros, and zeros that begin within a cluster."""
    content = bytearray(random.Random(seed).randbytes(SIZE))
    for offset, length in ((3 * CLUSTER, 4 * CLUSTER), (10 * CLUSTER + 4096, CLUSTER), (18 * CLUSTER, SIZE)):
        content[offset : min(SIZE, offset + length)] = bytes(max(0, min(SIZE, offset + length) - offset))
    return bytes(content)


def apply(device: BlockDevice, model: bytearray, step: Step, number: int) -> None:
    offset, length = step.offset, step.length
    if step.action == "write":
        model[offset : offset + length] = random.Random(number).randbytes(length)
        device.write(offset, model[offset : offset + length])
    elif step.action == "zero":
        model[offset : offset + length] = bytes(length)
        device.write_zeros(offset, length, may_trim=bool(number % 2))
    elif step.action == "discard":
        device.discard(offset, length)
        model[offset : offset + length] = read_bytes(device, offset, length)
    elif step.action == "flush":
        device.flush()
    elif step.action == "read":
        assert read_bytes(device, offset, length) == model[offset : offset + length]


def finish(background: Background) -> None:
    while background.step():
        pass


@settings(max_examples=60, deadline=None)
@given(before=plans, during=plans)
def test_what_is_saved_is_the_disk_at_the_instant(before: list[Step], during: list[Step]) -> None:
    content = sparse_content()
    model, records = bytearray(content), list[Record]()
    filter = CopyBeforeWrite(Trace(MemoryDevice(content), records.append))
    device = Guarded(filter)
    for number, step in enumerate(before):
        apply(device, model, step, number)
    at_the_instant, saved = bytes(model), Saved(SIZE)
    point = filter.begin(CallbackSaver(saved), Policy(REFUSE))
    background = Background(point)
    records.clear()
    for number, step in enumerate(during, 1000):
        apply(device, model, step, number)
        if step.action == "step":
            background.step()
    finish(background)
    saved.check(at_the_instant)
    assert read_bytes(device, 0, SIZE) == model
    assert point.unsaved_bytes == 0
    guest_bytes = sum(step.length for step in during if step.action in ("read", "discard"))
    read_by_all = sum(record.length for record in records if record.operation is Operation.READ)
    assert read_by_all == SIZE + guest_bytes + SIZE - saved.zero_bytes  # the first is the check above
    changes = [record for record in records if record.operation in CHANGES]
    assert len(changes) == sum(step.length > 0 and step.action in ("write", "zero", "discard") for step in during)


@settings(max_examples=40, deadline=None)
@given(during=plans)
def test_the_view_is_the_disk_at_the_instant(during: list[Step]) -> None:
    content = sparse_content()
    model = bytearray(content)
    filter = CopyBeforeWrite(MemoryDevice(content))
    device = Guarded(filter)
    saver = ScratchSaver(SparseMemory(SIZE))
    view = Guarded(SnapshotView(filter.begin(saver), saver))
    for number, step in enumerate(during):
        apply(device, model, step, number)
        if step.action == "step":
            assert read_bytes(view, step.offset, step.length) == content[step.offset : step.offset + step.length]
    assert read_bytes(view, 0, SIZE) == content
    for extent in view.extents(0, SIZE):
        assert not extent.zero or not any(content[extent.offset : extent.end])
    view.close()
    assert filter.point is None


def test_one_read_and_two_writes() -> None:
    """Each cluster is read once below, written once to the backup, and the guest's write once below."""
    content, records = random.Random(3).randbytes(SIZE), list[Record]()
    filter, saved = CopyBeforeWrite(Trace(MemoryDevice(content), records.append)), Saved(SIZE)
    background = Background(filter.begin(CallbackSaver(saved)))
    for number in (5, 2, 5, 17):
        filter.write(number * CLUSTER + 100, b"new")
        filter.write(number * CLUSTER + 2000, b"newer")
        background.step()
    finish(background)
    reads = Counter(
        cluster
        for record in records
        if record.operation is Operation.READ
        for cluster in range(record.offset // CLUSTER, -(-record.end // CLUSTER))
    )
    assert reads == dict.fromkeys(range(21), 1)
    assert sum(record.operation is Operation.WRITE for record in records) == 8
    saved.check(content)


def test_zeros_are_not_read() -> None:
    records = list[Record]()
    filter, saved = CopyBeforeWrite(Trace(MemoryDevice(sparse_content()), records.append)), Saved(SIZE)
    background = Background(filter.begin(CallbackSaver(saved)))
    filter.write(4 * CLUSTER, b"x")
    finish(background)
    saved.check(sparse_content())
    assert saved.zero_bytes == 4 * CLUSTER + (SIZE - 18 * CLUSTER)
    assert sum(r.length for r in records if r.operation is Operation.READ) == SIZE - saved.zero_bytes


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_of_guests_and_of_the_background(workers: int) -> None:
    content, saved = random.Random(4).randbytes(8 * MiB), Saved(8 * MiB)
    filter = CopyBeforeWrite(MemoryDevice(content))
    writing = threading.Event()

    def guest(seed: int) -> None:
        chance = random.Random(seed)
        while writing.is_set():
            length = chance.choice((512, 4096, 200_000))
            filter.write(chance.randrange(len(content) - length), chance.randbytes(length))

    writing.set()
    with threads(*(lambda seed=seed: guest(seed) for seed in range(3)), stop=writing.clear):
        time.sleep(0.01)
        with filter.quiesced(5):
            at_the_instant = read_bytes(filter, 0, len(content))
            point = filter._begin(CallbackSaver(saved), Policy(REFUSE, 30))
        background = Background(point)
        with threads(*[lambda: finish(background)] * workers):
            pass
    saved.check(at_the_instant)


def test_two_disks_at_one_instant() -> None:
    """A guest writes the same number to both, one after the other: they never differ by more than one."""
    disks = [CopyBeforeWrite(MemoryDevice(4096)) for _ in range(2)]
    writing = threading.Event()
    writing.set()

    def guest() -> None:
        number = 0
        while writing.is_set():
            number += 1
            for disk in disks:
                disk.write(0, number.to_bytes(8, "big"))

    with threads(guest, stop=writing.clear):
        for _ in range(20):
            saved = [Saved(4096), Saved(4096)]
            starts = [Start(disk, CallbackSaver(one)) for disk, one in zip(disks, saved, strict=True)]
            points = begin_together(starts)
            for point in points:
                finish(Background(point))
                point.end()
            first, second = (int.from_bytes(one.content[:8], "big") for one in saved)
            assert first - second in (0, 1)


def test_begin_waits_for_writes_under_way() -> None:
    under_way, go_on = threading.Event(), threading.Event()

    def hang(_seconds: float) -> None:
        under_way.set()
        go_on.wait(30)

    rule = Rule(frozenset({Operation.WRITE}), Fault.DELAY, delay_s=1, times=1)
    filter, saved = CopyBeforeWrite(Faults(MemoryDevice(SIZE), rule, sleep=hang)), Saved(SIZE)
    with threads(lambda: filter.write(0, b"x")):
        under_way.wait(30)
        with pytest.raises(BackupBroken, match="no instant without writes"):
            begin_together([Start(filter, CallbackSaver(saved))], timeout_s=0.01)
        threading.Timer(0.05, go_on.set).start()
        point = filter.begin(CallbackSaver(saved))
    finish(Background(point))
    assert saved.content[:1] == b"x"


def test_one_point_in_time_a_filter_but_filters_may_be_stacked() -> None:
    inner = CopyBeforeWrite(MemoryDevice(b"a" * CLUSTER))
    outer = CopyBeforeWrite(inner)
    first, second = Saved(CLUSTER), Saved(CLUSTER)
    one = inner.begin(CallbackSaver(first))
    with pytest.raises(ValueError, match="stack another filter"):
        inner.begin(CallbackSaver(second))
    outer.write(0, b"b" * 100)
    two = outer.begin(CallbackSaver(second))
    outer.write(0, b"c" * 100)
    finish(Background(one)), finish(Background(two))
    first.check(b"a" * CLUSTER)
    second.check(b"b" * 100 + b"a" * (CLUSTER - 100))
    one.end()
    inner.begin(CallbackSaver(Saved(CLUSTER)))


# --- failures


def change(device: BlockDevice, operation: Operation) -> None:
    if operation is Operation.WRITE:
        device.write(100, b"new")
    elif operation is Operation.WRITE_ZEROS:
        device.write_zeros(100, 3)
    else:
        device.discard(100, 3)


def unreadable_once() -> BlockDevice:
    return Faults(MemoryDevice(b"a" * SIZE), Rule(frozenset({Operation.READ}), times=1))


@pytest.mark.parametrize("operation", CHANGES)
def test_old_data_that_cannot_be_read_breaks_the_backup(operation: Operation) -> None:
    filter = CopyBeforeWrite(unreadable_once())
    point = filter.begin(CallbackSaver(Saved(SIZE)))
    change(filter, operation)
    assert read_bytes(filter, 100, 3) != b"aaa"
    assert isinstance(point.failure, BackupBroken) and filter.point is None
    with pytest.raises(BackupBroken, match="bytes 100 to 103 were not saved before a write: read at byte 0 failed"):
        Background(point).step()


@pytest.mark.parametrize("operation", CHANGES)
def test_old_data_that_cannot_be_read_refuses_the_write(operation: Operation) -> None:
    filter, saved = CopyBeforeWrite(unreadable_once()), Saved(SIZE)
    point = filter.begin(CallbackSaver(saved), Policy(REFUSE))
    with pytest.raises(GuestWriteRefused, match="bytes 100 to 103"):
        change(filter, operation)
    assert read_bytes(filter, 100, 3) == b"aaa"
    change(filter, operation)  # the fault struck once
    finish(Background(point))
    saved.check(b"a" * SIZE)


def test_a_saver_that_goes_wrong_does_not_reach_the_guest() -> None:
    def wrong(*_: object) -> None:
        raise RuntimeError("a fault of the program")

    filter = CopyBeforeWrite(MemoryDevice(SIZE - 1))
    point = filter.begin(CallbackSaver(wrong))
    filter.write(0, b"x")
    assert "a fault of the program" in str(point.failure)


def test_the_background_is_told_of_a_broken_spool(hung: tuple[Spool, Hung]) -> None:
    filter = CopyBeforeWrite(MemoryDevice(b"a" * 8 * MiB))
    background = Background(filter.begin(SpoolSaver(hung[0], "disk")))

    def break_it() -> None:
        wait_until(lambda: hung[0].waiting_bytes >= 1 * MiB)
        hung[0].fail(BackupBroken("full"))

    with threads(break_it), pytest.raises(BackupBroken, match="full"):
        finish(background)


def test_the_background_cannot_read() -> None:
    filter = CopyBeforeWrite(Faults(MemoryDevice(b"a" * SIZE), Rule(frozenset({Operation.READ}))))
    point = filter.begin(CallbackSaver(Saved(SIZE)))
    with pytest.raises(BackupBroken) as caught:
        finish(Background(point))
    assert isinstance(caught.value.__cause__, SourceUnreadable)
    filter.write(0, b"x")


class Hung:
    """A consumer that takes nothing until it is told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.events = 0

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        self.go_on.wait(30)
        self.events += 1

    zero = write  # type: ignore[assignment]


@pytest.fixture
def hung() -> Iterator[tuple[Spool, Hung]]:
    consumer = Hung()
    spool = Spool(consumer, limit_bytes=2 * MiB)
    yield spool, consumer
    consumer.go_on.set()
    spool.close()


def test_a_hung_consumer_breaks_the_backup_and_not_the_guest(hung: tuple[Spool, Hung]) -> None:
    filter = CopyBeforeWrite(MemoryDevice(b"a" * 8 * MiB))
    point = filter.begin(SpoolSaver(hung[0], "disk"), Policy(timeout_s=0.2))
    longest_s = 0.0
    for number in range(128):
        start_s = time.monotonic()
        filter.write(number * CLUSTER, b"x")
        longest_s = max(longest_s, time.monotonic() - start_s)
    assert 0.15 < longest_s < 1.5
    assert "does not take data fast enough" in str(point.failure)
    assert read_bytes(filter, 127 * CLUSTER, 1) == b"x"


def test_a_hung_consumer_breaks_writes_where_that_is_the_policy(hung: tuple[Spool, Hung]) -> None:
    spool, consumer = hung
    filter = CopyBeforeWrite(MemoryDevice(b"a" * 4 * MiB))
    point = filter.begin(SpoolSaver(spool, "disk"), Policy(REFUSE, timeout_s=0.05))
    with pytest.raises(GuestWriteRefused):
        filter.write(0, b"x" * 4 * MiB)
    assert read_bytes(filter, 0, 4 * MiB) == b"a" * 4 * MiB
    consumer.go_on.set()
    filter.write(0, b"x" * 4 * MiB)
    spool.finish(timeout_s=10)
    assert point.unsaved_bytes == 0 and consumer.events >= 4


def test_the_background_leaves_room_for_the_guest(hung: tuple[Spool, Hung]) -> None:
    """The consumer hangs and the background has filled its share: the guest still goes on at once."""
    filter = CopyBeforeWrite(MemoryDevice(b"a" * 8 * MiB))
    point = filter.begin(SpoolSaver(hung[0], "disk"), Policy(timeout_s=5))
    background = Background(point)
    with threads(lambda: stopped(background), stop=hung[1].go_on.set):
        wait_until(lambda: hung[0].waiting_bytes >= 1 * MiB)
        start_s = time.monotonic()
        for number in range(100, 110):
            filter.write(number * CLUSTER, b"x")
        assert time.monotonic() - start_s < 1
        assert point.failure is None


def test_the_guest_goes_first() -> None:
    """The background does not begin another step while a write is waiting."""
    slow = Faults(MemoryDevice(b"a" * SIZE), Rule(frozenset({Operation.READ}), Fault.DELAY, delay_s=0.01))
    point = CopyBeforeWrite(slow).begin(CallbackSaver(Saved(SIZE)))
    with point._guest_waits():
        start_s = time.monotonic()
        Background(point).step()
        assert time.monotonic() - start_s > 0.025


def test_a_limit_of_what_is_kept_for_a_view() -> None:
    filter = CopyBeforeWrite(MemoryDevice(b"a" * SIZE))
    saver = ScratchSaver(SparseMemory(SIZE), limit_bytes=2 * CLUSTER)
    view = SnapshotView(filter.begin(saver), saver)
    for number in range(3):
        assert saver.kept_bytes == number * CLUSTER
        filter.write(number * CLUSTER, b"x")
    assert read_bytes(filter, 2 * CLUSTER, 1) == b"x"
    with pytest.raises(BackupBroken, match="overwrote more than 131072 bytes"):
        read_bytes(view, 0, 1)
    with pytest.raises(TargetUnwritable):
        view.write_zeros(0, 1)


def test_saving_goes_on_under_an_overlay_and_a_failing_disk() -> None:
    """The filter is not tied to where it stands: over an overlay whose scratch space fails."""
    scratch = Faults(SparseMemory(SIZE), Rule(frozenset({Operation.WRITE}), nth=3))
    filter, saved = CopyBeforeWrite(Overlay(MemoryDevice(b"a" * SIZE, writable=False), scratch)), Saved(SIZE)
    point = filter.begin(CallbackSaver(saved), Policy(REFUSE))
    filter.write(10, b"x")
    with pytest.raises(TargetUnwritable):
        filter.write(CLUSTER, b"x")
    finish(Background(point))
    saved.check(b"a" * SIZE)


def test_closing_ends_it() -> None:
    filter = CopyBeforeWrite(MemoryDevice(SIZE))
    point: PointInTime = filter.begin(CallbackSaver(Saved(SIZE)))
    filter.close()
    with pytest.raises(BackupBroken, match="was ended"):
        Background(point).step()


# --- helpers


def stopped(background: Background) -> None:
    with contextlib.suppress(BackupBroken):
        finish(background)


@contextlib.contextmanager
def threads(*works: object, stop: object = lambda: None) -> Iterator[None]:
    """Run functions in threads during the block, and raise what they raise."""
    failures = list[BaseException]()

    def run(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop()  # type: ignore[operator]
        for thread in running:
            thread.join(60)
            assert not thread.is_alive()
    if failures:
        raise failures[0]
