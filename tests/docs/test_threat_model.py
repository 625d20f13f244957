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
