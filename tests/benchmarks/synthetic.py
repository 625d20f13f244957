"""Repositories of any size, made through the real writing path, to see how costs grow.

    python -m tests.benchmarks.synthetic PATH --chunks 1500000 --snapshots 100

Sessions, packs and the index are the real ones; only the disks are made up. Each VM has one disk, whose leaves have
``CHUNKS_PER_LEAF`` chunks of one block, a kilobyte of random bytes in each, and then zeros. So a million and a half
of chunks takes 2 GB and a few minutes. Packs are smaller in the same proportion: there are about as many of them as
in a repository of real disks, and tree nodes lie so far apart in them that each is read for itself.

The first snapshot of a VM writes its whole disk. Each later one replaces a run of chunks in some leaves, which lie
together in a few places, as files and databases do. Everything follows from the seed: equal shapes give equal trees.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from casbackup.codec.codec import PLAIN
from casbackup.fs import RealFileSystem
from casbackup.ids import DEFAULT_NAMESPACE, ZERO_ID, BlobId, VmName, parse_disk, parse_vm
from casbackup.limits import BLOCK_BYTES, SEGMENT_BYTES
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.repository.sessions import Session
from casbackup.spec.config import encode_config
from casbackup.spec.manifest import DiskRecord, Manifest
from casbackup.spec.node import Extent, Inner, Leaf, decode_node, encode_leaf, zero_extent
from casbackup.spec.record import BlobKind, Record
from casbackup.store.blobstore import BlobStore
from casbackup.tree.builder import TreeBuilder, level_of

CHUNKS_PER_LEAF = 100
"""About what the default chunker gives in 4 MiB of file system."""

FIRST_TIME_MS = 1_767_225_600_000
"""2026-01-01T00:00:00Z; each later snapshot of a VM is dated a day later."""

_DAY_MS = 86_400_000
_DISK = parse_disk("scsi0")
_ASK_EVERY = 256
_REST = zero_extent(SEGMENT_BYTES - CHUNKS_PER_LEAF * BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Shape:
    """What to make. ``chunks``: distinct ones in the whole repository, at least and nearly."""

    chunks: int = 1_500_000
    snapshots: int = 100
    """Of each VM."""
    vms: int = 1
    changed_leaves: float = 0.01
    """Part of the disk's leaves that differ from one snapshot to the next."""
    clusters: int = 4
    """They lie in so many runs."""
    changed_chunks: float = 0.25
    """Part of a changed leaf's chunks that are new."""
    payload_bytes: int = 1024
    """Random bytes of each chunk: what it takes in a pack, about."""
    pack_bytes: int = 4 * 1024 * 1024
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.chunks, self.snapshots, self.vms, self.clusters, self.payload_bytes) < 1:
            raise ValueError("numbers of a shape must be 1 or more")
        if not (0 < self.changed_leaves <= 1 and 0 < self.changed_chunks <= 1 and self.payload_bytes <= BLOCK_BYTES):
            raise ValueError("a part must be above 0 and up to 1, a payload no longer than a block")

    @property
    def leaves(self) -> int:
        """Leaves of each disk."""
        changes = 1 + (self.snapshots - 1) * self.changed_leaves * self.changed_chunks
        return math.ceil(self.chunks / self.vms / changes / CHUNKS_PER_LEAF)

    @property
    def run_leaves(self) -> int:
        """Neighbouring leaves that change together."""
        return math.ceil(self.leaves * self.changed_leaves / self.clusters)

    @property
    def leaves_per_change(self) -> int:
        """Leaves that a later snapshot changes."""
        return min(self.clusters, self.leaves // self.run_leaves) * self.run_leaves

    @property
    def chunks_per_change(self) -> int:
        """New chunks in each leaf that changes."""
        return math.ceil(CHUNKS_PER_LEAF * self.changed_chunks)

    @property
    def disk_bytes(self) -> int:
        return self.leaves * SEGMENT_BYTES

    @property
    def name(self) -> str:
        """A file name that tells shapes apart."""
        return "-".join(str(getattr(self, field.name)) for field in dataclasses.fields(self))


def vm_name(number: int) -> VmName:
    return parse_vm(f"vm/{100 + number}")


def create(path: str, shape: Shape) -> Repository:
    """An empty repository with the shape's size of packs."""
    with Repository.create(path) as repository:
        config, layout = dataclasses.replace(repository.config, pack_bytes=shape.pack_bytes), repository.layout
    for file in (layout.config, layout.config_backup):
        Path(file).write_bytes(encode_config(config))
    return Repository.open(path)


def build(path: str, shape: Shape, done: Callable[[int, float], None] | None = None) -> None:
    """Make a repository of this shape in a new folder; it appears there when it is complete.

    ``done`` hears of each round of snapshots, one of each VM: its number, from 1, and the seconds that it took.
    """
    unfinished = path + ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with create(unfinished, shape) as repository:
        for number in range(1, shape.snapshots + 1):
            started_s = time.monotonic()
            for vm in range(shape.vms):
                add_snapshot(repository, shape, vm_name(vm))
            if done is not None:
                done(number, time.monotonic() - started_s)
    RealFileSystem().rename(unfinished, path)


def add_snapshot(repository: Repository, shape: Shape, vm: VmName) -> Snapshot:
    """The VM's next snapshot; it depends on the shape, the VM and the snapshot before it only."""
    earlier = repository.catalog.all(DEFAULT_NAMESPACE, vm)
    random = Random(f"{shape.seed} {vm} {len(earlier)}")
    session = repository.sessions.open(DEFAULT_NAMESPACE, vm)
    try:
        writer = _DiskWriter(repository, session, shape, random)
        root = writer.changed(earlier[-1].manifest.disks[0]) if earlier else writer.whole()
        disk = DiskRecord(_DISK, shape.disk_bytes, root, "synthetic")
        time_ms = FIRST_TIME_MS + len(earlier) * _DAY_MS
        return session.commit(Manifest(DEFAULT_NAMESPACE, vm, time_ms, 0, (disk,)))
    except BaseException:
        session.abort()
        raise


def leaf_ids(store: BlobStore, disk: DiskRecord) -> list[BlobId]:
    """The ids of a disk's leaves, in order; a zero id for each that is all zero."""
    level = level_of(disk.size_bytes)
    nodes = [disk.root]
    for _ in range(level):
        inner = [decode_node(data) for data in _in_order(store, nodes)]
        nodes = [child for node in inner if isinstance(node, Inner) for child in node.children]
    return nodes


class _DiskWriter:
    """Writes one disk as the backup job does: ask for leaves, send chunks, then their leaf, at last the inner nodes."""

    def __init__(self, repository: Repository, session: Session, shape: Shape, random: Random) -> None:
        self._store = repository.store
        self._level = repository.config.compression_level
        self._session = session
        self._shape = shape
        self._random = random
        self._tree = TreeBuilder()

    def whole(self) -> BlobId:
        for number in range(self._shape.leaves):
            self._write_leaf(number, [], CHUNKS_PER_LEAF, [_REST])
        return self._finish()

    def changed(self, previous: DiskRecord) -> BlobId:
        """The disk with some leaves changed. All leaves are asked for, as a backup that reads the whole disk does."""
        leaves = leaf_ids(self._store, previous)
        for number, leaf_id in enumerate(leaves):
            self._tree.set_leaf(number, leaf_id)
        for start in range(0, len(leaves), _ASK_EVERY):
            if self._session.missing([leaf for leaf in leaves[start : start + _ASK_EVERY] if leaf != ZERO_ID]):
                raise AssertionError("a leaf of the last snapshot is missing")
        chosen = self._choose_leaves()
        for number, data in zip(chosen, _in_order(self._store, [leaves[n] for n in chosen]), strict=True):
            node = decode_node(data)
            assert isinstance(node, Leaf)
            self._change_leaf(number, node.extents)
        return self._finish()

    def _choose_leaves(self) -> list[int]:
        """Runs that do not overlap: each begins at a multiple of its length."""
        shape = self._shape
        places = range(shape.leaves // shape.run_leaves)
        runs = self._random.sample(places, shape.leaves_per_change // shape.run_leaves)
        return [run * shape.run_leaves + i for run in sorted(runs) for i in range(shape.run_leaves)]

    def _change_leaf(self, number: int, extents: Sequence[Extent]) -> None:
        count = self._shape.chunks_per_change
        start = self._random.randrange(CHUNKS_PER_LEAF - count + 1)
        self._write_leaf(number, extents[:start], count, extents[start + count :])

    def _write_leaf(self, number: int, before: Sequence[Extent], new: int, after: Sequence[Extent]) -> None:
        """Send a leaf with so many new chunks in its middle."""
        chunks = [self._chunk() for _ in range(new)]
        missing = self._session.missing([chunk.id for chunk in chunks])
        self._session.send([chunk for chunk in chunks if chunk.id in missing])
        middle = [Extent(BLOCK_BYTES, 0, chunk.id) for chunk in chunks]
        self._tree.set_leaf(number, self._store_nodes([encode_leaf([*before, *middle, *after])])[0])

    def _chunk(self) -> Record:
        plain = self._random.randbytes(self._shape.payload_bytes).ljust(BLOCK_BYTES, b"\0")
        return PLAIN.encode_blob(BlobKind.CHUNK, plain, self._level)

    def _store_nodes(self, nodes: Sequence[bytes]) -> list[BlobId]:
        records = [PLAIN.encode_blob(BlobKind.NODE, node, self._level) for node in nodes]
        missing = self._session.missing([record.id for record in records])
        self._session.send([record for record in records if record.id in missing])
        return [record.id for record in records]

    def _finish(self) -> BlobId:
        return self._tree.finish(self._shape.disk_bytes, self._store_nodes)


def _in_order(store: BlobStore, ids: Sequence[BlobId]) -> list[bytes]:
    """The plain bytes of blobs, the zero id left out."""
    wanted = [blob_id for blob_id in ids if blob_id != ZERO_ID]
    found = store.read_all(wanted)
    return [bytes(found[blob_id]) for blob_id in wanted]


def copy_repository(source: str, target: str) -> None:
    """A copy that may be changed at will. Packs are hard links: a sealed pack is never written to, only deleted."""
    for folder, _, names in os.walk(source):
        place = os.path.join(target, os.path.relpath(folder, source))
        os.makedirs(place, exist_ok=True)
        for name in names:
            copy = os.link if name.endswith(".pack") else shutil.copyfile
            copy(os.path.join(folder, name), os.path.join(place, name))


def _parse(arguments: Sequence[str]) -> tuple[str, Shape]:
    parser = argparse.ArgumentParser(prog="synthetic", description="Make a synthetic repository.")
    parser.add_argument("path", help="a folder that does not exist yet")
    for field in dataclasses.fields(Shape):
        kind = float if isinstance(field.default, float) else int
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=kind, default=field.default, help=f"(default: {field.default})")
    options = vars(parser.parse_args(arguments))
    return options.pop("path"), Shape(**options)


def main(arguments: Sequence[str]) -> int:
    path, shape = _parse(arguments)
    if os.path.exists(path):
        print(f"{path} exists already", file=sys.stderr)
        return 2
    build(path, shape, lambda number, seconds: print(f"snapshot {number} of each VM: {seconds:.2f} s", flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
