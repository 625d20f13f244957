"""Each test that the threat model names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
SOURCES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
NAMES = sorted(
    {
        name.strip()
        for bracket in re.findall(r"\[((?:[^\]\[`]*`[^`]*`)+)[^\]\[`]*\](?!\()", PAGE)
        for quoted in re.findall(r"`([^`]*)`", bracket)
        for name in re.split("[:,]", quoted)
    }
)


def test_there_are_many() -> None:
    assert len(NAMES) > 20


@pytest.mark.parametrize("name", NAMES)
def test_it_exists(name: str) -> None:
    if name.endswith(".py"):
        assert [path for path in SOURCES if str(path).endswith(f"/{name}")]
    elif "/" in name:
        assert (ROOT / "tests" / name).exists()
    else:
        beginning = f"def test_{name.removesuffix('…')}"
        assert [path for path, text in SOURCES.items() if beginning in text]


def test_each_claim_about_rest_has_one_that_exists() -> None:
    section = PAGE.partition("## Restores and jobs over REST")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 15
    known = {name for text in SOURCES.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rpartition("|")[0].rpartition("|")[2])
        assert named, row
        assert set(named) <= known, row
