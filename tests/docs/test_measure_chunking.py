"""The script behind the table of ``docs/decisions/0002-chunker.md`` runs."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_chunking.py"


def test_table(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3_000_000)
    for name, data in (("a1", content), ("a2", content[:1_500_000] + bytes(1_000_000) + content[2_500_000:])):
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "a1", "a2", "--cuts", "18", "40", "--levels", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    titles, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert titles == ["cuts", "blocks", "chunks", "leaves", "cutting s", "zstd-1 MB", "zstd-1 s"]
    assert [row[:2] for row in rows] == [["18/256", "4-64"], ["40/256", "4-64"]]
    for row in rows:
        assert 3.0 < float(row[5]) < 4.0, "the second image is nearly free"
