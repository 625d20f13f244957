"""Pull mode: what QEMU pushes and what we read are one point in time, and nothing of it stays in QEMU."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.errors import LiveBackupBusy, LiveUnsupported
from casbackup.qemu import graph, reading
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection
from casbackup.qemu.features import detect
from casbackup.qemu.graph import Spliced
from casbackup.qemu.machine import Machine
from casbackup.qemu.pulling import Puller
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import DiskTask, FreezePolicy, LiveOptions, Mode
from casbackup.repository.repository import Repository
from tests.waiting import wait_until

from .conftest import BootGuest, Daemon, Gathering, Process, Vm, assert_clean, assert_prefix, need, newer, two_disks
from .test_live import Backups

pytestmark = pytest.mark.qemu
KiB, MiB = 1024, 1024 * 1024
OPTIONS = LiveOptions(freeze=FreezePolicy.NEVER)
DATA_BYTES = 8 * MiB
"""Of each disk of a ``Vm``; the rest are holes."""


def gather(qmp: QmpClient, mode: Mode = Mode.PULL, control: LiveControl | None = None) -> Gathering:
    """A backup of everything, each cluster once."""
    machine = Machine(qmp, Selection(), OPTIONS, mode)
    gathered = Gathering([disk.size_bytes for disk in machine.disks])
    source = machine.source(control or LiveControl(), print, None)
    instant = source.run([DiskTask(disk, None) for disk in machine.disks], gathered)
    assert instant.mode is Mode.PULL
    assert_clean(qmp)
    assert gathered.each_once
    return gathered


def test_all_of_all_disks_comes_once(vm: Vm) -> None:
    with vm.qmp() as qmp:
        gathered = gather(qmp)
    for content, path in zip(gathered.disks, vm.disks.values(), strict=True):
        assert content == path.read_bytes()


def test_two_disks_of_a_running_guest_share_an_instant(newer_guest: BootGuest) -> None:
    with newer_guest.qmp() as qmp:
        gathered = gather(qmp, control=LiveControl(speed_limit_bytes_s=16 * MiB))
        count = assert_prefix(bytes(gathered.disks[0]), bytes(gathered.disks[1]))
    assert count >= 64
    newer_guest.wait_written(newer_guest.written() + 64)
    assert newer_guest.written() > count
    assert newer_guest.errors == 0


def read_bytes(qemu: Process) -> int:
    """What a QEMU has read from files so far."""
    lines = Path(f"/proc/{qemu.process.pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def test_what_is_overwritten_is_pushed_and_read_once(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old data of each cluster is read once: by QEMU before it is overwritten, or by us."""
    before = [path.read_bytes() for path in vm.disks.values()]
    read_before = read_bytes(vm)
    divert, start = graph.divert, Puller.start

    def divert_and_write(qmp: QmpClient, disks: list[Spliced]) -> None:
        divert(qmp, disks)
        with vm.guest("a") as guest:  # at once, so all that follows comes after it
            for offset in (0, 64 * KiB, 3 * MiB + 4096, 20 * MiB):
                guest.write(offset, b"x" * 4096)
            guest.write(6 * MiB - 1 * KiB, b"y" * 2 * KiB)

    def start_when_pushed(puller: Puller) -> None:
        """What is still under way when its segment is read costs a second reading of the segment."""
        merger = puller._merger
        wait_until(lambda: merger.wanted_bytes - merger.left_bytes == 6 * 64 * KiB)
        start(puller)

    monkeypatch.setattr(graph, "divert", divert_and_write)
    monkeypatch.setattr(Puller, "start", start_when_pushed)
    with vm.qmp() as qmp:
        gathered = gather(qmp)
    assert [bytes(disk) for disk in gathered.disks] == before
    assert read_bytes(vm) - read_before < 2 * DATA_BYTES + 2 * 64 * KiB, "something was read twice"
    assert vm.disks["a"].read_bytes()[:4096] == b"x" * 4096
    assert vm.errors == 0


def test_the_guest_does_not_wait_for_a_flush(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """What re-opens nodes flushes them while the guest's requests are held: that is done shortly before, too."""
    events: list[str] = []
    for module, name in ((reading, "flush"), (graph, "_reopen")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, real=real, name=name: (events.append(f"{name} {len(args[1])}"), real(*args))
        )
    with vm.qmp() as qmp:
        gather(qmp)
    assert events == ["flush 2", "_reopen 2"] * 2


def change(vm: Vm, seed: int) -> int:
    """Random writes, zeros and discards; returns in how many clusters."""
    rng = random.Random(seed)
    clusters: set[tuple[str, int]] = set()
    for name in vm.disks:
        with vm.guest(name) as guest:
            for _ in range(12):
                offset = rng.randrange(0, 32 * MiB - 256 * KiB) // 512 * 512
                length = rng.randrange(512, 200 * KiB) // 512 * 512
                kind = rng.random()
                if kind < 0.7:
                    guest.write(offset, bytes([rng.randrange(1, 256)]) * length)
                else:
                    guest.write_zeros(offset, length, may_trim=kind < 0.85)
                clusters |= {(name, n) for n in range(offset >> 16, (offset + length - 1 >> 16) + 1)}
    return len(clusters)


def test_full_and_three_increments(vm: Vm, repository: Repository) -> None:
    backups = Backups(repository)
    clusters = 2 * 32 * 16
    with vm.qmp() as qmp:
        for number in range(4):
            report = backups.take(qmp, mode=Mode.AUTO)
            assert report.snapshot.manifest.live is not None
            assert report.snapshot.manifest.live.mode == "pull"
            contents = backups.contents(report.snapshot)
            assert contents == [path.read_bytes() for path in vm.disks.values()]
            assert [disk.increment for disk in report.disks] == [number > 0] * 2, report.disks
            assert report.snapshot.manifest.stats.read_bytes <= clusters * 64 * KiB
            assert_clean(qmp, bitmaps=1)
            clusters = change(vm, number)
    assert backups.messages == []
    assert vm.errors == 0


def test_a_guest_that_writes_all_the_time(newer_guest: BootGuest, repository: Repository) -> None:
    """Increments, too, are a prefix of its log."""
    backups = Backups(repository)
    with newer_guest.qmp() as qmp:
        counts = []
        for _ in range(3):
            newer_guest.wait_written(newer_guest.written() + 64)
            report = backups.take(qmp, mode=Mode.AUTO, verify_share=0.2)
            counts.append(assert_prefix(*backups.contents(report.snapshot)))
        assert report.disks[0].increment
        assert_clean(qmp, bitmaps=1)
    assert counts == sorted(set(counts))
    assert newer_guest.errors == 0
    assert backups.messages == []


def test_with_threads_of_their_own(place: Path) -> None:
    """Disks whose devices have iothreads."""
    extra = [
        "-object",
        "iothread,id=t",
        "-blockdev",
        f"driver=raw,node-name=c,file.driver=file,file.filename={place}/c",
    ]
    (place / "c").write_bytes(os.urandom(8 * MiB + 512))
    guest = BootGuest(
        place, [*extra, "-device", "virtio-blk-pci,drive=c,id=c,iothread=t"], program=newer("qemu-system-x86_64")
    )
    with contextlib.closing(guest), guest.qmp() as qmp:
        gathered = gather(qmp)
        assert gathered.disks[2] == (place / "c").read_bytes()
        assert_prefix(bytes(gathered.disks[0]), bytes(gathered.disks[1]))
        guest.wait_written(guest.written() + 64)
        assert guest.errors == 0


@pytest.fixture
def proxmox(place: Path) -> Iterator[Process]:
    """Set up by ``-drive``, with nodes that have no names of their own; qcow2, SCSI, and variables of firmware."""
    for name in ("data", "vars", "code"):
        (place / name).write_bytes(os.urandom(64 * KiB))
        os.truncate(place / name, 2 * MiB)
    subprocess.run(
        [need("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", place / "data", place / "root"], check=True
    )
    command = [newer("qemu-system-x86_64"), "-M", "pc", "-m", "16", "-accel", "tcg", "-display", "none", "-S"]
    command += ["-nodefaults", "-qmp", f"unix:{place}/qmp.sock,server=on,wait=off", "-device", "virtio-scsi-pci"]
    command += ["-drive", f"file={place}/root,if=none,id=drive-scsi0,format=qcow2,discard=on"]
    command += ["-device", "scsi-hd,drive=drive-scsi0,id=scsi0"]
    command += ["-drive", f"file={place}/data,if=none,id=drive-ide0,format=raw,file.locking=off"]
    command += ["-device", "ide-hd,drive=drive-ide0,id=ide0"]
    command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={place}/code"]
    command += ["-drive", f"if=pflash,unit=1,format=raw,id=drive-efidisk0,file={place}/vars"]
    made = Process(place, command)
    with contextlib.closing(made):
        yield made


def test_disks_of_all_kinds(proxmox: Process, place: Path) -> None:
    files = {"scsi0": "data", "ide0": "data", "efidisk0": "vars"}
    with proxmox.qmp() as qmp:
        nodes = [entry.get("inserted", {}).get("node-name") for entry in qmp.execute("query-block")]
        for _ in range(2):
            machine = Machine(qmp, Selection(), OPTIONS, Mode.PULL)
            gathered = gather(qmp)
            for disk, content in zip(machine.disks, gathered.disks, strict=True):
                assert content == (place / files[disk.name]).read_bytes(), disk.name
            assert [entry.get("inserted", {}).get("node-name") for entry in qmp.execute("query-block")] == nodes


def test_what_the_newer_one_can(vm: Vm) -> None:
    with vm.qmp() as qmp:
        features = detect(qmp)
    assert features.pull
    assert features.min_cluster_size


def other_server(qmp: QmpClient, place: Path) -> None:
    qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(place / "other.sock")}}})


def test_a_server_that_somebody_else_uses(vm: Vm, repository: Repository, place: Path) -> None:
    """There is one in a QEMU. It stays as it is, and QEMU pushes the data."""
    backups = Backups(repository)
    with vm.qmp() as qmp:
        other_server(qmp, place)
        with pytest.raises(LiveUnsupported, match="NBD server"):
            Machine(qmp, Selection(), OPTIONS, Mode.PULL)
        live = backups.take(qmp, mode=Mode.AUTO).snapshot.manifest.live
        assert live is not None
        assert live.mode == "push"
        assert "NBD server" in live.mode_note
        qmp.execute("nbd-server-stop")
        live = backups.take(qmp, mode=Mode.AUTO).snapshot.manifest.live
        assert live is not None
        assert (live.mode, live.mode_note, live.increments) == ("pull", "", ("a", "b"))


def test_a_disk_that_refuses_the_filter(place: Path, repository: Repository) -> None:
    """Somebody else writes to its node, past the device. Nothing had begun, and QEMU pushes the data."""
    disks = two_disks(place)
    (place / "c").write_bytes(os.urandom(2 * MiB))
    extra = ["-blockdev", f"driver=raw,node-name=c,file.driver=file,file.filename={place}/c"]
    vm = Vm(place, disks, [*extra, "-device", "virtio-blk-pci,drive=c,id=c,share-rw=on"])
    backups = Backups(repository)
    with contextlib.closing(vm), vm.qmp() as qmp:
        address = {"type": "unix", "path": str(place / "vhost.sock")}
        other = {"type": "vhost-user-blk", "id": "other", "node-name": "c", "writable": True, "addr": address}
        qmp.execute("block-export-add", other)
        report = backups.take(qmp, mode=Mode.AUTO)
        assert report.snapshot.manifest.live is not None
        assert report.snapshot.manifest.live.mode == "push"
        assert "write" in report.snapshot.manifest.live.mode_note
        contents = backups.contents(report.snapshot)
        assert contents == [path.read_bytes() for path in (*disks.values(), place / "c")]
        assert_clean(qmp, bitmaps=1)


def test_a_storage_daemon_has_no_devices(daemon: Daemon) -> None:
    with daemon.qmp() as qmp:
        with pytest.raises(LiveUnsupported, match="pull mode is not possible"):
            Machine(qmp, Selection(), OPTIONS, Mode.PULL)
        assert_clean(qmp)


def test_an_older_qemu_is_not_trusted(guest: BootGuest) -> None:
    with guest.qmp() as qmp:
        if qmp.version >= (8, 0, 0):
            pytest.skip("the QEMU of the system is new enough")
        with pytest.raises(LiveUnsupported, match=r"8\.0"):
            Machine(qmp, Selection(), OPTIONS, Mode.PULL)


def test_two_at_once_are_not_possible(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """No job tells of one that is running."""
    found: list[type[BaseException]] = []

    def try_another() -> None:
        with QmpClient.connect(str(vm.folder / "writer.sock")) as other:
            try:
                Machine(other, Selection(), OPTIONS, Mode.AUTO)
            except LiveBackupBusy as error:
                found.append(type(error))

    class Trying(Gathering):
        def write(self, disk: str, offset: int, data: memoryview) -> None:
            if not self.events:
                try_another()
            super().write(disk, offset, data)

    with vm.qmp() as qmp:
        machine = Machine(qmp, Selection(), OPTIONS, Mode.PULL)
        gathered = Trying([disk.size_bytes for disk in machine.disks])
        machine.source(LiveControl(), print, None).run([DiskTask(disk, None) for disk in machine.disks], gathered)
        assert_clean(qmp)
    assert found == [LiveBackupBusy]
    assert gathered.each_once
