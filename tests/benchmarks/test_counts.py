"""How costs grow, counted in steps: a small repository shows what a large one will do, without a clock."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from casbackup.block.source import open_source
from casbackup.ids import DEFAULT_NAMESPACE, parse_disk, parse_vm
from casbackup.jobs.backup import BackupRequest, DiskInput, backup
from casbackup.jobs.diff import diff_snapshots
from casbackup.jobs.segments import DeviceSegments
from casbackup.peer.local import LocalPeer
from casbackup.repository.accounting import account
from casbackup.repository.catalog import Snapshot
from casbackup.repository.gc import plan_gc
from casbackup.repository.indextable import read_index
from casbackup.repository.repository import Repository
from casbackup.spec.record import BlobKind
from casbackup.units import MiB, TiB
from tests.benchmarks.counting import Counts, counted
from tests.benchmarks.images import scattered, write_image
from tests.benchmarks.synthetic import Shape, add_snapshot, copy_repository, create, vm_name

SHAPE = Shape(chunks=15_000, snapshots=10)
NODES_PER_CHANGE = SHAPE.leaves_per_change + 1
"""Below one inner node, which changes too."""
FIRST_NODES = SHAPE.leaves + 1
VM = vm_name(0)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The same repository with one snapshot and with ten."""
    folder = tmp_path_factory.mktemp("stages")
    growing, one = str(folder / "10"), str(folder / "1")
    with create(growing, SHAPE) as repository:
        add_snapshot(repository, SHAPE, VM)
    copy_repository(growing, one)
    with Repository.open(growing) as repository:
        for _ in range(SHAPE.snapshots - 1):
            add_snapshot(repository, SHAPE, VM)
    return {1: one, SHAPE.snapshots: growing}


@pytest.fixture(params=[1, SHAPE.snapshots])
def stage(stages: dict[int, str], request: pytest.FixtureRequest) -> Iterator[tuple[Repository, Counts, int]]:
    """An open repository, what it does, and how many distinct nodes it has."""
    number: int = request.param
    with counted(stages[number]) as (repository, counts):
        yield repository, counts, FIRST_NODES + (number - 1) * NODES_PER_CHANGE


def test_gc_reads_each_distinct_node_once(stage: tuple[Repository, Counts, int]) -> None:
    repository, counts, nodes = stage
    done = counts.during(lambda: plan_gc(repository))
    assert done["fetched"] == nodes
    assert done["gets"] <= nodes + len(repository.catalog.all()) + _few(repository)
    assert done["puts"] == done["writes"] == 0


def test_accounting_opens_no_pack_and_asks_for_each_node_once(stage: tuple[Repository, Counts, int]) -> None:
    repository, counts, nodes = stage
    done = counts.during(lambda: account(repository))
    assert done["fetched"] == done["pack reads"] == done["files"] == 0
    assert done["gets"] <= nodes + len(repository.catalog.all()) + _few(repository)


def test_a_listing_opens_no_file(stage: tuple[Repository, Counts, int]) -> None:
    repository, counts, _ = stage
    done = counts.during(repository.catalog.all)
    assert done["files"] == done["fetched"] == done["pack reads"] == 0
    assert done["gets"] == len(repository.catalog.all())
    assert done["reads"] == 1
    assert done["folders"] == 4, "snapshots/, the namespace, vm/, the VM"


def test_a_diff_reads_what_differs(stage: tuple[Repository, Counts, int]) -> None:
    repository, counts, _ = stage
    snapshots = repository.catalog.all()
    peer = LocalPeer(repository)
    done = counts.during(lambda: diff_snapshots(peer, snapshots[max(0, len(snapshots) - 2)], snapshots[-1]))
    assert done["fetched"] == (2 * NODES_PER_CHANGE if len(snapshots) > 1 else 0)


def test_a_backup_does_not_depend_on_the_snapshots_of_others(stages: dict[int, str], tmp_path: Path) -> None:
    image = write_image(tmp_path / "disk.raw", 16 * MiB, range(0, 16 * MiB, MiB))
    done = []
    for number, path in stages.items():
        copy = str(tmp_path / str(number))
        copy_repository(path, copy)
        with counted(copy) as (repository, counts):
            _back_up(repository, image)
            done.append(counts.during(lambda repository=repository: _back_up(repository, image)))  # type: ignore[misc]
    assert done[0] == done[1]


def test_a_backup_reads_a_row_for_each_earlier_one_of_its_vm(tmp_path: Path) -> None:
    image = write_image(tmp_path / "disk.raw", 16 * MiB, range(0, 16 * MiB, MiB))
    Repository.create(str(tmp_path / "repository")).close()
    with counted(str(tmp_path / "repository")) as (repository, counts):
        done = [counts.during(lambda: _back_up(repository, image)) for _ in range(10)][1:]
    assert all(later["gets"] - earlier["gets"] <= 1 for earlier, later in pairwise(done))
    for later in done:
        later["gets"] = 0
        assert later == done[0] and later["fetched"] == later["files"] == 0


def test_a_sparse_image_costs_what_its_data_costs(tmp_path: Path) -> None:
    pieces = 8
    image = write_image(tmp_path / "sparse.raw", TiB, scattered(TiB, pieces))
    Repository.create(str(tmp_path / "repository")).close()
    with counted(str(tmp_path / "repository")) as (repository, counts):
        made: list[Snapshot] = []
        done = counts.during(lambda: made.append(_back_up(repository, image)))
        nodes = _blobs(repository, BlobKind.NODE)
    stats = made[0].manifest.stats
    assert stats.read_bytes == stats.new_bytes == pieces * MiB
    assert stats.zero_bytes == TiB - pieces * MiB
    assert nodes <= pieces * 4, "a leaf and, at the most, three inner nodes for each piece"
    assert done["gets"] < 100 * pieces and done["fetched"] == 0


def _blobs(repository: Repository, kind: BlobKind) -> int:
    return int((read_index(repository.index).values["kind"] == kind).sum())


def _few(repository: Repository) -> int:
    """Look-ups of packs, each once, and of a handful of numbers."""
    return len(repository.store.pack_rows()) + 10


def _back_up(repository: Repository, image: Path) -> Snapshot:
    with open_source(str(image), format="raw") as device:
        disk = DiskInput(parse_disk("scsi0"), DeviceSegments(device))
        return backup(LocalPeer(repository), BackupRequest(DEFAULT_NAMESPACE, parse_vm("vm/1"), [disk]))
