"""Archives against what else does such work: times of whole commands, as ratios within one run.

Processor seconds are compared where both sides do nothing but compute, for they are the same on a busy machine.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from casbackup.units import GiB, MiB
from tests.benchmarks.figures import Figures
from tests.benchmarks.measure import PROJECT, Measured

pytestmark = pytest.mark.bench

IMPORT_RATIO = 0.7
SPARSE_SECONDS = 5
MOST_BYTES = 200 * MiB


def command(*arguments: object, stdout: str = os.devnull) -> Measured:
    """``casbackup ARGUMENTS`` as a process of its own."""
    start = "import sys; from casbackup_client.main import main; sys.exit(main())"
    return process(sys.executable, "-c", start, *map(str, arguments), stdout=stdout)


def process(*arguments: str, stdout: str = os.devnull) -> Measured:
    paths = os.pathsep.join(str(PROJECT / name) for name in (".", "client", "migrations", "server"))
    with open(stdout, "wb") as out:
        began_s = time.monotonic()
        child = subprocess.Popen(arguments, stdout=out, env={**os.environ, "PYTHONPATH": paths})
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, arguments
    seconds = time.monotonic() - began_s
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 1 GiB: text-like data, incompressible data and holes; a repository with it; its archive."""
    folder = tmp_path_factory.mktemp("archives")
    words = [random.Random(n).randbytes(12) for n in range(3000)]
    chance = random.Random(1)
    with open(folder / "disk.raw", "wb") as file:
        file.truncate(GiB)
        for place in range(0, 512 * MiB, MiB):
            text = b"".join(chance.choices(words, k=MiB // 12))
            os.pwrite(file.fileno(), text if place % (3 * MiB) else chance.randbytes(MiB), 2 * place)
    os.environ["CASBACKUP_REPOSITORY"] = str(folder / "repository")
    command("init")
    command("backup", "vm/100", f"scsi0={folder / 'disk.raw'}")
    command("export", "vm/100", folder / "disk.vma")
    return folder


def test_import(folder: Path, figures: Figures) -> None:
    taken: list[Measured] = []
    for arguments in (["backup", "vm/1", f"scsi0={folder / 'disk.raw'}"], ["import", "vm/1", folder / "disk.vma"]):
        repository = folder / "fresh"
        command("-r", repository, "init")
        taken.append(command("-r", repository, *arguments))
        shutil.rmtree(repository)
    figures.take("backup of 1 GiB, half data", taken[0])
    figures.take("import of its archive", taken[1], most_bytes=MOST_BYTES)
    assert taken[0].cpu_seconds >= IMPORT_RATIO * taken[1].cpu_seconds


def test_export(folder: Path, figures: Figures) -> None:
    figures.take("export of 1 GiB, half data, as VMA", command("export", "vm/100", "-"), most_bytes=MOST_BYTES)
    if shutil.which("zstd"):
        figures.take("zstd -1 -T2 of that", process("zstd", "-1", "-T2", "-q", "-c", str(folder / "disk.vma")))


def test_extract(folder: Path, figures: Figures) -> None:
    figures.take("archive extract", command("archive", "extract", folder / "disk.vma", folder / "out"))
    copied = process("cp", "--sparse=always", str(folder / "disk.raw"), str(folder / "copy.raw"))
    figures.take("cp --sparse=always of the image", copied)
    figures.take("archive verify --quick", command("archive", "verify", "--quick", folder / "disk.vma"))


def test_a_sparse_disk_of_64_gib(folder: Path, figures: Figures) -> None:
    with open(folder / "sparse.raw", "wb") as file:
        file.truncate(64 * GiB)
    command("backup", "vm/200", f"scsi0={folder / 'sparse.raw'}")
    figures.take("export of 64 GiB of zeros", command("export", "vm/200", "-"), SPARSE_SECONDS, MOST_BYTES)
