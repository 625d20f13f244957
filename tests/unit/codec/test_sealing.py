"""Manifests and notes of encrypted repositories."""

from __future__ import annotations

import base64
from dataclasses import fields, replace

import pytest

from casbackup.codec.master_key import MasterKey
from casbackup.codec.sealing import ManifestSeal, public_part
from casbackup.errors import ManifestForged
from casbackup.ids import DEFAULT_NAMESPACE, BlobId, DiskName, SnapshotId, VmName
from casbackup.spec.manifest import (
    ArchivedDisk,
    ArchiveOrigin,
    BackupStats,
    ConfigRecord,
    DiskRecord,
    LiveOrigin,
    Manifest,
    decode_manifest,
    encode_manifest,
)

SEAL = ManifestSeal(MasterKey(bytes(range(32))))
OTHER = ManifestSeal(MasterKey(bytes(32)))
SNAPSHOT = SnapshotId("ab" * 32)
MANIFEST = Manifest(
    namespace=DEFAULT_NAMESPACE,
    vm=VmName("vm/100"),
    time_ms=1_795_377_600_123,
    sequence=7,
    disks=(
        DiskRecord(DiskName("scsi0"), 4096, BlobId(b"\1" * 32), "/secret/path.raw"),
        DiskRecord(DiskName("vmstate"), 8192, BlobId(b"\2" * 32), "", "vmstate"),
    ),
    configs=(ConfigRecord("secret.conf", 12, BlobId(b"\3" * 32)), ConfigRecord("another", 1, BlobId(b"\4" * 32))),
    parent=SNAPSHOT,
    labels=("weekly",),
    notes="secret notes",
    host="secret-host",
    program="casbackup 1",
    stats=BackupStats(read_bytes=12288),
    archive=ArchiveOrigin("vma", bytes(16), 1, (ArchivedDisk("secret-a", 1), ArchivedDisk("b", 2)), ("secret-c", "d")),
    live=LiveOrigin("push", "7.2", frozen=False, note="secret reason"),
    copy_of=SnapshotId("5e" * 32),
)


def test_what_was_sealed_is_opened() -> None:
    data, _ = encode_manifest(SEAL.seal(MANIFEST))
    stored, _ = decode_manifest(data, "here")
    assert SEAL.open(stored, "here") == MANIFEST
    assert b"secret" not in data


def test_the_public_part_is_what_a_server_needs() -> None:
    public = public_part(MANIFEST)
    assert "secret" not in repr(public)
    for name in ("namespace", "vm", "time_ms", "sequence", "parent", "labels", "stats", "program"):
        assert getattr(public, name) == getattr(MANIFEST, name), name
    assert [(d.name, d.size_bytes, d.root, d.role) for d in public.disks] == [
        (d.name, d.size_bytes, d.root, d.role) for d in MANIFEST.disks
    ]
    assert [(c.name, c.size_bytes, c.id) for c in public.configs] == [
        ("config-1", 12, MANIFEST.configs[0].id),
        ("config-2", 1, MANIFEST.configs[1].id),
    ]


_CHANGES = {
    "namespace": "acme",
    "vm": "vm/101",
    "time_ms": MANIFEST.time_ms + 1,
    "sequence": 8,
    "disks": (replace(MANIFEST.disks[0], source="", root=BlobId(b"\5" * 32)), MANIFEST.disks[1]),
    "configs": (ConfigRecord("config-1", 12, BlobId(b"\6" * 32)), ConfigRecord("config-2", 1, MANIFEST.configs[1].id)),
    "parent": SnapshotId("cd" * 32),
    "labels": (),
    "notes": "planted",
    "host": "planted",
    "program": "planted",
    "stats": BackupStats(),
    "archive": ArchiveOrigin("vma", None, None, (ArchivedDisk("a"), ArchivedDisk("b")), ("c", "d")),
    "live": LiveOrigin("push", "7.2", frozen=True),
    "copy_of": SnapshotId("cd" * 32),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_no_field_that_everybody_sees_can_be_changed(name: str) -> None:
    forged = replace(SEAL.seal(MANIFEST), **{name: _CHANGES[name]})  # type: ignore[arg-type]
    with pytest.raises(ManifestForged, match="shows to everybody"):
        SEAL.open(forged, "here")


def test_every_field_is_tried() -> None:
    assert set(_CHANGES) | {"sealed"} == {field.name for field in fields(Manifest)}


def test_disks_can_be_neither_removed_nor_added_nor_exchanged() -> None:
    sealed = SEAL.seal(MANIFEST)
    one, two = sealed.disks
    for disks in ((one,), (), (two, one), (one, two, replace(one, name=DiskName("scsi1")))):
        with pytest.raises(ManifestForged):
            SEAL.open(replace(sealed, disks=disks), "here")


def test_every_bit_of_the_seal_counts() -> None:
    sealed = SEAL.seal(MANIFEST)
    for at in range(len(sealed.sealed)):
        changed = bytearray(sealed.sealed)
        changed[at] ^= 1 << at % 8
        with pytest.raises(ManifestForged, match="was changed"):
            SEAL.open(replace(sealed, sealed=bytes(changed)), "here")


def test_a_seal_is_not_moved_to_another_manifest() -> None:
    later = replace(MANIFEST, time_ms=MANIFEST.time_ms + 1, sequence=8)
    with pytest.raises(ManifestForged):
        SEAL.open(replace(SEAL.seal(later), sealed=SEAL.seal(MANIFEST).sealed), "here")


@pytest.mark.parametrize("sealed", [b"", b"short", OTHER.seal(MANIFEST).sealed], ids=["none", "short", "other key"])
def test_what_nobody_with_the_key_made_is_refused(sealed: bytes) -> None:
    with pytest.raises(ManifestForged, match="manifest of vm/100"):
        SEAL.open(replace(SEAL.seal(MANIFEST), sealed=sealed), "the manifest of vm/100")


def test_notes() -> None:
    sealed = SEAL.seal_notes(SNAPSHOT, "before the upgrade ✓")
    assert "upgrade" not in sealed
    assert sealed != SEAL.seal_notes(SNAPSHOT, "before the upgrade ✓"), "the nonce is random"
    assert SEAL.open_notes(SNAPSHOT, sealed) == "before the upgrade ✓"
    assert SEAL.seal_notes(SNAPSHOT, "") == SEAL.open_notes(SNAPSHOT, "") == ""


def test_notes_that_somebody_else_wrote_are_told() -> None:
    sealed = SEAL.seal_notes(SNAPSHOT, "mine")
    raw = base64.b64decode(sealed.removeprefix("sealed:"))
    cut = "sealed:" + base64.b64encode(raw[:-1]).decode()
    for foreign in ("planted", "sealed:", "sealed:***", cut, OTHER.seal_notes(SNAPSHOT, "mine")):
        assert "without the key" in SEAL.open_notes(SNAPSHOT, foreign)
    assert "without the key" in SEAL.open_notes(SnapshotId("cd" * 32), sealed), "of another snapshot"
