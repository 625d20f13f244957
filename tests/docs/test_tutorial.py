"""The tutorial's shell blocks run as they stand, in one shell, and show what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from casbackup.units import MiB, parse_size

ROOT = Path(__file__).parents[2]
TOOLS = "/usr/sbin:/sbin"
"""Where Debian keeps mke2fs and debugfs."""

needs_e2fsprogs = pytest.mark.skipif(
    not all(shutil.which(tool, path=f"{os.environ['PATH']}:{TOOLS}") for tool in ("mke2fs", "debugfs")),
    reason="mke2fs and debugfs are not installed",
)


def shell_blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which ``casbackup`` is this source tree's, and nobody's configuration counts."""
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "casbackup"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m casbackup_client "$@"\n')
    command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CASBACKUP_")}
    return {
        **kept,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "client", "migrations")),
        "XDG_CONFIG_HOME": str(tmp_path / "no-config"),
        "LC_ALL": "C.UTF-8",
    }


@needs_e2fsprogs
def test_the_tutorial_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    blocks = shell_blocks("tutorial.md")
    script = "set -eu\n" + "\n".join(f"echo '=== {n}'\n{block}" for n, block in enumerate(blocks))
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout
    for promised in (
        "created repository",
        "the same, byte for byte",
        "version 1",
        "53 ef",
        "would remove 1 of 2 snapshots",
        "removed 1 of 2 snapshots",
        "no damage",
    ):
        assert promised in done.stdout, done.stdout
    assert len(re.findall(r"^vm/100@\S+ [0-9a-f]{8}: scsi0 1.00 GiB", done.stdout, re.MULTILINE)) == 2
    first, second = (parse_size(size) for size in re.findall(r"added ([0-9.]+ \wiB)", done.stdout))
    assert second < 4 * MiB < first, "the copied file of 29 MiB is not stored again"


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs" / "how-to").glob("*.md")))
def test_shell_blocks_are_sound_shell(page: str) -> None:
    for block in shell_blocks(f"how-to/{page}"):
        checked = subprocess.run(["sh", "-n"], input=block, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    "page", ["tutorial.md", *(f"how-to/{p.name}" for p in (ROOT / "docs" / "how-to").glob("*.md"))]
)
def test_commands_and_options_exist(page: str) -> None:
    """Every ``casbackup COMMAND --option`` of a page is one of the command line's."""
    reference = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### ([\w -]+)\n(.*?)(?=^##|\Z)", reference, re.DOTALL | re.MULTILINE))
    global_options = reference.partition("## Global options")[2]
    for line in "\n".join(shell_blocks(page)).splitlines():
        for call in re.findall(r"casbackup (?:-r \S+ )?(?:--?quiet )?([a-z][^|;)]*)", line.partition(" #")[0]):
            words = call.split()
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in sections), "")
            assert name, call
            for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", call):
                assert f"{option}" in sections[name] or option in global_options, (call, option)
