"""Repositories that released versions wrote: opened, restored, checked, rebuilt, used further.

``formatN.tar.zst`` is a repository of format N and ``formatN.json`` says what is in it; both are made by
``scripts/make_golden.py`` and never edited. One of an older format is migrated first.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import zstandard

from casbackup.block.memory import MemoryDevice
from casbackup.clock import format_time, parse_time
from casbackup.errors import MigrationNeeded
from casbackup.fs import RealFileSystem
from casbackup.ids import BlobId, DiskName, Namespace, SessionId, VmName
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.restore import RestoreOptions, read_config, restore_disk
from casbackup.jobs.segments import DeviceSegments
from casbackup.peer.disk import SnapshotDisk
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.gc import execute_gc, plan_gc
from casbackup.repository.rebuild import rebuild_index
from casbackup.repository.repository import Repository
from casbackup.spec.config import FORMAT, OLDEST_FORMAT
from casbackup.spec.manifest import DiskRecord, Manifest
from casbackup.testing.clock import FakeClock
from casbackup_migrations.execute import execute_migration
from casbackup_migrations.plan import plan_migration

HERE = Path(__file__).parent
SCRIPT = HERE.parent.parent / "scripts" / "make_golden.py"
FORMATS = range(OLDEST_FORMAT, FORMAT + 1)

Expected = Mapping[str, Any]


class Golden:
    """A copy of a golden repository, brought to the current format, and what is in it."""

    def __init__(self, format_number: int, folder: Path) -> None:
        self.format = format_number
        self.path = folder / "repository"
        self.expected: Expected = json.loads((HERE / f"format{format_number}.json").read_bytes())
        unpack((HERE / f"format{format_number}.tar.zst").read_bytes(), self.path)
        self.migrate()

    def migrate(self) -> None:
        fs = RealFileSystem()
        if not plan_migration(str(self.path), fs).nothing_to_do:
            with pytest.raises(MigrationNeeded):
                Repository.open(str(self.path))
            execute_migration(str(self.path), fs, FakeClock())

    @property
    def is_current(self) -> bool:
        """Written in the format of this version, so that ids are what they were."""
        return self.format == FORMAT

    def open(self, *, read_only: bool | None = None) -> Repository:
        now_ms = parse_time(self.expected["snapshots"][-1]["time"]) + 3_600_000
        return Repository.open(str(self.path), read_only=read_only, clock=FakeClock(now_ms))

    def request(self, snapshot: Snapshot, disks: Mapping[str, bytes]) -> BackupRequest:
        """A further backup of the same VM."""
        inputs = [DiskInput(DiskName(n), DeviceSegments(MemoryDevice(disk))) for n, disk in disks.items()]
        return BackupRequest(snapshot.manifest.namespace, snapshot.manifest.vm, inputs)


def unpack(packed: bytes, folder: Path) -> None:
    plain = zstandard.ZstdDecompressor().decompress(packed)
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        if hasattr(tarfile, "data_filter"):  # since 3.11.4; the archive is our own
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(folder)


@pytest.fixture(params=FORMATS, ids=lambda number: f"format{number}")
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    return Golden(request.param, tmp_path)


@pytest.fixture
def repository(golden: Golden) -> Iterator[Repository]:
    with golden.open() as opened:
        yield opened


def restored(repository: Repository, disk: DiskRecord) -> bytes:
    target = MemoryDevice(disk.size_bytes)
    restore_disk(LocalPeer(repository), disk, target, RestoreOptions(target_is_zero=True))
    return target.content()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def verify(repository: Repository, expected: Expected) -> None:
    """All snapshots are there, and every byte of every disk and config."""
    snapshots = repository.catalog.all()
    assert len(snapshots) == len(expected["snapshots"])
    peer = LocalPeer(repository)
    for snapshot, wanted in zip(snapshots, expected["snapshots"], strict=True):
        disks = {d.name: (d.size_bytes, sha256(restored(repository, d))) for d in snapshot.manifest.disks}
        assert disks == {n: (d["size_bytes"], d["sha256"]) for n, d in wanted["disks"].items()}
        assert {c.name: read_config(peer, c).decode() for c in snapshot.manifest.configs} == wanted["configs"]


def verify_sound(repository: Repository) -> None:
    report = check(repository, CheckOptions(read_data=True))
    assert not report.damaged, report.findings
    assert report.unverified_blobs == 0


def test_nobody_has_edited_them() -> None:
    lines = (HERE / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split() for line in lines)}
    found = {path.name: sha256(path.read_bytes()) for path in HERE.glob("format*")}
    assert found == sums
    assert set(found) == {f"format{n}.{kind}" for n in FORMATS for kind in ("tar.zst", "json")}


def test_snapshots_are_listed(golden: Golden, repository: Repository) -> None:
    assert repository.config.repository_id == golden.expected["repository_id"]
    for snapshot, wanted in zip(repository.catalog.all(), golden.expected["snapshots"], strict=True):
        manifest = snapshot.manifest
        seen = {
            "id": snapshot.id,
            "namespace": manifest.namespace,
            "vm": manifest.vm,
            "time": format_time(manifest.time_ms),
            "sequence": manifest.sequence,
            "parent": manifest.parent,
            "pinned": snapshot.pinned,
            "labels": list(snapshot.labels),
            "notes": snapshot.notes,
            "host": manifest.host,
        }
        same = seen.keys() - (set() if golden.is_current else {"id", "parent"})
        assert {name: seen[name] for name in same} == {name: wanted[name] for name in same}


def test_snapshots_are_found(golden: Golden, repository: Repository) -> None:
    for snapshot in repository.catalog.all():
        assert repository.catalog.find(snapshot.reference) == snapshot
        assert repository.catalog.find(snapshot.id[:12]) == snapshot


def test_every_disk_and_config_is_restored(golden: Golden, repository: Repository) -> None:
    verify(repository, golden.expected)


def test_from_a_repository_that_cannot_be_written_to(golden: Golden) -> None:
    with golden.open(read_only=True) as repository:
        verify(repository, golden.expected)


def test_any_range_is_read(golden: Golden, repository: Repository) -> None:
    for snapshot in repository.catalog.all():
        for record in snapshot.manifest.disks:
            whole = restored(repository, record)
            disk = SnapshotDisk(LocalPeer(repository), record)
            for offset in range(0, record.size_bytes - 5000, 98_765):
                buffer = bytearray(5000)
                disk.read_into(offset, memoryview(buffer))
                assert buffer == whole[offset : offset + 5000]


def test_a_check_finds_it_sound(golden: Golden, repository: Repository) -> None:
    verify_sound(repository)


def test_the_index_is_rebuilt_from_the_folder(golden: Golden) -> None:
    shutil.rmtree(golden.path / "index")
    rebuild_index(str(golden.path))
    with golden.open() as repository:
        verify(repository, golden.expected)
        verify_sound(repository)


def test_a_collection_removes_nothing_that_is_needed(golden: Golden, repository: Repository) -> None:
    execute_gc(repository, plan_gc(repository))
    verify(repository, golden.expected)
    verify_sound(repository)


@pytest.mark.parametrize("change", [b"", b"something new" * 1000], ids=["the same", "changed"])
def test_a_further_backup(golden: Golden, repository: Repository, change: bytes) -> None:
    """Chunks and ids are what they were: only what is new is stored."""
    first = repository.catalog.find("vm/100@" + golden.expected["snapshots"][1]["time"])
    disks: dict[str, bytes] = {d.name: restored(repository, d) for d in first.manifest.disks}
    disks["scsi0"] = disks["scsi0"][: -len(change) or None] + change
    further = backup(LocalPeer(repository), golden.request(first, disks), clock=repository.clock)
    if golden.is_current:
        assert (further.manifest.stats.new_chunks == 0) == (change == b"")
        assert further.manifest.stats.new_bytes < 300_000
    assert further.manifest.sequence == 3
    assert {d.name: restored(repository, d) for d in further.manifest.disks} == disks
    assert repository.catalog.find("vm/100") == further
    verify_sound(repository)


def test_the_parked_session_is_resumed(golden: Golden, repository: Repository) -> None:
    parked = golden.expected["parked"]
    session = repository.sessions.resume(SessionId(parked["session"]))
    assert session.missing([BlobId(bytes.fromhex(blob)) for blob in parked["blobs"]]) == set()
    disk = DiskRecord(DiskName("scsi0"), parked["size_bytes"], BlobId(bytes.fromhex(parked["root"])))
    draft = Manifest(Namespace("default"), VmName("vm/100"), repository.clock.now_ms(), 0, (disk,))
    snapshot = session.commit(draft)
    assert sha256(restored(repository, snapshot.manifest.disks[0])) == parked["sha256"]
    verify_sound(repository)


@pytest.fixture
def script() -> ModuleType:
    described = importlib.util.spec_from_file_location("make_golden", SCRIPT)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[described.name] = module
    described.loader.exec_module(module)
    return module


class TestTheScript:
    def test_makes_the_same_again(self, script: ModuleType, tmp_path: Path) -> None:
        """As far as it depends on casbackup alone: the archive's bytes also depend on zstd and LMDB."""
        expected = json.loads((HERE / f"format{FORMAT}.json").read_bytes())
        made = script.build(str(tmp_path / "made"))
        content = [(s["vm"], s["time"], s["disks"], s["configs"]) for s in made["snapshots"]]
        assert content == [(s["vm"], s["time"], s["disks"], s["configs"]) for s in expected["snapshots"]]
        with Repository.open(str(tmp_path / "made"), clock=FakeClock()) as repository:
            verify(repository, made)
            verify_sound(repository)

    def test_replaces_nothing_unless_told_to(
        self, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run: Callable[[list[str]], int] = script.main
        assert run(["--folder", str(tmp_path)]) == 0
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert run(["--folder", str(tmp_path)]) == 1
        assert "never edited" in capsys.readouterr().err
        assert run(["--folder", str(tmp_path), "--replace"]) == 0
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
