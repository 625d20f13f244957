"""Importing archives: every one of the reference program's, incomplete and hostile ones, and what is kept."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.block.memory import MemoryDevice
from casbackup.errors import (
    ArchiveDamaged,
    ArchiveError,
    ArchiveIncomplete,
    ArchiveUnsupported,
    CasbackupError,
    UsageError,
)
from casbackup.formats.decompress import decompressed
from casbackup.formats.names import config_names, disk_names, file_names
from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveHead, Data, Event, Zeros
from casbackup.formats.vma import FORMAT as VMA
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.import_ import ImportReport, ImportRequest, coarsened, import_archive
from casbackup.jobs.segments import DeviceSegments
from casbackup.limits import MAX_DISK_BYTES, MAX_DISKS, SEGMENT_BYTES
from casbackup.peer.disk import SnapshotDisk
from casbackup.peer.local import LocalPeer
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.repository import Repository
from casbackup.spec.manifest import VMSTATE, MissingRange
from casbackup.testing.archives import MemorySource, Sample, write_archive
from tests.formats.conftest import VmaSample

MiB = 1024 * 1024
KiB = 1024
VM = VmName("vm/100")
REQUEST = ImportRequest(DEFAULT_NAMESPACE, VM, "vma")


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[LocalPeer]:
    Repository.create(str(tmp_path / "repository")).close()
    with Repository.open(str(tmp_path / "repository")) as repository:
        yield LocalPeer(repository)


class Memory:
    """An archive in memory: its events as they are."""

    def __init__(self, head: ArchiveHead, events: Sequence[Event | BaseException]) -> None:
        self.head = head
        self._events = events

    def events(self) -> Iterator[Event]:
        for event in self._events:
            if isinstance(event, BaseException):
                raise event
            yield event


def imported(peer: LocalPeer, data: bytes, **changes: object) -> ImportReport:
    with decompressed(MemorySource(data, seekable=False)) as source:
        return import_archive(peer, VMA.reader().open(source), replace(REQUEST, **changes))  # type: ignore[arg-type]


def content(peer: LocalPeer, report: ImportReport, number: int = 0) -> bytes:
    disk = report.snapshot.manifest.disks[number]
    buffer = bytearray(disk.size_bytes)
    if buffer:
        SnapshotDisk(peer, disk).read_into(0, memoryview(buffer))
    return bytes(buffer)


def one_disk(size: int, *events: Event | BaseException, **changes: object) -> Memory:
    head = ArchiveHead((ArchiveDisk("drive-scsi0", size, 1),), (), bytes(16), 1_795_380_148)
    return Memory(replace(head, **changes), events)  # type: ignore[arg-type]


# --- archives of the reference program


def test_every_archive_of_the_reference_program(peer: LocalPeer, sound_vma: VmaSample) -> None:
    report = imported(peer, sound_vma.data)
    manifest, facts = report.snapshot.manifest, sound_vma.facts
    assert manifest.time_ms == facts["time_s"] * 1000
    assert manifest.archive is not None
    assert manifest.archive.uuid == bytes.fromhex(facts["uuid"])
    assert not report.missing
    for number, (device, (name, size, _, digest)) in enumerate(sorted(facts["disks"].items(), key=lambda i: int(i[0]))):
        disk, archived = manifest.disks[number], manifest.archive.disks[number]
        assert (archived.name, archived.device_id, disk.size_bytes) == (name, int(device), size)
        assert disk.role == (VMSTATE if name == "vmstate" else "")
        if not disk.role:  # the reference program drops blocks of a VM's state
            assert hashlib.sha256(content(peer, report, number)).hexdigest() == digest
    names = config_names(name for name, _, _ in facts["configs"])
    assert [(c.name, c.size_bytes) for c in manifest.configs] == [
        (name, size) for name, (_, size, _) in zip(names, facts["configs"], strict=True)
    ]
    assert not check(peer.repository, CheckOptions(True)).damaged


def test_damaged_archives_leave_no_snapshot(peer: LocalPeer, damaged_vma: VmaSample) -> None:
    """What the reference program's extract refuses is refused here, and what it takes is taken unless it is wrong."""
    try:
        imported(peer, damaged_vma.data)
    except (ArchiveError, CasbackupError):
        assert peer.snapshots() == []
    else:
        assert damaged_vma.facts["reference_extract"][0] in (0, "0"), "stricter than the reference, never laxer"
        assert len(peer.snapshots()) == 1


# --- deduplication


def disk_image(size: int, seed: int = 5) -> bytes:
    """Data of which a third are zeros."""
    chance = random.Random(seed)
    parts: list[bytes] = []
    while sum(map(len, parts)) < size:
        length = chance.choice((64, 192, 512)) * KiB
        parts.append(bytes(length) if chance.random() < 0.33 else chance.randbytes(length))
    return b"".join(parts)[:size]


def clusters(data: bytes, order: Sequence[int]) -> Iterator[Event]:
    for number in order:
        part = data[number * 64 * KiB : (number + 1) * 64 * KiB]
        yield Data(0, number * 64 * KiB, part) if part.strip(b"\0") else Zeros(0, number * 64 * KiB, len(part))


def test_an_archive_of_a_disk_that_is_backed_up_adds_nothing(peer: LocalPeer) -> None:
    data = disk_image(30 * MiB + 12_800)
    backup(peer, BackupRequest(DEFAULT_NAMESPACE, VM, [DiskInput("scsi0", DeviceSegments(MemoryDevice(data)))]))  # type: ignore[arg-type]
    order = list(range(-(-len(data) // (64 * KiB))))
    random.Random(1).shuffle(order)
    report = import_archive(peer, one_disk(len(data), *clusters(data, order)), REQUEST)
    stats = report.snapshot.manifest.stats
    assert (stats.new_chunks, stats.new_bytes) == (0, 0)
    assert stats.zero_bytes + stats.reused_bytes == len(data)
    before, after = peer.snapshots()
    assert before.manifest.disks[0].root == after.manifest.disks[0].root


def test_clusters_that_come_early_cost_next_to_nothing(peer: LocalPeer) -> None:
    """A second archive of the disk: another uuid, and 2 % of the clusters before the others."""
    data = disk_image(64 * MiB)
    count = len(data) // (64 * KiB)
    first = import_archive(peer, one_disk(len(data), *clusters(data, range(count))), REQUEST).snapshot
    early = random.Random(2).sample(range(count), count // 50)
    order = [*early, *(n for n in range(count) if n not in set(early))]
    second = import_archive(peer, one_disk(len(data), *clusters(data, order), uuid=b"x" * 16), REQUEST).snapshot
    assert second.manifest.stats.new_stored_bytes <= first.manifest.stats.new_stored_bytes // 100


# --- names


def test_names_are_made_safe() -> None:
    names = [
        "drive-scsi0",
        "scsi0",
        "../../etc/passwd",
        "",
        "..",
        "drive-",
        "a/b",
        "a_b",
        "ä" * 300,
        "scsi0-2",
        "scsi0",
    ]
    assert disk_names(names) == [
        "scsi0", "scsi0-3", "_._.._etc_passwd", "_", "_.", "drive-", "a_b", "a_b-2", "_" * 100, "scsi0-2", "scsi0-4",
    ]  # fmt: skip
    assert config_names(["qemu-server.conf", "../x", "", "a\0b", "..", "x y@+"]) == [
        "qemu-server.conf", "_._x", "_", "a_b", "_.", "x y@+",
    ]  # fmt: skip
    disks, configs = file_names(ArchiveHead((ArchiveDisk("a", 1),), (ArchiveConfig("a.raw", b""),)))
    assert (disks, configs) == (["a.raw"], ["a.raw-2"])


def test_a_name_with_a_slash(peer: LocalPeer) -> None:
    archive = one_disk(
        512, Zeros(0, 0, 512), disks=(ArchiveDisk("../x/y", 512),), configs=(ArchiveConfig("/etc/a", b"1"),)
    )
    manifest = import_archive(peer, archive, REQUEST).snapshot.manifest
    assert [disk.name for disk in manifest.disks] == ["_._x_y"]
    assert [config.name for config in manifest.configs] == ["_etc_a"]
    assert manifest.archive is not None
    assert (manifest.archive.disks[0].name, manifest.archive.configs) == ("../x/y", ("/etc/a",))


# --- what is missing


def test_missing_ranges_are_refused_or_recorded(peer: LocalPeer) -> None:
    size = 9 * MiB
    events = (Data(0, 0, b"a" * MiB), Zeros(0, 2 * MiB, MiB), Data(0, 5 * MiB, b"b" * MiB))
    with pytest.raises(ArchiveIncomplete, match="drive-scsi0"):
        import_archive(peer, one_disk(size, *events), REQUEST)
    assert peer.snapshots() == []
    report = import_archive(peer, one_disk(size, *events), replace(REQUEST, allow_incomplete=True))
    gaps = [MissingRange(0, MiB, MiB), MissingRange(0, 3 * MiB, 2 * MiB), MissingRange(0, 6 * MiB, 3 * MiB)]
    assert report.missing == gaps
    found = peer.find("vm/100", DEFAULT_NAMESPACE).manifest
    assert found.archive is not None
    assert list(found.archive.missing) == gaps
    data = bytearray(size)
    data[:MiB], data[5 * MiB : 6 * MiB] = b"a" * MiB, b"b" * MiB
    assert content(peer, report) == data


def test_an_archive_that_ends_in_damage(peer: LocalPeer) -> None:
    events = (Data(0, 0, b"a" * 512), ArchiveDamaged("torn"))
    with pytest.raises(ArchiveDamaged, match="torn"):
        import_archive(peer, one_disk(1024, *events), REQUEST)
    assert peer.snapshots() == []
    report = import_archive(peer, one_disk(1024, *events), replace(REQUEST, allow_incomplete=True))
    assert str(report.damage) == "torn"
    assert content(peer, report) == b"a" * 512 + bytes(512)


@pytest.mark.parametrize(
    "events",
    [
        [Zeros(0, 0, 1024), Zeros(0, 512, 512)],
        [Zeros(0, 0, 1024), Data(0, 0, b"x" * 512)],
        [Zeros(0, 512, 1024)],
        [Zeros(1, 0, 512)],
        [Zeros(0, -512, 512)],
    ],
)
def test_data_that_contradicts_itself(peer: LocalPeer, events: list[Event]) -> None:
    with pytest.raises(ArchiveDamaged):
        import_archive(peer, one_disk(1024, *events), REQUEST)
    assert peer.snapshots() == []


def test_more_gaps_than_a_manifest_has_room_for() -> None:
    gaps = [MissingRange(0, 1000 * n + (n % 3), 10) for n in range(500)] + [MissingRange(1, 0, 10)]
    fewer = coarsened(gaps, 100)
    assert len(fewer) == 100
    covered = {(gap.disk, byte) for gap in fewer for byte in range(gap.offset, gap.offset + gap.length)}
    assert all((gap.disk, byte) in covered for gap in gaps for byte in range(gap.offset, gap.offset + gap.length))
    assert coarsened(gaps, 501) == gaps


# --- limits


def test_archives_that_are_too_much_for_a_snapshot(peer: LocalPeer) -> None:
    disk = ArchiveDisk("d", 1)
    for head in (
        ArchiveHead(()),
        ArchiveHead((disk,) * (MAX_DISKS + 1)),
        ArchiveHead((replace(disk, size_bytes=MAX_DISK_BYTES + 1),)),
        ArchiveHead((replace(disk, name="x" * 2 * MiB),)),
        ArchiveHead((replace(disk, name="\ud800"),)),
        ArchiveHead((disk,), (ArchiveConfig("c", b""),) * 300),
        ArchiveHead((disk,), (ArchiveConfig("c", bytes(17 * MiB)),)),
    ):
        with pytest.raises(ArchiveUnsupported):
            import_archive(peer, Memory(head, []), REQUEST)
    with pytest.raises(UsageError):
        import_archive(peer, one_disk(512, Zeros(0, 0, 512)), replace(REQUEST, labels=("no label!",)))
    assert peer.snapshots() == []


def test_a_time_that_has_no_name(peer: LocalPeer) -> None:
    for time_s in (-1, 2**62):
        report = import_archive(peer, one_disk(512, Zeros(0, 0, 512), time_s=time_s), REQUEST)
        assert report.snapshot.manifest.archive is not None
        assert report.snapshot.manifest.archive.time_s == time_s


def test_a_huge_empty_disk_costs_nothing(peer: LocalPeer) -> None:
    size = 2**45
    report = import_archive(peer, one_disk(size, Zeros(0, 0, size)), REQUEST)
    assert report.snapshot.manifest.stats.zero_bytes == size


# --- interruption


def test_an_interrupted_import_can_be_resumed(peer: LocalPeer) -> None:
    data = disk_image(8 * SEGMENT_BYTES)
    events = [*clusters(data, range(len(data) // (64 * KiB)))]
    with pytest.raises(KeyboardInterrupt) as caught:
        import_archive(peer, one_disk(len(data), *events[:500], KeyboardInterrupt()), REQUEST)
    assert peer.snapshots() == []
    resumed = replace(REQUEST, resume=caught.value.__dict__["session"])
    report = import_archive(peer, one_disk(len(data), *events), resumed)
    assert report.snapshot.manifest.stats.reused_bytes > 0
    assert content(peer, report) == data


def test_what_a_writer_writes_is_imported(peer: LocalPeer) -> None:
    """Order of events and disks of odd sizes."""
    contents = tuple(disk_image(size, size) for size in (1 * MiB + 512, 5 * MiB, 64 * KiB + 512))
    disks = tuple(ArchiveDisk(f"drive-scsi{n}", len(c), n + 1) for n, c in enumerate(contents))
    data = write_archive(VMA.writer(), Sample(ArchiveHead(disks, (), b"u" * 16, 5), contents), seed=4)
    report = imported(peer, data)
    assert tuple(content(peer, report, number) for number in range(3)) == contents
