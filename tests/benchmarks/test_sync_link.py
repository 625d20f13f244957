"""How much of a line with long round trips a sync uses: two server processes, and a stand-in for the line.

    python -m pytest -m bench --timeout 600 tests/benchmarks/test_sync_link.py

The content is random, so what is sent is what is stored, and the line's time for it is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from casbackup.repository.repository import Repository
from casbackup.units import MiB
from casbackup_client.main import main
from tests.benchmarks.figures import Figures
from tests.server.conftest import NAME, ServerProcess, client

pytestmark = pytest.mark.bench

ROUND_TRIP_S = 0.1
LEAST_USED = 0.7
ROOT = Path(__file__).resolve().parents[2]
LINE = """
import sys
from tests.server.proxy import Proxy
port, latency_s, bytes_per_s = sys.argv[1:]
with Proxy(int(port), latency_s=float(latency_s), bytes_per_s=float(bytes_per_s)) as proxy:
    print(proxy.port, flush=True)
    sys.stdin.read()
"""


@contextmanager
def line(port: int, bytes_per_s: float) -> Iterator[str]:
    """The address of what is behind the port, far away; in a process of its own, for it has work to do."""
    arguments = [sys.executable, "-c", LINE, str(port), str(ROUND_TRIP_S / 2), str(bytes_per_s)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/{NAME}"
        process.stdin.close()


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[list[ServerProcess]]:
    made = [ServerProcess(tmp_path / name) for name in ("here", "there")]
    for process in made:
        Repository.create(str(process.folder)).close()
        process.start()
    yield made
    for process in made:
        process.kill()


@pytest.mark.parametrize("way", ["push", "pull", "between servers"])
@pytest.mark.parametrize(("megabits", "size_mib"), [(100, 192), (1000, 2048)])
def test_a_long_line_is_used(
    sites: list[ServerProcess], tmp_path: Path, figures: Figures, way: str, megabits: int, size_mib: int
) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        for _ in range(size_mib // 16):
            file.write(os.urandom(16 * MiB))
    here, there = sites
    assert main(["-r", str(here.folder), "backup", "vm/100", f"scsi0={image}", "-q"]) == 0
    bytes_per_s = megabits * 125_000
    with line(here.port if way == "pull" else there.port, bytes_per_s) as far:
        ends = {"push": (here.folder, far), "pull": (far, there.folder), "between servers": (here.url, far)}
        first = synced(*ends[way])
        again = synced(*ends[way])
    seconds, ideal_s = first["duration_ms"] / 1000, first["sent_bytes"] / bytes_per_s
    what = f"sync, {way}, {megabits} Mbit/s, round trips of 100 ms"
    figures.note(f"{what}: {100 * ideal_s / seconds:.0f} % of the line", seconds, ideal_s / LEAST_USED)
    figures.note(f"{what}, nothing to do", again["duration_ms"] / 1000, 1.0)


def synced(source: object, destination: object) -> dict[str, int]:
    process = client("sync", source, destination, "--json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    document: dict[str, int] = json.loads(out)
    assert document["equal"]
    return document
