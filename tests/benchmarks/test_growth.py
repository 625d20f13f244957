"""Growth of cost, measured: 1.5 million chunks in 100 snapshots of one VM, and an image that is mostly holes.

    python -m pytest -m bench --timeout 3600 tests/benchmarks

Every figure is that of a whole process, from its start to its end, with everything in the page cache.
``CASBACKUP_BENCH_DIR`` names a folder that keeps the large repository between runs (2 GB); making it takes some
minutes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from casbackup.repository.repository import Repository
from casbackup.spec.config import FORMAT
from casbackup.units import GiB, MiB, TiB
from tests.benchmarks.figures import Figures
from tests.benchmarks.images import change_image, scattered, write_image
from tests.benchmarks.measure import Measured, run
from tests.benchmarks.synthetic import Shape, build, copy_repository

pytestmark = pytest.mark.bench

LARGE = Shape()
LONG = Shape(chunks=30_000, snapshots=300)

GC_SECONDS, GC_BYTES = 10, 300 * MiB
LISTING_SECONDS = 1
SPARSE_SECONDS = 5
"""How much longer a terabyte of holes with some data may take than the data alone."""

_ROUNDS = 3


@pytest.fixture(scope="module")
def bench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("CASBACKUP_BENCH_DIR")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("bench")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def large(bench_folder: Path) -> str:
    return _made(bench_folder, LARGE)


@pytest.fixture(scope="module")
def long(bench_folder: Path) -> str:
    return _made(bench_folder, LONG)


@pytest.fixture
def work(bench_folder: Path) -> Iterator[Path]:
    """A folder on the same file system as the kept repositories, so that packs can be linked."""
    folder = bench_folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_looking(large: str, figures: Figures) -> None:
    assert run("snapshots", large).result["snapshots"] == LARGE.snapshots
    figures.take("snapshots", run("snapshots", large), LISTING_SECONDS)
    figures.take("stats", run("stats", large), LISTING_SECONDS)


def test_check(large: str, figures: Figures) -> None:
    measured = run("check", large)
    figures.take("check", measured)
    assert not measured.result["damaged"]


def test_gc(large: str, work: Path, figures: Figures) -> None:
    copy = str(work / "repository")
    copy_repository(large, copy)
    figures.take("gc, small packs to merge", run("gc", copy))
    idle = run("gc", copy)
    assert idle.result["removed_blobs"] == idle.result["rewritten_packs"] == 0
    figures.take("gc, nothing to do", idle, GC_SECONDS, GC_BYTES)
    run("forget", copy, "10")
    after = run("gc", copy)
    assert after.result["removed_blobs"] > 0
    figures.take("gc after forgetting 10 snapshots", after, GC_SECONDS, GC_BYTES)
    assert not run("check", copy).result["damaged"]


def test_the_next_snapshot_of_a_large_disk(large: str, work: Path, figures: Figures) -> None:
    """With 1, 10 and 100 earlier snapshots: all leaves of the disk are asked for, a hundredth of them is sent."""
    shape = json.dumps(asdict(replace(LARGE, seed=LARGE.seed + 1)))
    rounds: dict[int, list[Measured]] = {}
    for earlier in (1, 10, 100):
        copy = str(work / str(earlier))
        copy_repository(large, copy)
        with Repository.open(copy) as repository:
            repository.catalog.remove(repository.catalog.all()[earlier:])
        rounds[earlier] = [run("next", copy, shape) for _ in range(_ROUNDS)]
    _require_flat("next snapshot, 1.5 M chunks", rounds, figures)


def test_the_next_backup_of_an_image(work: Path, figures: Figures) -> None:
    """256 MiB that are really read, with 1, 10 and 100 earlier backups."""
    image = write_image(work / "disk.raw", 256 * MiB, range(0, 256 * MiB, MiB))
    path = str(work / "repository")
    Repository.create(path).close()
    rounds: dict[int, list[Measured]] = {}
    made = 0
    for earlier in (1, 10, 100):
        while made < earlier:
            change_image(image, 0.01, made)
            run("backup", path, str(image))
            made += 1
        rounds[earlier] = []
        for _ in range(_ROUNDS):
            change_image(image, 0.01, made)
            rounds[earlier].append(run("backup", path, str(image)))
            made += 1
    assert rounds[100][0].result["new_bytes"] < 16 * MiB
    _require_flat("next backup, 256 MiB", rounds, figures)


def test_a_terabyte_of_holes(work: Path, figures: Figures) -> None:
    pieces = GiB // MiB
    seconds: dict[str, float] = {}
    for name, size, places in (
        ("1 GiB of data in 4 GiB", 4 * GiB, scattered(4 * GiB, pieces)),
        ("1 GiB of data in 1 TiB", TiB, scattered(TiB, pieces)),
    ):
        image = write_image(work / "disk.raw", size, places)
        os.sync()
        Repository.create(str(work / "repository")).close()
        measured = run("backup", str(work / "repository"), str(image))
        assert measured.result["new_bytes"] == GiB
        figures.take(f"first backup, {name}", measured)
        again = run("backup", str(work / "repository"), str(image))
        assert again.result["new_bytes"] == 0
        figures.take(f"next backup, {name}", again)
        seconds[name] = measured.seconds
        shutil.rmtree(work / "repository")
    small, sparse = seconds.values()
    figures.note("holes of 1 TiB", sparse - small, SPARSE_SECONDS)


def test_300_snapshots_of_one_vm(long: str, work: Path, figures: Figures) -> None:
    copy = str(work / "repository")
    copy_repository(long, copy)
    assert run("snapshots", copy).result["snapshots"] == LONG.snapshots
    figures.take("300 snapshots: snapshots", run("snapshots", copy), LISTING_SECONDS)
    figures.take("300 snapshots: stats", run("stats", copy), LISTING_SECONDS)
    figures.take("300 snapshots: gc", run("gc", copy), GC_SECONDS, GC_BYTES)
    shape = json.dumps(asdict(replace(LONG, seed=LONG.seed + 1)))
    figures.take("300 snapshots: next snapshot", run("next", copy, shape), 2)
    run("forget", copy, "290")
    figures.take("300 snapshots: gc after forgetting 290", run("gc", copy), GC_SECONDS, GC_BYTES)
    assert not run("check", copy, "data").result["damaged"]


def _made(folder: Path, shape: Shape) -> str:
    path = str(folder / f"format-{FORMAT}-{shape.name}")
    if not os.path.exists(path):
        build(path, shape)
    return path


def _require_flat(what: str, rounds: dict[int, list[Measured]], figures: Figures) -> None:
    """Processor time hardly grows with the number of earlier ones; of each number's rounds the best counts."""
    best = {earlier: min(measured, key=_cpu_seconds) for earlier, measured in rounds.items()}
    for earlier, measured in best.items():
        figures.take(f"{what}, {earlier} earlier", measured)
    seconds = [measured.cpu_seconds for measured in best.values()]
    assert max(seconds) <= 1.3 * min(seconds) + 0.1, f"{what}: {seconds}"


def _cpu_seconds(measured: Measured) -> float:
    return measured.cpu_seconds
