"""Exporting snapshots: what was imported comes out as it was, everything else as Proxmox VE wants it."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.block.memory import MemoryDevice
from casbackup.errors import ArchiveLimit, DataDamage, SnapshotNotFound, TargetFull
from casbackup.formats import proxmox
from casbackup.formats.decompress import decompressed
from casbackup.formats.port import (
    ArchiveConfig,
    ArchiveDisk,
    ArchiveFormat,
    ArchiveHead,
    ArchiveWriter,
    ByteRange,
    Order,
    WriterCapabilities,
)
from casbackup.formats.qcow2 import FORMAT as QCOW2
from casbackup.formats.raw import FORMAT as RAW
from casbackup.formats.stream import FORMAT as STREAM
from casbackup.formats.tar import FORMAT as TAR
from casbackup.formats.vma import FORMAT as VMA
from casbackup.formats.vmdk import FORMAT as VMDK
from casbackup.fs import Buffer
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.export import data_map, export, plan_export
from casbackup.jobs.import_ import ImportRequest, import_archive
from casbackup.jobs.segments import DeviceSegments
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.gc import execute_gc, plan_gc
from casbackup.repository.repository import Repository
from casbackup.testing.archives import MemorySource, MemoryTarget, Sample, mixed_bytes, read_archive
from tests.formats.conftest import VmaSample

MiB = 1024 * 1024
KiB = 1024
VM = VmName("vm/100")


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[LocalPeer]:
    Repository.create(str(tmp_path / "repository")).close()
    with Repository.open(str(tmp_path / "repository")) as repository:
        yield LocalPeer(repository)


def stored(peer: LocalPeer, configs: dict[str, bytes] | None = None, **disks: bytes) -> Snapshot:
    inputs = [DiskInput(name, DeviceSegments(MemoryDevice(data))) for name, data in disks.items()]  # type: ignore[arg-type]
    return backup(peer, BackupRequest(DEFAULT_NAMESPACE, VM, inputs, configs or {}, time_ms=1_795_380_148_123))


def exported(
    peer: LocalPeer, snapshot: Snapshot, archive_format: ArchiveFormat = VMA, disks: Sequence[str] = ()
) -> bytes:
    """Through a pipe if the format can."""
    assert archive_format.writer is not None
    writer = archive_format.writer()
    plan = plan_export(peer, snapshot, archive_format.name, disks)
    writer.check(plan.head)
    target = MemoryTarget(seekable=not writer.capabilities.streams)
    export(peer, plan, writer, target)
    return bytes(target.data)


def read(data: bytes, archive_format: ArchiveFormat = VMA) -> Sample:
    assert archive_format.reader is not None
    return read_archive(archive_format.reader(), data)


# --- what was imported


def test_every_archive_of_the_reference_program_comes_out_as_it_was(peer: LocalPeer, sound_vma: VmaSample) -> None:
    with decompressed(MemorySource(sound_vma.data, seekable=False)) as source:
        original = VMA.reader().open(source)
        snapshot = import_archive(peer, original, ImportRequest(DEFAULT_NAMESPACE, VM, "vma")).snapshot
    with decompressed(MemorySource(sound_vma.data)) as source:
        plain = bytearray()
        buffer = memoryview(bytearray(MiB))
        while got := source.read_into(buffer):
            plain += buffer[:got]
    data = exported(peer, snapshot)
    before, after = read(bytes(plain)), read(data)
    assert after.head == before.head
    assert after.contents == before.contents
    again = import_archive(peer, VMA.reader().open(MemorySource(data)), ImportRequest(DEFAULT_NAMESPACE, VM, "vma"))
    assert exported(peer, again.snapshot) == data
    assert again.snapshot.manifest.stats.new_chunks == 0


def test_names_that_are_no_file_names_are_replaced(peer: LocalPeer) -> None:
    head = ArchiveHead(
        (ArchiveDisk("../x", 512, 9), ArchiveDisk("a", 512), ArchiveDisk("a", 512)),
        (ArchiveConfig("/etc/passwd", b"1"), ArchiveConfig("ok", b"2")),
        bytes(16),
        7,
    )

    class Hostile:
        def __init__(self) -> None:
            self.head = head

        def events(self) -> Iterator[object]:
            from casbackup.formats.port import Zeros

            yield from (Zeros(n, 0, 512) for n in range(3))

    snapshot = import_archive(peer, Hostile(), ImportRequest(DEFAULT_NAMESPACE, VM, "vma")).snapshot  # type: ignore[arg-type]
    found = read(exported(peer, snapshot)).head
    assert [(disk.name, disk.device_id) for disk in found.disks] == [("a", 1), ("a-2", 2), ("_._x", 9)]
    assert [config.name for config in found.configs] == ["_etc_passwd", "ok"]


def test_a_vmstate_stays_one(peer: LocalPeer) -> None:
    state = random.Random(3).randbytes(70_144) + bytes(70_144)

    class WithState:
        head = ArchiveHead((ArchiveDisk("drive-scsi0", 4096, 1), ArchiveDisk("vmstate", len(state), 2, True)))

        def events(self) -> Iterator[object]:
            from casbackup.formats.port import Data

            yield Data(1, 0, state)
            yield Data(0, 0, b"d" * 4096)

    snapshot = import_archive(peer, WithState(), ImportRequest(DEFAULT_NAMESPACE, VM, "stream")).snapshot  # type: ignore[arg-type]
    for archive_format in (VMA, STREAM, TAR):
        found = read(exported(peer, snapshot, archive_format), archive_format)
        assert [disk.is_vmstate for disk in found.head.disks] == [False, True]
        assert found.contents == (b"d" * 4096, state)
    with pytest.raises(ArchiveLimit):
        exported(peer, snapshot, QCOW2, ["vmstate"])


# --- all formats


@pytest.mark.parametrize("archive_format", [VMA, TAR, STREAM, QCOW2, VMDK, RAW], ids=lambda f: f.name)
def test_every_format(peer: LocalPeer, archive_format: ArchiveFormat) -> None:
    data = mixed_bytes(9 * MiB + 12_800)
    snapshot = stored(peer, {"100.conf": b"cores: 2\n"}, scsi0=data, other=b"x" * 512)
    disks = () if archive_format.name in ("vma", "tar", "stream") else ("scsi0",)
    archive = exported(peer, snapshot, archive_format, disks)
    if archive_format is RAW:
        assert archive == data
        return
    assert read(archive, archive_format).contents[0][: len(data)] == data
    assert exported(peer, snapshot, archive_format, disks) == archive


def test_one_disk_of_several(peer: LocalPeer) -> None:
    snapshot = stored(peer, a=b"a" * 512, b=b"b" * 1024)
    assert exported(peer, snapshot, RAW, ["b"]) == b"b" * 1024
    with pytest.raises(ArchiveLimit):
        exported(peer, snapshot, RAW)
    with pytest.raises(SnapshotNotFound, match="it has: a, b"):
        exported(peer, snapshot, RAW, ["c"])


def test_the_head_comes_first_and_at_once(peer: LocalPeer) -> None:
    """Readers give up when the head does not come soon."""
    snapshot = stored(peer, scsi0=mixed_bytes(40 * MiB))
    events: list[str] = []

    class Target(MemoryTarget):
        def write(self, buffers: Sequence[Buffer]) -> None:
            events.append("write")
            super().write(buffers)

    class Watched(LocalPeer):
        def fetch(self, ids):  # type: ignore[no-untyped-def]
            events.append("fetch")
            return super().fetch(ids)

    watched = Watched(peer.repository)
    plan = plan_export(watched, snapshot, "vma")
    export(watched, plan, VMA.writer(), Target(seekable=False))
    assert events[0] == "write"


def test_the_map_is_told_from_the_tree(peer: LocalPeer) -> None:
    data = bytearray(24 * MiB + 700)
    data[5 * MiB : 5 * MiB + 4096] = b"x" * 4096
    data[8 * MiB : 13 * MiB] = random.Random(1).randbytes(5 * MiB)
    data[-1] = 1
    snapshot = stored(peer, scsi0=bytes(data))

    class NoChunks(LocalPeer):
        fetched = 0

        def fetch(self, ids):  # type: ignore[no-untyped-def]
            for found in super().fetch(ids):
                NoChunks.fetched += 1
                yield found

    watched = NoChunks(peer.repository)
    ranges = data_map(watched, snapshot.manifest.disks[0], QCOW2.writer().capabilities)  # type: ignore[misc]
    assert ranges == [
        ByteRange(5 * MiB, 64 * KiB),
        ByteRange(8 * MiB, 5 * MiB),
        ByteRange(24 * MiB, 700),
    ]
    assert NoChunks.fetched <= 1 + 7, "nodes only"


class Recorder:
    """A writer that insists on what it demands."""

    def __init__(self, *, needs_map: bool, unit_bytes: int) -> None:
        self.capabilities = WriterCapabilities(True, Order.ASCENDING, needs_map, unit_bytes, 100)
        self.maps: Sequence[Sequence[ByteRange]] | None = None
        self.disks: list[bytearray] = []
        self._last = (0, 0)

    def check(self, head: ArchiveHead) -> None: ...

    def open(self, target: object, head: ArchiveHead, maps: Sequence[Sequence[ByteRange]] | None = None) -> Recorder:
        self.maps = maps
        self.disks = [bytearray(disk.size_bytes) for disk in head.disks]
        assert (maps is not None) == self.capabilities.needs_map
        return self

    def write(self, disk: int, offset: int, data: Buffer) -> None:
        self._next(disk, offset, len(data))
        if self.maps is not None:
            assert any(r.offset <= offset and offset + len(data) <= r.end for r in self.maps[disk])
        self.disks[disk][offset : offset + len(data)] = data

    def zeros(self, disk: int, offset: int, length: int) -> None:
        self._next(disk, offset, length)

    def finish(self) -> None:
        assert self._last == (len(self.disks) - 1, len(self.disks[-1]))

    def _next(self, disk: int, offset: int, length: int) -> None:
        if disk == self._last[0] + 1:
            assert self._last[1] == len(self.disks[disk - 1])
            self._last = (disk, 0)
        assert (disk, offset) == self._last, "without gaps, in order"
        size = len(self.disks[disk])
        unit = self.capabilities.unit_bytes
        assert offset % unit == 0
        assert (offset + length) % unit == 0 or offset + length == size
        self._last = (disk, offset + length)


@pytest.mark.parametrize("needs_map", [False, True])
@pytest.mark.parametrize("unit_bytes", [1, 512, 64 * KiB, MiB])
def test_writers_get_what_they_demand(peer: LocalPeer, needs_map: bool, unit_bytes: int) -> None:
    contents = {
        "a": mixed_bytes(9 * MiB + 700),
        "b": bytes(6 * MiB),
        "c": bytes(5 * MiB) + mixed_bytes(30 * MiB) + bytes(20 * MiB),
        "d": b"1",
    }
    snapshot = stored(peer, **contents)
    writer = Recorder(needs_map=needs_map, unit_bytes=unit_bytes)
    plan = plan_export(peer, snapshot, "test")
    typed: ArchiveWriter = writer  # type: ignore[assignment]
    report = export(peer, plan, typed, MemoryTarget())
    assert [bytes(disk) for disk in writer.disks] == list(contents.values())
    assert report.size_bytes == sum(map(len, contents.values()))
    assert report.zero_bytes >= 28 * MiB


# --- the same bytes, wherever the chunks lie


def test_the_same_bytes_after_a_gc(peer: LocalPeer) -> None:
    first = stored(peer, scsi0=mixed_bytes(8 * MiB), scsi1=mixed_bytes(3 * MiB))
    shared = bytearray(mixed_bytes(8 * MiB))
    shared[MiB : 2 * MiB] = random.Random(9).randbytes(MiB)
    second = stored(peer, scsi0=bytes(shared))
    before = exported(peer, second)
    peer.repository.catalog.remove([first])
    report = execute_gc(peer.repository, plan_gc(peer.repository, repack_garbage=0.01))
    assert report.rewritten_packs > 0
    assert exported(peer, second) == before


# --- failures


def test_damage_ends_an_export(peer: LocalPeer, tmp_path: Path) -> None:
    snapshot = stored(peer, scsi0=random.Random(1).randbytes(8 * MiB))
    for pack in (tmp_path / "repository" / "packs").rglob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(data)
    with pytest.raises(DataDamage):
        exported(peer, snapshot)


def test_an_error_of_the_target_ends_an_export(peer: LocalPeer) -> None:
    class Full(MemoryTarget):
        def write(self, buffers: Sequence[Buffer]) -> None:
            if len(self.data) > MiB:
                raise TargetFull("full")
            super().write(buffers)

    snapshot = stored(peer, scsi0=random.Random(1).randbytes(40 * MiB))
    with pytest.raises(TargetFull):
        export(peer, plan_export(peer, snapshot, "vma"), VMA.writer(), Full(seekable=False))


def test_too_many_disks(peer: LocalPeer) -> None:
    snapshot = stored(peer, scsi0=b"x" * 512)
    manifest = snapshot.manifest
    disks = tuple(replace(manifest.disks[0], name=f"d{n}") for n in range(255))  # type: ignore[arg-type]
    many = replace(snapshot, manifest=replace(manifest, disks=disks))
    plan = plan_export(peer, many, "vma")
    with pytest.raises(ArchiveLimit, match="255"):
        VMA.writer().check(plan.head)


def test_a_huge_sparse_disk(peer: LocalPeer) -> None:
    """Nothing is made as large as the disk."""
    device = MemoryDevice(b"\1" + bytes(4 * MiB))
    snapshot = stored(peer, scsi0=bytes(4 * MiB))
    disk = replace(snapshot.manifest.disks[0], size_bytes=64 * 1024 * MiB)
    huge = replace(snapshot, manifest=replace(snapshot.manifest, disks=(disk,)))
    device.close()

    class Counting(MemoryTarget):
        total = 0

        def write(self, buffers: Sequence[Buffer]) -> None:
            self.total += sum(map(len, buffers))

    target = Counting(seekable=False)
    tracemalloc.start()
    export(peer, plan_export(peer, huge, "vma"), VMA.writer(), target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * MiB
    assert target.total > 1024 * 1024 * 8


# --- conventions of Proxmox VE


CONF = b"""cores: 2
lock: backup
parent: before
scsi0: local-lvm:vm-100-disk-0,size=32G
unused0: local-lvm:vm-100-disk-7
#vzdump#old
#qmdump#map:scsi0:drive-scsi0:local::
name: web

[before]
cores: 1
"""


def test_a_snapshot_of_our_own_as_vma(peer: LocalPeer) -> None:
    snapshot = stored(
        peer,
        {"100.conf": CONF, "100.fw": b"[OPTIONS]\n", "notes.txt": b"n"},
        scsi0=b"0" * 512,
        root=b"1" * 1024,
        tpmstate0=b"2" * 4096,
    )
    found = read(exported(peer, snapshot)).head
    assert [(d.name, d.device_id) for d in found.disks] == [
        ("drive-scsi0", 1),
        ("drive-scsi1", 2),
        ("drive-tpmstate0-backup", 3),
    ]
    assert [c.name for c in found.configs] == ["qemu-server.conf", "qemu-server.fw", "notes.txt"]
    assert found.configs[0].content.decode().splitlines() == [
        "cores: 2",
        "scsi0: local-lvm:vm-100-disk-0,size=32G",
        "name: web",
        "scsi1: local:vm-100-disk-1,size=1K",
        "tpmstate0: local:vm-100-disk-2,size=4K",
        "#qmdump#map:scsi0:drive-scsi0::raw:",
        "#qmdump#map:scsi1:drive-scsi1::raw:",
        "#qmdump#map:tpmstate0:drive-tpmstate0-backup::raw:",
    ]
    assert found.time_s == snapshot.manifest.time_ms // 1000


def test_a_configuration_is_made_where_there_is_none(peer: LocalPeer) -> None:
    found = read(exported(peer, stored(peer, scsi0=b"0" * 512))).head
    assert found.configs == (
        ArchiveConfig(
            "qemu-server.conf",
            b"cores: 1\nmemory: 2048\nname: vm100\nscsihw: virtio-scsi-pci\n"
            b"scsi0: local:vm-100-disk-0,size=1K\n#qmdump#map:scsi0:drive-scsi0::raw:\n",
        ),
    )


def test_drives() -> None:
    assert proxmox.drive_names(["root", "scsi1", "data", "efidisk0", "virtio15"]) == {
        "scsi1": "scsi1",
        "efidisk0": "efidisk0",
        "virtio15": "virtio15",
        "root": "scsi0",
        "data": "scsi2",
    }


def test_names_of_files_and_vms(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    name = proxmox.file_name("vm/100", 1_795_380_148, ".vma.zst")
    assert name == "vzdump-qemu-100-2026_11_22-20_42_28.vma.zst"
    assert proxmox.vm_of(f"/x/{name}", ()) == "vm/100"
    conf = ArchiveConfig("qemu-server.conf", b"scsi0: local-lvm:vm-4711-disk-0,size=8G\n")
    assert proxmox.vm_of("x.vma", (conf,)) == "vm/4711"
    assert proxmox.vm_of("x.vma", (ArchiveConfig("qemu-server.conf", b"name: web\n"),)) is None
    assert [proxmox.vmid(vm) for vm in ("vm/100", "vm/99", "vm/web", "vm/0100")] == ["100", None, None, None]
