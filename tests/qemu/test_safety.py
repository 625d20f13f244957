"""Whatever happens to a backup, the guest sees no error, and QEMU is left as it was."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casbackup.errors import BackupBroken, CasbackupError, Interrupted, QmpError, RepositoryFull, SinkLost
from casbackup.qemu import cleanup, push
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection, find_disks
from casbackup.qemu.features import detect
from casbackup.qemu.push import PushSource, Tracking
from casbackup.qemu.sink_host import SinkHost
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions

from .conftest import BootGuest, Daemon, Gathering, Process, assert_clean

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
    """A push backup, slow enough that ``then`` happens in its midst. Its error is raised; QEMU must be clean."""
    control = settings.pop("control", None) or LiveControl(speed_limit_bytes_s=SLOW)
    options = LiveOptions(freeze=FreezePolicy.NEVER, **settings)  # type: ignore[arg-type]
    with qemu.qmp() as qmp:
        disks = find_disks(qmp, Selection())
        consumer = Hook([disk.size_bytes for disk in disks], at, then)
        source = PushSource(qmp, detect(qmp), options, control, print, Tracking("0" * 12, "1" * 16))  # type: ignore[arg-type]
        try:
            source.run([DiskTask(disk, None) for disk in disks], consumer)
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

    monkeypatch.setattr(push, "SinkHost", Seen)
    return made


def fail(error: BaseException) -> Callable[[], None]:
    def now() -> None:
        raise error

    return now


def assert_guest_goes_on(guest: BootGuest) -> None:
    guest.wait_written(guest.written() + 64)
    assert guest.errors == 0


def test_the_repository_is_full(guest: BootGuest) -> None:
    with pytest.raises(RepositoryFull):
        run(guest, 20, fail(RepositoryFull("full")))
    assert_guest_goes_on(guest)


def test_a_signal(guest: BootGuest) -> None:
    with pytest.raises(Interrupted):
        run(guest, 20, fail(Interrupted("SIGTERM")))
    assert_guest_goes_on(guest)


def test_the_sink_is_killed(guest: BootGuest, sinks: list[SinkHost]) -> None:
    with pytest.raises(SinkLost):
        run(guest, 20, lambda: os.kill(sinks[0].pid, signal.SIGKILL))
    assert_guest_goes_on(guest)


def test_the_sink_hangs(guest: BootGuest, sinks: list[SinkHost]) -> None:
    with pytest.raises(SinkLost):
        run(guest, 20, lambda: os.kill(sinks[0].pid, signal.SIGSTOP), max_guest_stall_s=1.0)
    assert_guest_goes_on(guest)


def test_qemu_is_killed(daemon: Daemon) -> None:
    with pytest.raises(QmpError):
        run(daemon, 3, daemon.kill)


def test_cancelling(daemon: Daemon) -> None:
    control = LiveControl(speed_limit_bytes_s=SLOW)
    with pytest.raises(Interrupted, match="enough"):
        run(daemon, 3, lambda: control.cancel("enough"), control=control)


def test_pausing_and_going_on(daemon: Daemon) -> None:
    control = LiveControl(speed_limit_bytes_s=8 * MiB)

    def pause() -> None:
        control.pause()
        threading.Timer(0.8, resume).start()

    def resume() -> None:
        done.append(control.status.done_bytes)
        control.limit_speed(0)
        control.resume()

    done: list[int] = []
    run(daemon, 3, pause, control=control)
    assert done[0] < 64 * MiB
    assert control.status.done_bytes == 64 * MiB


def test_a_target_that_hangs_breaks_the_backup_and_not_the_guest(daemon: Daemon) -> None:
    """The guest's writes wait for the bound at the most."""
    released = threading.Event()
    latencies: list[float] = []

    def write() -> None:
        with daemon.guest("a") as guest:
            for number in range(100_000):
                began = time.monotonic()
                guest.write(random.Random(number).randrange(0, 8000) * 4096, os.urandom(4096))
                latencies.append(time.monotonic() - began)
                if released.is_set():
                    return

    writer = threading.Thread(target=write)
    breaker = threading.Timer(3.0, released.set)

    def hang() -> None:
        writer.start()
        breaker.start()
        released.wait()

    with pytest.raises(BackupBroken, match="the guest goes first"):
        run(
            daemon,
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


@pytest.mark.slow
def test_a_slow_target_does_not_slow_the_guest_down(daemon: Daemon) -> None:
    """50 MB/s: a write of the guest takes at most 20 ms but for one in a hundred."""
    latencies: list[float] = []
    over = threading.Event()

    def write() -> None:
        with daemon.guest("a") as guest:
            while not over.is_set():
                began = time.monotonic()
                guest.write(random.randrange(0, 8000) * 4096, os.urandom(4096))
                latencies.append(time.monotonic() - began)
                time.sleep(0.003)

    class SlowConsumer(Gathering):
        def write(self, disk: str, offset: int, data: memoryview) -> None:
            super().write(disk, offset, data)
            time.sleep(len(data) / 50e6)

    with daemon.qmp() as qmp:
        disks = find_disks(qmp, Selection())
        consumer = SlowConsumer([disk.size_bytes for disk in disks])
        options = LiveOptions(freeze=FreezePolicy.NEVER, memory_bytes=8 * MiB)
        writer = threading.Thread(target=write)
        writer.start()
        try:
            PushSource(qmp, detect(qmp), options, LiveControl(), print).run(
                [DiskTask(d, None) for d in disks], consumer
            )
        finally:
            over.set()
            writer.join()
    latencies.sort()
    p50, p99 = (latencies[len(latencies) * p // 100] for p in (50, 99))
    print(f"p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms of {len(latencies)}")
    assert p99 < 0.02


MOMENTS = 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cancelling_at_any_moment_leaves_nothing(daemon: Daemon) -> None:
    rng = random.Random(1)
    for _ in range(MOMENTS):
        control = LiveControl(speed_limit_bytes_s=32 * MiB)
        timer = threading.Timer(rng.uniform(0, 2.5), lambda control=control: control.cancel("enough"))  # type: ignore[misc]
        timer.start()
        with contextlib.suppress(Interrupted):
            run(daemon, -1, lambda: None, control=control)
        timer.cancel()


CODE = """
import sys
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection, find_disks
from casbackup.qemu.features import detect
from casbackup.qemu.push import PushSource, Tracking
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import DiskTask, LiveOptions

class Consumer:
    def write(self, disk, offset, data):
        print("data", flush=True)
    def zero(self, disk, offset, length):
        pass

qmp = QmpClient.connect(sys.argv[1])
disks = find_disks(qmp, Selection())
control, tracking = LiveControl(speed_limit_bytes_s=2 << 20), Tracking("0" * 12, "1" * 16)
source = PushSource(qmp, detect(qmp), LiveOptions(), control, print, tracking)
source.run([DiskTask(disk, None) for disk in disks], Consumer())
"""


@pytest.fixture
def backup_process() -> Iterator[Callable[[Process], object]]:
    import subprocess
    import sys

    started: list[subprocess.Popen[str]] = []

    def start(qemu: Process) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CODE, qemu.qmp_path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_backup_is_killed_and_its_sink_cleans_up(
    guest: BootGuest, backup_process: Callable[..., object], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(place))
    process = backup_process(guest)
    assert process.stdout.readline() == "data\n"  # type: ignore[attr-defined]
    process.kill()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(CasbackupError, AssertionError), guest.qmp() as qmp:
            assert_clean(qmp)
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert_guest_goes_on(guest)
    while list(place.glob("casbackup-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
