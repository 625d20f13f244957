"""The format of docs/how-to/format-plugin.md: taken from the page, installed, and tested as the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "format-plugin.md"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder for ``PYTHONPATH`` with the files of the page and what an installer makes of its pyproject.toml."""
    text = PAGE.read_text(encoding="utf-8")
    files = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert set(files) == {"boxes.py", "pyproject.toml", "test_boxes.py"}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    metadata = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("".join(lines))
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_passes_its_tests(installed: Path) -> None:
    output = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_boxes.py")
    assert re.search(r"\d\d passed", output) and "failed" not in output


def test_it_is_listed(installed: Path) -> None:
    script = "from casbackup.formats.registry import all_formats; print(*(f.name for f in all_formats()))"
    assert "boxes" in run(installed, "-c", script).split()
