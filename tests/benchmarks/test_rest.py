"""How quickly a server gives ranges of a disk, and how much memory that takes.

python -m pytest -m bench --timeout 600 tests/benchmarks/test_rest.py
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import urllib3

from casbackup.repository.repository import Repository
from casbackup.units import MiB
from casbackup_client.main import main
from tests.benchmarks.figures import Figures
from tests.server.conftest import ServerProcess

pytestmark = pytest.mark.bench

SIZE = 512 * MiB
RANGE_BYTES = 1 * MiB
MOST_MEMORY = 300 * MiB
HTTP = urllib3.PoolManager(retries=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """With a disk of which half compresses to nothing."""
    disk, rng = tmp_path / "disk", random.Random(1)
    with disk.open("wb") as file:
        for _ in range(SIZE // MiB):
            file.write(rng.randbytes(MiB // 2) + rng.randbytes(64) * (MiB // 128))
    Repository.create(str(tmp_path / "repository")).close()
    assert main(["-r", str(tmp_path / "repository"), "backup", "-q", "vm/1", f"scsi0={disk}"]) == 0
    process = ServerProcess(tmp_path / "repository")
    process.start()
    yield process
    process.stop()


def test_ranges(server: ServerProcess, figures: Figures) -> None:
    api = f"http://127.0.0.1:{server.port}/v1/repositories/main"
    snapshot = HTTP.request("GET", f"{api}/snapshots").json()["snapshots"][0]["id"]
    address = f"{api}/snapshots/{snapshot}/disks/scsi0"
    rng = random.Random(2)
    took_s = [_timed(address, rng.randrange(SIZE - RANGE_BYTES)) for _ in range(200)]
    began_s = time.perf_counter()
    assert len(HTTP.request("GET", address).data) == SIZE
    figures.note(f"a disk of {SIZE // MiB} MiB over REST", time.perf_counter() - began_s)
    figures.note("100 ranges of 1 MiB at random offsets over REST, by the median", 100 * median(took_s), 1.0)
    assert _peak_bytes(server) <= MOST_MEMORY


def _timed(address: str, offset: int) -> float:
    began_s = time.perf_counter()
    answer = HTTP.request("GET", address, headers={"Range": f"bytes={offset}-{offset + RANGE_BYTES - 1}"})
    took_s = time.perf_counter() - began_s
    assert (answer.status, len(answer.data)) == (206, RANGE_BYTES)
    return took_s


def _peak_bytes(server: ServerProcess) -> int:
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024
