"""The memory of a running VM, saved at the instant of its disks: the VM goes on from there."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from casbackup.errors import (
    BackupBroken,
    CasbackupError,
    Interrupted,
    LiveBackupBusy,
    QmpTimeout,
    RepositoryFull,
    SinkLost,
    VmStateFailed,
    VmStateUnsupported,
)
from casbackup.qemu import cleanup, conductor, vmstate
from casbackup.qemu.conductor import ConductedSource
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection, find_disks
from casbackup.qemu.features import detect
from casbackup.qemu.pull import PullSource
from casbackup.qemu.push import PushSource
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.sink_host import SinkHost
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions
from casbackup.qemu.vmstate import SavedState, StateWay

from .conftest import GUEST_DISK_BYTES, BootGuest, Gathering, assert_clean, assert_prefix, need, newer

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]
MiB = 1024 * 1024


class Taken(Gathering):
    """The disks' images, and the stream of memory. ``then`` is called when some of it has come."""

    def __init__(self, sizes: list[int], then: Callable[[], None] | None = None) -> None:
        super().__init__(sizes)
        self.state = bytearray()
        self._then = then

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        if int(disk) < len(self.disks):
            super().write(disk, offset, data)
            return
        assert offset == len(self.state), "the stream comes in order"
        self.state += data
        if self._then is not None:
            then, self._then = self._then, None
            then()


def assert_untouched(qmp: QmpClient) -> None:
    """The guest runs, and of what was changed in QEMU nothing is left."""
    assert qmp.execute("query-status")["running"]
    assert not [item["capability"] for item in qmp.execute("query-migrate-capabilities") if item["state"]]
    assert qmp.execute("query-migrate-parameters")["max-bandwidth"] == 128 * MiB
    assert_clean(qmp)


def tracked(guest: BootGuest) -> list[str]:
    """Whether QEMU still protects the guest's memory: then the guest hangs when it next writes there."""
    folder = f"/proc/{guest.process.pid}/fd"
    return [link for name in os.listdir(folder) if "[userfaultfd]" in (link := os.readlink(f"{folder}/{name}"))]


def take(
    guest: BootGuest,
    way: StateWay = StateWay.BACKGROUND,
    then: Callable[[], None] | None = None,
    control: LiveControl | None = None,
    kind: type[ConductedSource] = PushSource,
    **options: Any,
) -> tuple[SavedState, Taken]:
    """A backup with memory. However it ends, QEMU is as before."""
    wanted = LiveOptions(freeze=FreezePolicy.NEVER, vmstate=way, **options)
    with guest.qmp() as qmp:
        disks = find_disks(qmp, Selection())
        taken = Taken([disk.size_bytes for disk in disks], then)
        source = kind(qmp, detect(qmp), wanted, control or LiveControl(), print)
        try:
            instant = source.run([DiskTask(disk, None) for disk in disks], taken)
        finally:
            assert_untouched(qmp)
            assert not tracked(guest)
    assert instant.state is not None
    return instant.state, taken


def assert_guest_goes_on(guest: BootGuest) -> None:
    guest.wait_written(guest.written() + 64)
    assert guest.errors == 0


def go_on(folder: Path, disks: list[bytes], state: bytes, program: str | None, extra: list[str]) -> BootGuest:
    """A new VM that begins where the other one was."""
    folder.mkdir()
    for name, content in zip("ab", disks, strict=True):
        (folder / f"{name}.raw").write_bytes(content)
    (folder / "state").write_bytes(state)
    made = BootGuest(folder, [*extra, "-incoming", f"exec:cat {folder}/state"], program=program)
    deadline = time.monotonic() + 30
    with made.qmp() as qmp:
        while qmp.execute("query-status")["status"] == "inmigrate":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        qmp.execute("cont")
    return made


def assert_vm_goes_on(
    folder: Path, disks: list[bytes], state: bytes, program: str | None = None, extra: list[str] | None = None
) -> None:
    """It first tells of the next multiple of 64 writes, and writes on where the disks end."""
    count = assert_prefix(*disks)
    with contextlib.closing(go_on(folder, disks, state, program, extra or [])) as guest:
        guest.wait_written(count + 200)
        told = [int(line, 16) for line in guest.serial.read_text().split() if len(line) == 8]
        assert told == list(range(-(-count // 64) * 64, told[-1] + 1, 64))
        assert guest.errors == 0
        with guest.qmp() as qmp:
            qmp.execute("stop")
        written = assert_prefix(*((folder / f"{name}.raw").read_bytes() for name in "ab"))
        assert written >= count + 200


def test_the_vm_goes_on(guest: BootGuest, place: Path) -> None:
    saved, taken = take(guest)
    assert saved.way is StateWay.BACKGROUND
    assert 0 < saved.pause_s < 2
    assert taken.each_once
    assert_guest_goes_on(guest)
    assert_vm_goes_on(place / "again", list(map(bytes, taken.disks)), bytes(taken.state))


@pytest.mark.parametrize(
    ("way", "kind"),
    [(StateWay.BACKGROUND, PushSource), (StateWay.BACKGROUND, PullSource), (StateWay.PAUSED, PushSource)],
)
def test_the_vm_goes_on_in_a_newer_qemu(place: Path, way: StateWay, kind: type[ConductedSource]) -> None:
    program = newer("qemu-system-x86_64")
    with contextlib.closing(BootGuest(place, program=program)) as guest:
        guest.wait_written(64)
        for _ in range(2):  # the second time after a migration that has ended
            saved, taken = take(guest, way, kind=kind)
            assert saved.way is way
            assert_guest_goes_on(guest)
    assert_vm_goes_on(place / "again", list(map(bytes, taken.disks)), bytes(taken.state), program)


def test_the_paused_way_needs_a_newer_qemu(guest: BootGuest) -> None:
    with pytest.raises(VmStateUnsupported, match=r"needs QEMU 10\.0"):
        take(guest, StateWay.PAUSED)
    assert_guest_goes_on(guest)


def test_what_a_backup_left_that_was_killed_with_its_sink(guest: BootGuest) -> None:
    with guest.qmp() as qmp:
        on = [{"capability": "background-snapshot", "state": True}]
        qmp.execute("migrate-set-capabilities", {"capabilities": on})
        assert cleanup.remove_leftovers(qmp)
        assert_untouched(qmp)


# --- QEMU cannot


def unprivileged(place: Path, program: str | None = None) -> BootGuest:
    """A guest whose QEMU may not use userfaultfd."""
    if os.geteuid() != 0 or Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        pytest.skip("needs root, and a kernel that keeps userfaultfd to it")
    wrapper = place / "as-nobody"
    setpriv = need("setpriv")
    qemu = program or need("qemu-system-x86_64")
    wrapper.write_text(f'#!/bin/sh\nexec {setpriv} --reuid 65534 --regid 65534 --clear-groups {qemu} "$@"\n')
    wrapper.chmod(0o755)
    os.chown(place, 65534, 65534)
    for name, size_bytes in (("boot", 0), ("a", GUEST_DISK_BYTES), ("b", GUEST_DISK_BYTES)):
        path = place / f"{name}.raw"
        path.touch()
        os.truncate(path, size_bytes)
        os.chown(path, 65534, 65534)
    return BootGuest(place, program=str(wrapper))


def test_without_userfaultfd(place: Path) -> None:
    with contextlib.closing(unprivileged(place)) as guest:
        guest.wait_written(64)
        with pytest.raises(VmStateUnsupported, match="not supported by host kernel"):
            take(guest)
        with pytest.raises(VmStateUnsupported, match=r"host kernel; saving .* needs QEMU 10\.0"):
            take(guest, StateWay.AUTO)
        assert_guest_goes_on(guest)


def test_without_userfaultfd_a_newer_qemu_is_paused(place: Path) -> None:
    program = newer("qemu-system-x86_64")
    with contextlib.closing(unprivileged(place, program)) as guest:
        guest.wait_written(64)
        saved, taken = take(guest, StateWay.AUTO)
        assert saved.way is StateWay.PAUSED
        assert "kernel" in saved.note
        assert_guest_goes_on(guest)
    assert_vm_goes_on(place / "again", list(map(bytes, taken.disks)), bytes(taken.state), program)


def test_a_guest_that_does_not_run(guest: BootGuest) -> None:
    with guest.qmp() as qmp:
        qmp.execute("stop")
        disks = find_disks(qmp, Selection())
        source = PushSource(qmp, detect(qmp), LiveOptions(vmstate=StateWay.BACKGROUND), LiveControl(), print)
        with pytest.raises(VmStateUnsupported, match="not running"):
            source.run([DiskTask(disk, None) for disk in disks], Taken([disk.size_bytes for disk in disks]))
        assert not qmp.execute("query-status")["running"]
        assert_clean(qmp)


def test_a_migration_of_somebody_else(guest: BootGuest, place: Path) -> None:
    with guest.qmp() as qmp:
        qmp.execute("migrate-set-parameters", {"max-bandwidth": 4096})
        qmp.execute("migrate", {"uri": f"exec:cat >{place}/elsewhere"})
        disks = find_disks(qmp, Selection())
        source = PushSource(qmp, detect(qmp), LiveOptions(vmstate=StateWay.BACKGROUND), LiveControl(), print)
        with pytest.raises(LiveBackupBusy, match="migrating"):
            source.run([DiskTask(disk, None) for disk in disks], Taken([disk.size_bytes for disk in disks]))
        assert qmp.execute("query-migrate")["status"] == "active"
        qmp.execute("migrate_cancel")


# --- what fails on the way

MEMORY = 48 * MiB


@pytest.fixture(params=["installed", "newer"])
def large_guest(place: Path, request: pytest.FixtureRequest) -> Iterator[BootGuest]:
    """One with so much memory that saving it takes a while."""
    program = newer("qemu-system-x86_64") if request.param == "newer" else None
    (place / "content").write_bytes(os.urandom(MEMORY))
    made = BootGuest(place, loaded(place), program=program)
    with contextlib.closing(made):
        made.wait_written(64)
        yield made


def loaded(place: Path) -> list[str]:
    """Arguments that put a file into memory where the guest leaves it alone."""
    return ["-m", "96", "-device", f"loader,file={place}/content,addr=0x1000000,force-raw=on"]


def fail(error: BaseException) -> Callable[[], None]:
    def now() -> None:
        raise error

    return now


def test_the_repository_is_full(large_guest: BootGuest) -> None:
    with pytest.raises(RepositoryFull):
        take(large_guest, then=fail(RepositoryFull("full")))
    assert_guest_goes_on(large_guest)


def test_cancelling_while_the_guest_is_paused(place: Path) -> None:
    (place / "content").write_bytes(os.urandom(MEMORY))
    control = LiveControl()
    with contextlib.closing(BootGuest(place, loaded(place), program=newer("qemu-system-x86_64"))) as guest:
        guest.wait_written(64)
        with pytest.raises(Interrupted, match="enough"):
            take(guest, StateWay.PAUSED, lambda: control.cancel("enough"), control)
        assert_guest_goes_on(guest)


def test_cancelling(large_guest: BootGuest) -> None:
    control = LiveControl(speed_limit_bytes_s=2 * MiB)
    with pytest.raises(Interrupted, match="enough"):
        take(large_guest, then=lambda: control.cancel("enough"), control=control)
    assert_guest_goes_on(large_guest)


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_sink_dies_or_hangs(large_guest: BootGuest, sinks: list[SinkHost], number: signal.Signals) -> None:
    with pytest.raises((SinkLost, VmStateFailed)):
        take(large_guest, then=lambda: os.kill(sinks[0].pid, number), max_guest_stall_s=1.0)
    assert_guest_goes_on(large_guest)


def test_nobody_takes_the_memory(large_guest: BootGuest) -> None:
    """The guest waits for the bound at the most; then the memory is dropped, and it goes on."""
    over = threading.Event()
    timer = threading.Timer(2.5, over.set)

    def hang() -> None:
        timer.start()
        over.wait()

    with pytest.raises(BackupBroken, match="the guest goes first"):
        take(large_guest, then=hang, memory_bytes=4 * MiB, max_guest_stall_s=1.0)
    assert_guest_goes_on(large_guest)


def test_a_pause_that_would_be_too_long(guest: BootGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmstate, "_is_tracking", lambda _qmp: False)
    with pytest.raises(BackupBroken, match="stand still"):
        take(guest, max_guest_stall_s=0.2)
    assert_guest_goes_on(guest)


def test_jobs_that_cannot_be_started(guest: BootGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PushSource, "_take_instant", lambda _self: fail(BackupBroken("no jobs"))())
    with pytest.raises(BackupBroken, match="no jobs"):
        take(guest)
    assert_guest_goes_on(guest)


def test_qemu_does_not_answer_for_long(guest: BootGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backup gives up; its sink does not, until the guest goes on."""
    monkeypatch.setattr(PushSource, "_take_instant", lambda _self: fail(BackupBroken("no jobs"))())
    monkeypatch.setattr(vmstate, "_resume", lambda _qmp: None)
    monkeypatch.setattr(vmstate, "undo", lambda _qmp, _what: fail(QmpTimeout("no answer"))())
    with guest.qmp() as qmp:
        disks = find_disks(qmp, Selection())
        source = PushSource(qmp, detect(qmp), LiveOptions(vmstate=StateWay.BACKGROUND), LiveControl(), print)
        with pytest.raises(BackupBroken, match="no jobs"):
            source.run([DiskTask(disk, None) for disk in disks], Taken([disk.size_bytes for disk in disks]))
        assert not qmp.execute("query-status")["running"]
    wait_untouched(guest)
    assert_guest_goes_on(guest)


def wait_untouched(guest: BootGuest) -> None:
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(CasbackupError, AssertionError), guest.qmp() as qmp:
            assert_untouched(qmp)
            assert not tracked(guest)
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


MOMENTS = 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cancelling_at_any_moment_leaves_nothing(large_guest: BootGuest) -> None:
    rng = random.Random(2)
    for _ in range(MOMENTS):
        control = LiveControl(speed_limit_bytes_s=64 * MiB)
        timer = threading.Timer(rng.uniform(0, 2.5), lambda control=control: control.cancel("enough"))  # type: ignore[misc]
        timer.start()
        with contextlib.suppress(Interrupted):
            take(large_guest, control=control)
        timer.cancel()
    assert_guest_goes_on(large_guest)


CODE = """
import sys, time
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection, find_disks
from casbackup.qemu.features import detect
from casbackup.qemu.push import PushSource
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import DiskTask, LiveOptions
from casbackup.qemu.vmstate import StateWay

def hang(*_):
    print("now", flush=True)
    time.sleep(60)

class Consumer:
    def write(self, disk, offset, data):
        if disk == "2":
            hang()
    def zero(self, disk, offset, length):
        pass

if sys.argv[2] == "paused":
    PushSource._take_instant = hang
qmp = QmpClient.connect(sys.argv[1])
disks = find_disks(qmp, Selection())
source = PushSource(qmp, detect(qmp), LiveOptions(vmstate=StateWay.BACKGROUND), LiveControl(), print)
source.run([DiskTask(disk, None) for disk in disks], Consumer())
"""


@pytest.mark.parametrize("moment", ["paused", "saving"])
def test_the_backup_is_killed_and_its_sink_cleans_up(large_guest: BootGuest, moment: str) -> None:
    command = [sys.executable, "-c", CODE, large_guest.qmp_path, moment]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
    finally:
        process.kill()
        process.communicate()
    wait_untouched(large_guest)
    assert_guest_goes_on(large_guest)
