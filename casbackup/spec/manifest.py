"""The manifest: one file a snapshot, the source of truth (``docs/spec/manifest.md``).

    off len field                (little-endian)
      0   8 magic
      8   2 version              1
     10   2 flags                zero
     12   4 body length
     16   n body                 a msgpack map, see ``Manifest``
  16+n   32 checksum             BLAKE3 of everything before

The snapshot's id is the BLAKE3 of the whole file. A manifest never changes; pins, and labels and notes changed
later, live in the sidecar ``<time>.meta`` beside it (JSON, replaced atomically).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, NamedTuple, TypeVar

import msgpack
from blake3 import blake3

from casbackup.errors import InvalidName, ManifestDamaged
from casbackup.ids import (
    ID_BYTES,
    BlobId,
    DiskName,
    Namespace,
    SnapshotId,
    VmName,
    parse_config_name,
    parse_disk,
    parse_namespace,
    parse_vm,
)
from casbackup.limits import MAX_DISK_BYTES, MAX_MANIFEST_BYTES
from casbackup.spec.magic import MANIFEST

VERSION = 1
VMSTATE = "vmstate"
"""Role of a disk that is the VM's RAM and device state."""
_HEADER = Struct("<8sHHI")
_CHECKSUM_BYTES = 32

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """One disk: its size, the root of its tree (zero id: all zero), where it was read from (for people).

    ``role``: what it is if it is no disk: ``VMSTATE``.
    """

    name: DiskName
    size_bytes: int
    root: BlobId
    source: str = ""
    role: str = ""


@dataclass(frozen=True, slots=True)
class ConfigRecord:
    """A named blob of configuration, stored as a blob of kind CONFIG."""

    name: str
    size_bytes: int
    id: BlobId


class ArchivedDisk(NamedTuple):
    """What an archive called a disk."""

    name: str
    device_id: int | None = None


class MissingRange(NamedTuple):
    """Bytes that an archive did not have, and that are zero in the snapshot. ``disk``: its place in the manifest."""

    disk: int
    offset: int
    length: int


class ArchiveOrigin(NamedTuple):
    """What the archive that a snapshot was imported from said of itself, so that an export can say the same.

    ``disks`` and ``configs`` are the names that the archive gave them, in the order of the manifest's. Text that is
    not UTF-8 is kept with surrogate escapes.
    """

    format: str
    uuid: bytes | None = None
    time_s: int | None = None
    disks: tuple[ArchivedDisk, ...] = ()
    configs: tuple[str, ...] = ()
    missing: tuple[MissingRange, ...] = ()


@dataclass(frozen=True, slots=True)
class LiveOrigin:
    """How a snapshot was taken of a VM that was running.

    ``frozen``: the guest's file systems were frozen at the instant; ``note``: why not. ``bitmap``: in the name of the
    dirty bitmaps in QEMU that record what was written since; empty: there are none. ``increments``: the disks of which
    only what a bitmap had recorded was read. ``mode_note``: why QEMU pushed the data, if that was left open.
    ``vmstate``: how the VM's memory was saved; empty: it was not. ``pause_ms``: how long the guest stood still for it.
    """

    mode: str
    qemu: str
    frozen: bool
    note: str = ""
    bitmap: str = ""
    increments: tuple[DiskName, ...] = ()
    mode_note: str = ""
    vmstate: str = ""
    pause_ms: int = 0


@dataclass(frozen=True, slots=True)
class BackupStats:
    """What making the snapshot took. Bytes of disk content unless named ``stored``."""

    read_bytes: int = 0
    zero_bytes: int = 0
    reused_bytes: int = 0
    new_bytes: int = 0
    new_stored_bytes: int = 0
    new_chunks: int = 0
    duration_ms: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """All disks of a VM at one instant. ``sequence`` counts a VM's snapshots and orders them even if clocks jump."""

    namespace: Namespace
    vm: VmName
    time_ms: int
    sequence: int
    disks: tuple[DiskRecord, ...]
    configs: tuple[ConfigRecord, ...] = ()
    parent: SnapshotId | None = None
    labels: tuple[str, ...] = ()
    notes: str = ""
    host: str = ""
    program: str = ""
    stats: BackupStats = field(default_factory=BackupStats)
    archive: ArchiveOrigin | None = None
    """Of a snapshot that was imported."""
    live: LiveOrigin | None = None
    """Of a snapshot of a running VM."""
    copy_of: SnapshotId | None = None
    """Of a copy that was encrypted anew: the snapshot of the other repository."""
    sealed: bytes = b""
    """In an encrypted repository: all of the manifest, which shows but a part of itself otherwise."""

    @property
    def size_bytes(self) -> int:
        """Logical size: all disks and configs."""
        return sum(d.size_bytes for d in self.disks) + sum(c.size_bytes for c in self.configs)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What may change about a snapshot after it was made; None: as in the manifest."""

    pinned: bool = False
    labels: tuple[str, ...] | None = None
    notes: str | None = None


def encode_manifest(manifest: Manifest) -> tuple[bytes, SnapshotId]:
    """The file's bytes and the snapshot's id."""
    body = encode_body(manifest)
    head = _HEADER.pack(MANIFEST, VERSION, 0, len(body)) + body
    data = head + blake3(head).digest()
    return data, SnapshotId(blake3(data).hexdigest())


def decode_manifest(data: bytes, origin: str) -> tuple[Manifest, SnapshotId]:
    """Parse, verify and check a manifest file; ``origin`` names it in errors.

    :raise ManifestDamaged: when anything about it is wrong.
    """
    if len(data) < _HEADER.size + _CHECKSUM_BYTES or len(data) > MAX_MANIFEST_BYTES:
        raise ManifestDamaged(f"manifest {origin} has an impossible size of {len(data)} bytes")
    magic, version, flags, length = _HEADER.unpack_from(data)
    if magic != MANIFEST or version != VERSION or flags or length != len(data) - _HEADER.size - _CHECKSUM_BYTES:
        raise ManifestDamaged(f"manifest {origin} does not start like one")
    if blake3(data[:-_CHECKSUM_BYTES]).digest() != data[-_CHECKSUM_BYTES:]:
        raise ManifestDamaged(f"manifest {origin} fails its checksum")
    return decode_body(data[_HEADER.size : -_CHECKSUM_BYTES], origin), SnapshotId(blake3(data).hexdigest())


def encode_body(manifest: Manifest) -> bytes:
    body: bytes = msgpack.packb(_to_map(manifest), unicode_errors="surrogateescape")
    return body


def decode_body(data: bytes, origin: str) -> Manifest:
    """:raise ManifestDamaged: when it is not the body of a manifest."""
    try:
        return _from_map(msgpack.unpackb(data, unicode_errors="surrogateescape"))
    except (ValueError, TypeError, KeyError, InvalidName, msgpack.UnpackException) as error:
        raise ManifestDamaged(f"manifest {origin} is not understood: {error}") from error


def encode_sidecar(sidecar: Sidecar) -> bytes:
    content = {"pinned": sidecar.pinned, "labels": sidecar.labels, "notes": sidecar.notes}
    return json.dumps(content, indent=1).encode() + b"\n"


def decode_sidecar(data: bytes, origin: str) -> Sidecar:
    """:raise ManifestDamaged: when it is not a sidecar."""
    try:
        content = json.loads(data)
        labels = None if content["labels"] is None else tuple(_typed(label, str) for label in content["labels"])
        notes = None if content["notes"] is None else _typed(content["notes"], str)
        return Sidecar(_typed(content["pinned"], bool), labels, notes)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestDamaged(f"{origin} is not understood: {error}") from error


def _to_map(manifest: Manifest) -> dict[str, Any]:
    stats = manifest.stats
    body: dict[str, Any] = {
        "namespace": manifest.namespace,
        "vm": manifest.vm,
        "time_ms": manifest.time_ms,
        "sequence": manifest.sequence,
        "disks": [[d.name, d.size_bytes, d.root, d.source, *([d.role] if d.role else ())] for d in manifest.disks],
        "configs": [[c.name, c.size_bytes, c.id] for c in manifest.configs],
        "parent": manifest.parent,
        "labels": list(manifest.labels),
        "notes": manifest.notes,
        "host": manifest.host,
        "program": manifest.program,
        "stats": {name: getattr(stats, name) for name in BackupStats.__slots__},
    }
    if manifest.archive is not None:
        body["archive"] = _archive_map(manifest.archive)
    if manifest.live is not None:
        body["live"] = _live_map(manifest.live)
    if manifest.copy_of is not None:
        body["copy_of"] = manifest.copy_of
    if manifest.sealed:
        body["sealed"] = manifest.sealed
    return body


def _archive_map(archive: ArchiveOrigin) -> dict[str, Any]:
    return {
        "format": archive.format,
        "uuid": archive.uuid,
        "time_s": archive.time_s,
        "disks": [[d.name, d.device_id] for d in archive.disks],
        "configs": list(archive.configs),
        "missing": [[m.disk, m.offset, m.length] for m in archive.missing],
    }


def _live_map(live: LiveOrigin) -> dict[str, Any]:
    body = {
        "mode": live.mode,
        "qemu": live.qemu,
        "frozen": live.frozen,
        "note": live.note,
        "bitmap": live.bitmap,
        "increments": list(live.increments),
    }
    if live.mode_note:
        body["mode_note"] = live.mode_note
    if live.vmstate:
        body |= {"vmstate": live.vmstate, "pause_ms": live.pause_ms}
    return body


def _from_map(body: Mapping[str, Any]) -> Manifest:
    parent, stats = body["parent"], _typed(body["stats"], dict)
    manifest = Manifest(
        namespace=parse_namespace(_typed(body["namespace"], str)),
        vm=parse_vm(_typed(body["vm"], str)),
        time_ms=_typed(body["time_ms"], int),
        sequence=_typed(body["sequence"], int),
        disks=tuple(_disk(*fields) for fields in body["disks"]),
        configs=tuple(_config(*fields) for fields in body["configs"]),
        parent=None if parent is None else SnapshotId(_typed(parent, str)),
        labels=tuple(_typed(label, str) for label in body["labels"]),
        notes=_typed(body["notes"], str),
        host=_typed(body["host"], str),
        program=_typed(body["program"], str),
        stats=BackupStats(**{name: _typed(stats.get(name, 0), int) for name in BackupStats.__slots__}),
        archive=_archive(_typed(body["archive"], dict)) if "archive" in body else None,
        live=_live(_typed(body["live"], dict)) if "live" in body else None,
        copy_of=SnapshotId(_typed(body["copy_of"], str)) if "copy_of" in body else None,
        sealed=_typed(body.get("sealed", b""), bytes),
    )
    origin = manifest.archive
    if origin and (len(origin.disks) != len(manifest.disks) or len(origin.configs) != len(manifest.configs)):
        raise ValueError("the archive had other disks or configs")
    return manifest


def _archive(body: Mapping[str, Any]) -> ArchiveOrigin:
    return ArchiveOrigin(
        format=_typed(body["format"], str),
        uuid=_optional(body["uuid"], bytes),
        time_s=_optional(body["time_s"], int),
        disks=tuple(ArchivedDisk(_typed(name, str), _optional(device, int)) for name, device in body["disks"]),
        configs=tuple(_typed(name, str) for name in body["configs"]),
        missing=tuple(MissingRange(*(_typed(number, int) for number in item)) for item in body["missing"]),
    )


def _live(body: Mapping[str, Any]) -> LiveOrigin:
    return LiveOrigin(
        mode=_typed(body["mode"], str),
        qemu=_typed(body["qemu"], str),
        frozen=_typed(body["frozen"], bool),
        note=_typed(body["note"], str),
        bitmap=_typed(body["bitmap"], str),
        increments=tuple(parse_disk(_typed(name, str)) for name in body["increments"]),
        mode_note=_typed(body.get("mode_note", ""), str),
        vmstate=_typed(body.get("vmstate", ""), str),
        pause_ms=_typed(body.get("pause_ms", 0), int),
    )


def _disk(name: object, size_bytes: object, root: object, source: object, role: object = "") -> DiskRecord:
    size = _typed(size_bytes, int)
    if not 0 <= size <= MAX_DISK_BYTES:
        raise ValueError(f"a disk of {size} bytes")
    return DiskRecord(parse_disk(_typed(name, str)), size, _blob_id(root), _typed(source, str), _typed(role, str))


def _config(name: object, size_bytes: object, blob: object) -> ConfigRecord:
    """A name becomes a file's when it is restored, so it may not be just any: the manifest may come from elsewhere."""
    return ConfigRecord(parse_config_name(_typed(name, str)), _typed(size_bytes, int), _blob_id(blob))


def _blob_id(value: object) -> BlobId:
    raw = _typed(value, bytes)
    if len(raw) != ID_BYTES:
        raise ValueError(f"an id of {len(raw)} bytes")
    return BlobId(raw)


def _typed(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} where {kind.__name__} was expected")
    return value


def _optional(value: object, kind: type[T]) -> T | None:
    return None if value is None else _typed(value, kind)
