"""Make the golden repository of the format that this version writes: tests/golden/formatN.tar.zst.

    python scripts/make_golden.py           writes the archive, formatN.json and their lines in SHA256SUMS
    python scripts/make_golden.py --replace does so although they exist: only while format N is not released

A golden repository is what a released version wrote. Every later version must open it, so it is made once
and never edited; ``tests/golden/test_golden.py`` checks that, and that its content can still be had.

It holds two VMs in two namespaces, three snapshots with configs, labels and notes, a sidecar, a disk with
an inner node, holes, an end that is no multiple of a block, leaves with slices of chunks, an all-zero disk,
and a parked session with a pack that was never sealed. Ids and times are fixed, so that the same versions
of casbackup, zstandard and LMDB make the same archive. What was put in is known here without reading it
back: formatN.json holds the hashes.

The archive is a tar file: git keeps neither empty folders nor modes. ``index/lock.mdb`` is left out, which
LMDB makes anew and which holds process ids.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import zstandard

from casbackup.block.memory import MemoryDevice
from casbackup.clock import format_time, parse_time
from casbackup.codec.codec import PLAIN
from casbackup.ids import ZERO_ID, BlobId, DiskName, Namespace, VmName
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.segments import DeviceSegments
from casbackup.peer.local import LocalPeer
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import Session
from casbackup.spec.config import FORMAT
from casbackup.spec.node import Extent, Inner, Leaf, decode_node, zero_extent
from casbackup.spec.record import BlobKind
from casbackup.tree.builder import TreeBuilder, leaf_bytes
from casbackup.tree.extents import overlaid
from casbackup.units import KiB, MiB

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"
SUMS = "SHA256SUMS"
TIMES = ("2026-11-20T20:00:00Z", "2026-11-21T20:00:00.250Z", "2026-11-22T20:00:00Z")
MOST_BYTES = 300 * KiB
"""What the archive may measure at the most: it stays in the history of the sources for ever."""

Description = dict[str, Any]


def noise(name: str, size_bytes: int) -> bytes:
    """Bytes that do not compress, the same for ever."""
    return hashlib.shake_128(f"casbackup golden {name}".encode()).digest(size_bytes)


def text(name: str, size_bytes: int) -> bytes:
    """Bytes that compress."""
    lines = "".join(f"{name} line {number:08}\n" for number in range(size_bytes // 16 + 1))
    return lines.encode()[:size_bytes]


def laid_out(size_bytes: int, pieces: Mapping[int, bytes]) -> bytes:
    """A disk of zeros with ``pieces`` at their offsets."""
    disk = bytearray(size_bytes)
    for offset, piece in pieces.items():
        disk[offset : offset + len(piece)] = piece
    return bytes(disk)


SCSI0 = laid_out(
    9 * MiB + 512,
    {
        64 * KiB: noise("scsi0", 48 * KiB),
        1 * MiB: text("scsi0", 200 * KiB),
        # The second segment is a hole in the inner node.
        8 * MiB: noise("tail", 20 * KiB),
        9 * MiB: text("end of disk", 512),
    },
)
WEB_DISK = laid_out(300 * KiB, {0: text("web", 40 * KiB), 128 * KiB: noise("scsi0", 48 * KiB)})
CHANGES: Sequence[tuple[int, bytes | int]] = (
    (80 * KiB, text("changed", 8 * KiB)),
    (1 * MiB + 64 * KiB, 64 * KiB),
    (2 * MiB, noise("changed", 4 * KiB + 512)),
)
"""Of the second snapshot: offsets, and bytes or a number of zeros. All in the first segment."""

CONFIGS = {"qemu-server.conf": b"boot: order=scsi0\ncores: 2\nmemory: 2048\nscsi0: local:vm-100-disk-0,size=9M\n"}
WEB_CONFIGS = {"qemu-server.conf": text("web config", 5 * KiB), "firewall.fw": b"[OPTIONS]\nenable: 1\n"}


def changed(disk: bytes) -> bytes:
    return laid_out(len(disk), {0: disk} | {at: bytes(new) if isinstance(new, int) else new for at, new in CHANGES})


class SetClock:
    """Shows the time that it was set to."""

    def __init__(self) -> None:
        self.time_ms = parse_time(TIMES[0])

    def now_ms(self) -> int:
        return self.time_ms

    def monotonic_s(self) -> float:
        return 0.0


@contextmanager
def reproducible() -> Iterator[None]:
    """Ids in a fixed sequence, and work done in a fixed order."""
    numbers = iter(range(1, 1000))

    def next_id() -> str:
        return hashlib.shake_128(f"casbackup golden id {next(numbers)}".encode()).hexdigest(16)

    with (
        mock.patch("casbackup.ids._random_id", next_id),
        mock.patch("casbackup.peer.local.worker_count", lambda: 1),
    ):
        yield


@dataclass
class Golden:
    """The repository being made."""

    repository: Repository
    clock: SetClock

    def back_up(self, time: str, request: BackupRequest) -> Snapshot:
        self.clock.time_ms = parse_time(time)
        return backup(LocalPeer(self.repository), request, clock=self.clock)

    def back_up_changes(self, time: str, parent: Snapshot) -> Snapshot:
        """As a backup that was told what has changed would do it: on the parent's leaf, with slices."""
        self.clock.time_ms = parse_time(time)
        parent_disk, *others = parent.manifest.disks
        session = self.repository.sessions.open(parent.manifest.namespace, parent.manifest.vm)
        builder = TreeBuilder()
        root = decode_node(self.repository.store.read(parent_disk.root))
        assert isinstance(root, Inner)
        for number, leaf in enumerate(root.children):
            builder.set_leaf(number, leaf)
        builder.set_leaf(0, self._overlaid(session, root.children[0]))
        disk = replace(parent_disk, root=builder.finish(parent_disk.size_bytes, _storing(session)))
        manifest = replace(
            parent.manifest,
            time_ms=self.clock.time_ms,
            disks=(disk, *others),
            labels=(),
            notes="",
            sequence=0,
        )
        return session.commit(manifest)

    def park_a_session(self, time: str) -> Description:
        """A backup that was cut off: a durable leaf in a pack without a footer, and no snapshot."""
        self.clock.time_ms = parse_time(time)
        session = self.repository.sessions.open(Namespace("default"), VmName("vm/100"))
        content = noise("parked", 12 * KiB)
        chunk = _store(session, BlobKind.CHUNK, content)
        leaf = _store(session, BlobKind.NODE, leaf_bytes([Extent(len(content), 0, chunk)]) or b"")
        session.flush()
        session.park()
        return {
            "session": session.id,
            "blobs": [chunk.hex(), leaf.hex()],
            "root": leaf.hex(),
            "size_bytes": len(content),
            "sha256": sha256(content),
        }

    def _overlaid(self, session: Session, leaf: BlobId) -> BlobId:
        before = decode_node(self.repository.store.read(leaf))
        assert isinstance(before, Leaf)
        changes = [(offset, [_extent(session, new)]) for offset, new in CHANGES]
        extents = overlaid(before.extents, changes)
        assert any(extent.skip for extent in extents), "there should be a slice"
        return _store(session, BlobKind.NODE, leaf_bytes(extents) or b"")


def _extent(session: Session, new: bytes | int) -> Extent:
    if isinstance(new, int):
        return zero_extent(new)
    return Extent(len(new), 0, _store(session, BlobKind.CHUNK, new))


def _store(session: Session, kind: BlobKind, plain: bytes) -> BlobId:
    record = PLAIN.encode_blob(kind, plain, level=2)
    session.send([record])
    return record.id


def _storing(session: Session) -> Callable[[Sequence[bytes]], list[BlobId]]:
    return lambda nodes: [_store(session, BlobKind.NODE, node) for node in nodes]


def request(
    namespace: str, vm: str, disks: Mapping[str, bytes], configs: Mapping[str, bytes], **more: Any
) -> BackupRequest:
    inputs = [
        DiskInput(DiskName(name), DeviceSegments(MemoryDevice(content)), source=f"/dev/vg/{name}")
        for name, content in disks.items()
    ]
    return BackupRequest(
        Namespace(namespace), VmName(vm), inputs, configs, host="pve1", program="casbackup golden", **more
    )


def build(root: str) -> Description:
    """Make the repository in the new folder ``root``; returns what formatN.json says about it."""
    clock = SetClock()
    with reproducible(), Repository.create(root, clock=clock) as repository:
        golden = Golden(repository, clock)
        disks = {"scsi0": SCSI0, "virtio1": bytes(1 * MiB)}
        first = golden.back_up(
            TIMES[0],
            request("default", "vm/100", disks, CONFIGS, labels=("nightly", "site=a"), notes="the first one"),
        )
        second = golden.back_up_changes(TIMES[1], first)
        web = golden.back_up(
            TIMES[2], request("acme/prod", "vm/web01", {"scsi0": WEB_DISK}, WEB_CONFIGS, notes="naïve – 日本")
        )
        first = repository.catalog.annotate(
            first, pinned=True, labels=["kept"], notes="pinned before the upgrade\nsecond line"
        )
        assert second.manifest.disks[1].root == ZERO_ID
        return {
            "format": FORMAT,
            "repository_id": repository.config.repository_id,
            "snapshots": [
                describe(web, {"scsi0": WEB_DISK}, WEB_CONFIGS),
                describe(first, disks, CONFIGS),
                describe(second, disks | {"scsi0": changed(SCSI0)}, CONFIGS),
            ],
            "parked": golden.park_a_session(TIMES[2]),
        }


def describe(snapshot: Snapshot, disks: Mapping[str, bytes], configs: Mapping[str, bytes]) -> Description:
    manifest = snapshot.manifest
    return {
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
        "disks": {name: {"size_bytes": len(disk), "sha256": sha256(disk)} for name, disk in disks.items()},
        "configs": {name: content.decode() for name, content in configs.items()},
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def archive(folder: Path) -> bytes:
    """The folder as a compressed tar file that depends on nothing but names, bytes and folders."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            if path.name == "lock.mdb":
                continue
            member = tarfile.TarInfo(str(path.relative_to(folder)))
            member.mtime = parse_time(TIMES[-1]) // 1000
            if path.is_dir():
                member.type, member.mode = tarfile.DIRTYPE, 0o750
                tar.addfile(member)
            else:
                content = path.read_bytes()
                member.size, member.mode = len(content), 0o640
                tar.addfile(member, io.BytesIO(content))
    return zstandard.ZstdCompressor(level=19, threads=0).compress(packed.getvalue())


def make() -> dict[str, bytes]:
    """The golden files by name."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        description = build(str(root))
        packed = archive(root)
    if len(packed) > MOST_BYTES:
        raise SystemExit(f"the archive has {len(packed)} bytes, more than {MOST_BYTES}")
    described = json.dumps(description, indent=2, ensure_ascii=False).encode() + b"\n"
    return {f"format{FORMAT}.tar.zst": packed, f"format{FORMAT}.json": described}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the golden repository of the current format.")
    parser.add_argument("--replace", action="store_true", help="replace one whose format is not released yet")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to (default: %(default)s)")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    files = make()
    if any((folder / name).exists() for name in files) and not options.replace:
        print(f"there is one of format {FORMAT} already; golden files are never edited", file=sys.stderr)
        return 1
    sums = folder / SUMS
    lines = sums.read_text().splitlines() if sums.exists() else []
    lines = [line for line in lines if line.split()[-1] not in files]
    for name, content in files.items():
        (folder / name).write_bytes(content)
        lines.append(f"{sha256(content)}  {name}")
        print(f"{folder / name}: {len(content)} bytes")
    sums.write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda line: line.split()[-1])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
