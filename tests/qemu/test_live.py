"""Live backups into a repository: full, increments, and what makes a bitmap worthless."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from casbackup.errors import CasbackupError, Interrupted, RepositoryFull
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.jobs.live import LiveReport, LiveRequest, live_backup
from casbackup.peer.disk import SnapshotDisk
from casbackup.peer.local import LocalPeer
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import Selection
from casbackup.qemu.machine import Machine
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import FreezePolicy, LiveOptions, Mode
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository

from .conftest import BootGuest, Daemon, assert_clean, assert_prefix, need

pytestmark = pytest.mark.qemu
VM = VmName("vm/100")
KiB, MiB = 1024, 1024 * 1024


class Backups:
    """Backups of one QEMU into one repository."""

    def __init__(self, repository: Repository) -> None:
        self.peer = LocalPeer(repository)
        self.messages: list[str] = []

    def take(
        self,
        qmp: QmpClient,
        *,
        control: LiveControl | None = None,
        options: LiveOptions | None = None,
        mode: Mode = Mode.PUSH,
        **request: object,
    ) -> LiveReport:
        options = options or LiveOptions(freeze=FreezePolicy.NEVER)
        machine = Machine(qmp, Selection(), options, mode)
        wanted = LiveRequest(DEFAULT_NAMESPACE, VM, **request)  # type: ignore[arg-type]
        return live_backup(self.peer, machine, wanted, control=control or LiveControl(), report=self.messages.append)

    def contents(self, snapshot: Snapshot) -> list[bytes]:
        found = []
        for record in snapshot.manifest.disks:
            buffer = bytearray(record.size_bytes)
            SnapshotDisk(self.peer, record).read_into(0, memoryview(buffer))
            found.append(bytes(buffer))
        return found

    def assert_equal(self, snapshot: Snapshot, daemon: Daemon) -> None:
        for record, content in zip(snapshot.manifest.disks, self.contents(snapshot), strict=True):
            assert content == daemon.disks[record.name].read_bytes(), record.name


@pytest.fixture
def backups(repository: Repository) -> Backups:
    return Backups(repository)


def change(daemon: Daemon, seed: int) -> int:
    """Random writes, zeros and discards of the guest; returns in how many clusters."""
    rng = random.Random(seed)
    clusters: set[tuple[str, int]] = set()
    for name in daemon.disks:
        with daemon.guest(name) as guest:
            for _ in range(12):
                offset = rng.randrange(0, 32 * MiB - 256 * KiB) // 512 * 512
                length = rng.randrange(512, 200 * KiB) // 512 * 512
                kind = rng.random()
                if kind < 0.7:
                    guest.write(offset, rng.randbytes(length))
                else:
                    guest.write_zeros(offset, length, may_trim=kind < 0.85)
                clusters |= {(name, n) for n in range(offset >> 16, (offset + length - 1 >> 16) + 1)}
            guest.write_zeros(24 * MiB, 4 * MiB + 4096)
            clusters |= {(name, n) for n in range(24 * 16, 28 * 16 + 1)}
    return len(clusters)


def test_full_and_three_increments(daemon: Daemon, backups: Backups) -> None:
    with daemon.qmp() as qmp:
        first = backups.take(qmp)
        assert [disk.increment for disk in first.disks] == [False, False]
        backups.assert_equal(first.snapshot, daemon)
        for number in range(3):
            clusters = change(daemon, number)
            report = backups.take(qmp)
            assert [disk.increment for disk in report.disks] == [True, True], report.disks
            backups.assert_equal(report.snapshot, daemon)
            assert report.snapshot.manifest.stats.read_bytes <= clusters * 64 * KiB
            assert_clean(qmp, bitmaps=1)
        manifest = report.snapshot.manifest
        stats = manifest.stats
        assert stats.zero_bytes + stats.reused_bytes + stats.new_bytes == sum(
            disk.size_bytes for disk in manifest.disks
        )
        backups.assert_equal(backups.take(qmp).snapshot, daemon)
    assert backups.messages == []


def test_nothing_changed_reads_and_stores_nothing(daemon: Daemon, backups: Backups) -> None:
    with daemon.qmp() as qmp:
        first = backups.take(qmp).snapshot
        second = backups.take(qmp).snapshot
    assert second.manifest.stats.read_bytes == 0
    assert second.manifest.stats.new_chunks == 0
    assert [d.root for d in second.manifest.disks] == [d.root for d in first.manifest.disks]


def test_a_guest_that_writes_all_the_time(guest: BootGuest, backups: Backups) -> None:
    with guest.qmp() as qmp:
        counts = []
        for _ in range(3):
            guest.wait_written(guest.written() + 64)
            report = backups.take(qmp)
            counts.append(assert_prefix(*backups.contents(report.snapshot)))
        assert report.disks[0].increment
        assert_clean(qmp, bitmaps=1)
    assert counts == sorted(set(counts))
    assert guest.errors == 0


@pytest.mark.slow
def test_two_targets_do_not_disturb_each_other(daemon: Daemon, backups: Backups, tmp_path: Path) -> None:
    with Repository.create(str(tmp_path / "other")) as repository, daemon.qmp() as qmp:
        other = Backups(repository)
        backups.take(qmp)
        other.take(qmp)
        change(daemon, 1)
        for target in (backups, other):
            report = target.take(qmp)
            assert all(disk.increment for disk in report.disks)
            target.assert_equal(report.snapshot, daemon)
        assert_clean(qmp, bitmaps=2)


@contextmanager
def restarted(daemon: Daemon, how: str) -> Iterator[Daemon]:
    """The same disks in a new QEMU."""
    getattr(daemon, how)()
    daemon.close()
    made = Daemon(daemon.folder, daemon.disks, daemon.image_format)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("how", ["quit", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_lost_bitmap_means_a_full_read_that_stores_nothing(daemon: Daemon, backups: Backups, how: str) -> None:
    with daemon.qmp() as qmp:
        backups.take(qmp)
    with restarted(daemon, how) as anew, anew.qmp() as qmp:
        report = backups.take(qmp)
        assert not any(disk.increment for disk in report.disks)
        assert "lost" in report.disks[0].reason
        assert report.snapshot.manifest.stats.new_chunks == 0
        backups.assert_equal(report.snapshot, anew)


def test_a_forgotten_snapshot_makes_its_bitmap_worthless(daemon: Daemon, backups: Backups) -> None:
    with daemon.qmp() as qmp:
        first = backups.take(qmp).snapshot
        backups.peer.remove([first])
        report = backups.take(qmp)
        assert not any(disk.increment for disk in report.disks)
        assert_clean(qmp, bitmaps=1)


def test_an_older_snapshot_is_no_base_for_a_newer_bitmap(daemon: Daemon, backups: Backups) -> None:
    with daemon.qmp() as qmp:
        backups.take(qmp)
        change(daemon, 5)
        second = backups.take(qmp).snapshot
        backups.peer.remove([second])
        report = backups.take(qmp)
        assert not any(disk.increment for disk in report.disks)
        assert "belongs to no snapshot" in report.disks[0].reason
        backups.assert_equal(report.snapshot, daemon)


def test_a_failed_commit_leaves_the_old_bitmap_right(
    daemon: Daemon, backups: Backups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job in QEMU has succeeded then: a bitmap that it had cleared would lose changes."""
    with daemon.qmp() as qmp:
        backups.take(qmp)
        change(daemon, 7)
        session = type(backups.peer.open_session(DEFAULT_NAMESPACE, VM))

        def fail(*_: object) -> None:
            raise CasbackupError("the commit failed")

        with monkeypatch.context() as patch:
            patch.setattr(session, "commit", fail)
            with pytest.raises(CasbackupError, match="the commit failed"):
                backups.take(qmp)
        assert_clean(qmp, bitmaps=1)
        report = backups.take(qmp)
        assert all(disk.increment for disk in report.disks)
        backups.assert_equal(report.snapshot, daemon)


@pytest.fixture
def qcow2(place: Path) -> Iterator[Daemon]:
    disks = {}
    for name in ("a", "b"):
        raw, path = place / f"{name}.raw", place / f"{name}.qcow2"
        raw.write_bytes(os.urandom(3 * MiB))
        os.truncate(raw, 32 * MiB)
        subprocess.run([need("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
        disks[name] = path
    daemon = Daemon(place, disks, "qcow2")
    yield daemon
    daemon.close()


@pytest.mark.parametrize(("how", "increment"), [("quit", True), ("kill", False)])
def test_bitmaps_of_qcow2_outlive_a_clean_end_only(qcow2: Daemon, backups: Backups, how: str, increment: bool) -> None:
    with qcow2.qmp() as qmp:
        backups.take(qmp)
        change(qcow2, 3)
        qmp.execute("query-version")
    with restarted(qcow2, how) as anew, anew.qmp() as qmp:
        report = backups.take(qmp)
        assert [disk.increment for disk in report.disks] == [increment] * 2, report.disks
        assert_clean(qmp, bitmaps=1)
        contents = backups.contents(report.snapshot)
        for name, content in zip(("a", "b"), contents, strict=True):
            with anew.guest(name) as guest:
                actual = bytearray(32 * MiB)
                guest.read_into(0, memoryview(actual))
            assert content == actual


@pytest.mark.slow
def test_samples_of_what_is_unchanged_agree(guest: BootGuest, backups: Backups) -> None:
    """Also while the guest writes: what it changes comes with the increment."""
    with guest.qmp() as qmp:
        backups.take(qmp)
        for _ in range(2):
            guest.wait_written(guest.written() + 64)
            report = backups.take(qmp, verify_share=0.5)
            assert all(disk.increment for disk in report.disks), report.disks
            assert_prefix(*backups.contents(report.snapshot))
        assert qmp.execute("query-block-exports") == []
    assert backups.messages == []


def test_a_bitmap_that_lies_is_found_out_and_distrusted(guest: BootGuest, backups: Backups) -> None:
    with guest.qmp() as qmp:
        qmp.execute("stop")
        backups.take(qmp)
        with (guest.folder / "a.raw").open("r+b") as file:  # behind QEMU's back
            file.seek(50 * MiB + 4096)
            file.write(b"changed")
        assert all(disk.increment for disk in backups.take(qmp).disks), "nobody looked"
        report = backups.take(qmp, verify_share=1.0)
        assert not any(disk.increment for disk in report.disks)
        assert "have changed, and the dirty bitmap does not say so" in report.disks[0].reason
        content = backups.contents(report.snapshot)[0]
        assert content == (guest.folder / "a.raw").read_bytes()
        assert_clean(qmp, bitmaps=1)
    assert len(backups.messages) == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_cancelling_at_any_moment_leaves_only_the_bitmap_for_increments(daemon: Daemon, backups: Backups) -> None:
    """Two disks; the bitmap of the last snapshot stays true through all of it."""
    rng = random.Random(11)
    with daemon.qmp() as qmp:
        backups.take(qmp)
        kept = bitmap_names(qmp)
        for number in range(20):
            change(daemon, number)
            control = LiveControl(speed_limit_bytes_s=rng.choice([4, 16, 64]) * MiB)
            timer = threading.Timer(rng.uniform(0, 1.5), control.cancel, ("enough",))
            timer.start()
            with contextlib.suppress(Interrupted):
                backups.take(qmp, control=control)
                kept = bitmap_names(qmp)
            timer.cancel()
            assert_clean(qmp, bitmaps=1)
            assert bitmap_names(qmp) == kept
        report = backups.take(qmp)
        assert all(disk.increment for disk in report.disks)
        backups.assert_equal(report.snapshot, daemon)


def bitmap_names(qmp: QmpClient) -> set[str]:
    nodes = qmp.execute("query-named-block-nodes")
    return {bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", ())}


@pytest.mark.root
def test_a_repository_whose_disk_is_full(daemon: Daemon, place: Path) -> None:
    """On a real file system; afterwards there is room, and the bitmap of before is still right."""
    folder = place / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "small", folder]).returncode:
        pytest.skip("no tmpfs can be mounted")
    try:
        with Repository.create(str(folder / "repository")) as repository, daemon.qmp() as qmp:
            backups = Backups(repository)
            backups.take(qmp)
            for name in daemon.disks:
                with daemon.guest(name) as guest:
                    guest.write(8 * MiB, os.urandom(20 * MiB))
            with pytest.raises(RepositoryFull):
                backups.take(qmp)
            assert_clean(qmp, bitmaps=1)
            subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)
            report = backups.take(qmp)
            assert all(disk.increment for disk in report.disks)
            backups.assert_equal(report.snapshot, daemon)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
