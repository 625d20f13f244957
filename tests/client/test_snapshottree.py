"""What files of snapshots are called when they are mounted."""

from __future__ import annotations

from casbackup.ids import ZERO_ID, DiskName, Namespace, SnapshotId, VmName
from casbackup.repository.catalog import Snapshot
from casbackup.spec.manifest import VMSTATE, ConfigRecord, DiskRecord, Manifest
from casbackup_client.snapshottree import File, Folder, alone, by_time, by_vm, tree_of


def snapshot(time_ms: int, vm: str = "vm/100", namespace: str = "acme/prod") -> Snapshot:
    disks = (
        DiskRecord(DiskName("scsi0"), 1024, ZERO_ID),
        DiskRecord(DiskName("vmstate"), 512, ZERO_ID, role=VMSTATE),
    )
    configs = tuple(ConfigRecord(name, 7, ZERO_ID) for name in ("100.conf", "scsi0.raw"))
    manifest = Manifest(Namespace(namespace), VmName(vm), time_ms, 1, disks, configs)
    return Snapshot(SnapshotId(f"{time_ms:064x}"), manifest)


def files(folder: Folder, path: str = "") -> set[str]:
    found: set[str] = set()
    for name, entry in folder.entries.items():
        found |= {f"{path}/{name}"} if isinstance(entry, File) else files(entry, f"{path}/{name}")
    return found


def test_files_of_a_snapshot() -> None:
    """A config that is called like a disk gets another name."""
    tree = tree_of([snapshot(1000)], alone)
    assert files(tree) == {"/scsi0.raw", "/vmstate.bin", "/100.conf", "/config-scsi0.raw"}
    found = tree.find("/scsi0.raw")
    assert isinstance(found, File) and found.size_bytes == 1024


def test_folders() -> None:
    snapshots = [snapshot(1000), snapshot(2000), snapshot(1000, "vm/200", "default")]
    by_times = tree_of(snapshots[:2], by_time)
    assert list(by_times.entries) == ["1970-01-01T00:00:01.000Z", "1970-01-01T00:00:02.000Z"]
    everything = tree_of(snapshots, by_vm)
    assert "/acme/prod/vm/100/1970-01-01T00:00:02.000Z/scsi0.raw" in files(everything)
    assert "/default/vm/200/1970-01-01T00:00:01.000Z/vmstate.bin" in files(everything)
    found = everything.find("/acme/prod")
    assert isinstance(found, Folder) and found.time_ms == 2000
    assert everything.find("/acme/prod/vm/300") is None and everything.find("/") is everything
