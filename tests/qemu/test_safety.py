"""Whatever happens to a backup, the guest sees no error, and QEMU is left as it was."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from casbackup.errors import BackupBroken, CasbackupError, Interrupted, QmpError, RepositoryFull, SinkLost
from casbackup.qemu import cleanup, conductor
from casbackup.qemu.bitmaps import Tracking
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection
from casbackup.qemu.machine import Machine
from casbackup.qemu.sink_host import SinkHost
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions, Mode

from .conftest import BootGuest, Daemon, Gathering, Process, Vm, assert_clean

pytestmark = pytest.mark.qemu
MiB = 1024 * 1024
SLOW = 2 * MiB
"""A speed at which a backup lasts as long as a test needs it."""


class Hook(Gathering):
    """A consumer that calls a function at its nth event."""

    def __init__(self, sizes: list[int], at: int, then: Callable[[], None]) -> None:
        super().__init__(sizes)
        self._at = at
        self._then = then

    def _cover(self, disk: int, offset: int, length: int) -> None:
        super()._cover(disk, offset, length)
        if self.events == self._at:
            self._then()


def run(qemu: Process, at: int, then: Callable[[], None], **settings: object) -> None:
    """A backup, slow enough that ``then`` happens in its midst. Its error is raised; QEMU must be clean."""
    control = settings.pop("control", None) or LiveControl(speed_limit_bytes_s=SLOW)
    options = LiveOptions(freeze=FreezePolicy.NEVER, **settings)  # type: ignore[arg-type]
    with qemu.qmp() as qmp:
        machine = Machine(qmp, Selection(), options, qemu.mode)
        consumer = Hook([disk.size_bytes for disk in machine.disks], at, then)
        source = machine.source(control, print, Tracking("0" * 12, "1" * 16))  # type: ignore[arg-type]
        try:
            source.run([DiskTask(disk, None) for disk in machine.disks], consumer)
        except BaseException:
            if qemu.process.poll() is None:
                assert_clean(qmp)
            raise
        assert_clean(qmp, bitmaps=1)
        cleanup.remove_bitmaps(qmp, "1" * 16)


@pytest.fixture
def sinks(monkeypatch: pytest.MonkeyPatch) -> list[SinkHost]:
    """All sinks that are started."""
    made: list[SinkHost] = []

    class Seen(SinkHost):
        def __enter__(self) -> SinkHost:
            made.append(self)
            return super().__enter__()

    monkeypatch.setattr(conductor, "SinkHost", Seen)
    return made


def fail(error: BaseException) -> Callable[[], None]:
    def now() -> None:
        raise error

    return now


def assert_guest_goes_on(guest: BootGuest) -> None:
    guest.wait_written(guest.written() + 64)
    assert guest.errors == 0


def test_the_repository_is_full(running: BootGuest) -> None:
    with pytest.raises(RepositoryFull):
        run(running, 20, fail(RepositoryFull("full")))
    assert_guest_goes_on(running)


def test_a_signal(running: BootGuest) -> None:
    with pytest.raises(Interrupted):
        run(running, 20, fail(Interrupted("SIGTERM")))
    assert_guest_goes_on(running)


def test_the_sink_is_killed(running: BootGuest, sinks: list[SinkHost]) -> None:
    with pytest.raises(SinkLost):
        run(running, 20, lambda: os.kill(sinks[0].pid, signal.SIGKILL))
    assert_guest_goes_on(running)


def test_the_sink_hangs(running: BootGuest, sinks: list[SinkHost]) -> None:
    with pytest.raises(SinkLost):
        run(running, 20, lambda: os.kill(sinks[0].pid, signal.SIGSTOP), max_guest_stall_s=1.0)
    assert_guest_goes_on(running)


def test_qemu_is_killed(idle: Daemon | Vm) -> None:
    with pytest.raises(QmpError):
        run(idle, 2, idle.kill)


def test_cancelling(idle: Daemon | Vm) -> None:
    control = LiveControl(speed_limit_bytes_s=SLOW)
    with pytest.raises(Interrupted, match="enough"):
        run(idle, 2, lambda: control.cancel("enough"), control=control)


def test_pausing_and_going_on(idle: Daemon | Vm) -> None:
    control = LiveControl(speed_limit_bytes_s=8 * MiB)

    def pause() -> None:
        control.pause()
        threading.Timer(0.8, resume).start()

    def resume() -> None:
        done.append(control.status.done_bytes)
        control.limit_speed(0)
        control.resume()

    done: list[int] = []
    run(idle, 2, pause, control=control)
    assert done[0] < 64 * MiB
    assert control.status.done_bytes == 64 * MiB


def test_a_target_that_hangs_breaks_the_backup_and_not_the_guest(idle: Daemon | Vm) -> None:
    """The guest's writes wait for the bound at the most."""
    released = threading.Event()
    latencies: list[float] = []

    def write() -> None:
        with idle.guest("a") as guest:
            for number in range(100_000):
                began = time.monotonic()
                guest.write(random.Random(number).randrange(0, 8000) * 4096, b"x" * 4096)
                latencies.append(time.monotonic() - began)
                if released.is_set() or latencies[-1] > 0.5:
                    break
        released.set()

    writer = threading.Thread(target=write)

    def hang() -> None:
        writer.start()
        released.wait(20)
        released.set()

    with pytest.raises(BackupBroken, match="the guest goes first"):
        run(
            idle,
            2,
            hang,
            memory_bytes=4 * MiB,
            max_guest_stall_s=1.0,
            control=LiveControl(speed_limit_bytes_s=64 * MiB),
        )
    writer.join(20)
    assert not writer.is_alive()
    assert 0.5 < max(latencies) < 1.6
    assert sorted(latencies)[len(latencies) * 99 // 100] < 1.1


def write_steadily(open_guest: Callable[[], Any], pipe: Connection) -> None:
    """In a process of its own, so that the backup's Python does not hold it up: sends how long writes took.

    First those of a second without a backup, then those until it is told to end.
    """
    with open_guest() as guest:
        end_s = time.monotonic() + 1
        pipe.send(write_until(guest, lambda: time.monotonic() > end_s))
        pipe.send(write_until(guest, pipe.poll))


def write_until(guest: Any, is_over: Callable[[], bool]) -> list[float]:
    """How long each write took, in seconds, in ascending order."""
    latencies = []
    while not is_over():
        began = time.monotonic()
        guest.write(random.randrange(0, 8000) * 4096, b"x" * 4096)
        latencies.append(time.monotonic() - began)
        time.sleep(0.003)
    return sorted(latencies)


class Latencies(NamedTuple):
    """Of writes of a guest, ascending, in seconds."""

    without: list[float]
    beside: list[float]


@contextlib.contextmanager
def guest_writes(idle: Daemon | Vm) -> Iterator[Latencies]:
    """The guest writes meanwhile. ``beside`` is filled at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=write_steadily, args=(idle.guest_of("a"), theirs), daemon=True)
    process.start()
    try:
        latencies = Latencies(ours.recv(), [])
        yield latencies
        ours.send(None)
        latencies.beside.extend(ours.recv())
    finally:
        process.kill()
        process.join()


def percentile(ascending: list[float], share: int) -> float:
    return ascending[len(ascending) * share // 100]


@pytest.mark.slow
def test_a_slow_target_does_not_slow_the_guest_down(idle: Daemon | Vm) -> None:
    """50 MB/s: a write of the guest takes at most 20 ms but for one in a hundred."""

    class SlowConsumer(Gathering):
        def write(self, disk: str, offset: int, data: memoryview) -> None:
            super().write(disk, offset, data)
            time.sleep(len(data) / 50e6)

    for path in idle.disks.values():
        with path.open("r+b") as file:
            file.write(os.urandom(32 * MiB))
    with idle.qmp() as qmp:
        options = LiveOptions(freeze=FreezePolicy.NEVER, memory_bytes=8 * MiB)
        machine = Machine(qmp, Selection(), options, idle.mode)
        consumer = SlowConsumer([disk.size_bytes for disk in machine.disks])
        with guest_writes(idle) as latencies:
            machine.source(LiveControl(), print, None).run([DiskTask(d, None) for d in machine.disks], consumer)
    for name, found in latencies._asdict().items():
        p50, p99 = (percentile(found, share) for share in (50, 99))
        print(f"{name} a backup: p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms of {len(found)}")
    assert p99 < 0.02 + percentile(latencies.without, 99)


MOMENTS = 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cancelling_at_any_moment_leaves_nothing(idle: Daemon | Vm) -> None:
    rng = random.Random(1)
    for _ in range(MOMENTS):
        control = LiveControl(speed_limit_bytes_s=32 * MiB)
        timer = threading.Timer(rng.uniform(0, 2.5), lambda control=control: control.cancel("enough"))  # type: ignore[misc]
        timer.start()
        with contextlib.suppress(Interrupted):
            run(idle, -1, lambda: None, control=control)
        timer.cancel()


CODE = """
import sys
from casbackup.qemu.bitmaps import Tracking
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection
from casbackup.qemu.machine import Machine
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import DiskTask, LiveOptions, Mode

class Consumer:
    def write(self, disk, offset, data):
        print("data", flush=True)
    def zero(self, disk, offset, length):
        pass

machine = Machine(QmpClient.connect(sys.argv[1]), Selection(), LiveOptions(), Mode(sys.argv[2]))
source = machine.source(LiveControl(speed_limit_bytes_s=2 << 20), print, Tracking("0" * 12, "1" * 16))
source.run([DiskTask(disk, None) for disk in machine.disks], Consumer())
"""


@pytest.fixture
def backup_process() -> Iterator[Callable[[Process], object]]:
    import subprocess
    import sys

    started: list[subprocess.Popen[str]] = []

    def start(qemu: Process) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CODE, qemu.qmp_path, qemu.mode]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_backup_is_killed_and_its_sink_cleans_up(
    running: BootGuest, backup_process: Callable[..., object], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(place))
    process = backup_process(running)
    assert process.stdout.readline() == "data\n"  # type: ignore[attr-defined]
    process.kill()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(CasbackupError, AssertionError), running.qmp() as qmp:
            assert_clean(qmp)
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert_guest_goes_on(running)
    while list(place.glob("casbackup-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_both_are_killed_or_hang_and_the_next_run_cleans_up(
    newer_guest: BootGuest,
    backup_process: Callable[..., Any],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    blow: signal.Signals,
) -> None:
    """In pull mode QEMU itself lets the guest's writes pass then."""
    monkeypatch.setenv("TMPDIR", str(place))
    process = backup_process(newer_guest)
    assert process.stdout.readline() == "data\n"
    (sink,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    for pid in (sink, process.pid):
        os.kill(pid, blow)
    assert_guest_goes_on(newer_guest)
    for pid in (sink, process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    with newer_guest.qmp() as qmp:
        with pytest.raises(AssertionError):
            assert_clean(qmp)
        machine = Machine(qmp, Selection(), LiveOptions(), Mode.PULL)
        assert [disk.node for disk in machine.disks] == ["disk-a", "disk-b"]
        assert_clean(qmp, bitmaps=1)
    assert_guest_goes_on(newer_guest)
