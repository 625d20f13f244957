"""The synthetic repositories are what they should be; and what accounting says of them is exact."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from casbackup.ids import ZERO_ID, BlobId
from casbackup.limits import FANOUT
from casbackup.repository.accounting import _grouped, account
from casbackup.repository.catalog import Snapshot
from casbackup.repository.indextable import read_index
from casbackup.repository.repository import Repository
from casbackup.spec.node import Inner, decode_node
from casbackup.spec.record import HEADER_BYTES, BlobKind
from tests.benchmarks.synthetic import Shape, add_snapshot, create, leaf_ids, vm_name


def test_a_repository_has_its_shape(tmp_path: Path) -> None:
    shape = Shape(chunks=5000, snapshots=5)
    assert shape.leaves <= FANOUT
    with create(str(tmp_path / "repository"), shape) as repository:
        disks = [add_snapshot(repository, shape, vm_name(0)).manifest.disks[0] for _ in range(shape.snapshots)]
        leaves = [leaf_ids(repository.store, disk) for disk in disks]
        kinds = Counter(read_index(repository.index).values["kind"].tolist())
    assert shape.chunks <= kinds[BlobKind.CHUNK] <= 1.1 * shape.chunks
    assert kinds[BlobKind.NODE] == shape.leaves + 1 + (shape.snapshots - 1) * (shape.leaves_per_change + 1)
    for before, after in pairwise(leaves):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == shape.leaves_per_change


def test_equal_seeds_give_equal_trees(tmp_path: Path) -> None:
    shape = Shape(chunks=1000, snapshots=2, vms=2)
    roots = []
    for name in ("a", "b"):
        with create(str(tmp_path / name), shape) as repository:
            made = [add_snapshot(repository, shape, vm_name(vm)) for vm in (0, 1, 0, 1)]
            roots.append([snapshot.manifest.disks[0].root for snapshot in made])
    assert roots[0] == roots[1] and len(set(roots[0])) == 4


@pytest.mark.parametrize(
    "shape",
    [
        Shape(chunks=500, snapshots=1, payload_bytes=16),
        Shape(chunks=500, snapshots=66, changed_leaves=0.4, changed_chunks=0.1, payload_bytes=16),
        Shape(chunks=1500, snapshots=6, vms=2, changed_leaves=1, changed_chunks=0.5, payload_bytes=16),
    ],
    ids=["one snapshot", "more snapshots than bits of a word", "everything changes"],
)
def test_accounting_agrees_with_a_look_at_every_blob(shape: Shape, tmp_path: Path) -> None:
    with create(str(tmp_path / "repository"), shape) as repository:
        for _ in range(shape.snapshots):
            for vm in range(shape.vms):
                add_snapshot(repository, shape, vm_name(vm))
        accounting = account(repository)
        needed = [_blobs_of(repository, snapshot) for snapshot in accounting.snapshots]
        entries = repository.store.entries(set[BlobId]().union(*needed))
    users = Counter(blob for blobs in needed for blob in blobs)
    for snapshot, blobs in zip(accounting.snapshots, needed, strict=True):
        usage = accounting.usage([snapshot])
        stored = {blob: HEADER_BYTES + entries[blob].stored_length for blob in blobs}
        assert usage.stored_bytes == sum(stored.values())
        assert usage.unique_bytes == sum(size for blob, size in stored.items() if users[blob] == 1)
    assert accounting.total().unique_bytes == sum(HEADER_BYTES + e.stored_length for e in entries.values())


@pytest.mark.parametrize("count", [0, 1, 2, 10, 3000])
@pytest.mark.parametrize("different", [1, 5, 1000, 2**64])
@pytest.mark.parametrize("shift", [0, 54])
def test_equal_numbers_are_put_together(count: int, different: int, shift: int) -> None:
    numbers = np.random.default_rng(1).integers(0, different, count, np.uint64) << np.uint64(shift)
    order, starts = _grouped(numbers)
    assert sorted(order.tolist()) == list(range(count))
    runs = [set(run.tolist()) for run in np.split(numbers[order], starts[1:])] if count else []
    assert all(len(run) == 1 for run in runs)
    assert len(runs) == len(starts) == len(set(numbers.tolist()))


def _blobs_of(repository: Repository, snapshot: Snapshot) -> set[BlobId]:
    found: set[BlobId] = set()
    level = [disk.root for disk in snapshot.manifest.disks]
    while level:
        found.update(level)
        nodes = [decode_node(data) for data in repository.store.read_all(list(dict.fromkeys(level))).values()]
        level = [child for node in nodes if isinstance(node, Inner) for child in node.children if child != ZERO_ID]
        leaves = [node for node in nodes if not isinstance(node, Inner)]
        found.update(extent.id for leaf in leaves for extent in leaf.extents if not extent.is_zero)
    return found
