"""Archives that the reference program of VMA wrote, or that were made from such by damaging them.

``fixtures/vma.tar.zst`` has the archives, ``fixtures/vma.json`` what the reference program says of them. Every test
with an argument ``sound_vma`` or ``damaged_vma`` runs for each of these; the large one has an argument of its own.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

FOLDER = Path(__file__).parent / "fixtures"
FACTS: dict[str, dict[str, Any]] = json.loads((FOLDER / "vma.json").read_text(encoding="utf-8"))


class VmaSample(NamedTuple):
    name: str
    data: bytes
    facts: dict[str, Any]


@cache
def vma_files() -> dict[str, bytes]:
    packed = (FOLDER / "vma.tar.zst").read_bytes()
    plain = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed).read()
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]


LARGE = ("many-extents.vma",)
"""Have disks that do not fit into memory several times over."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "sound_vma" in metafunc.fixturenames:
        metafunc.parametrize("sound_vma", [name for name in FACTS["sound"] if name not in LARGE], indirect=True)
    if "damaged_vma" in metafunc.fixturenames:
        metafunc.parametrize("damaged_vma", FACTS["damaged"], indirect=True)


@pytest.fixture
def sound_vma(request: pytest.FixtureRequest) -> VmaSample:
    return VmaSample(request.param, vma_files()[request.param], FACTS["sound"][request.param])


@pytest.fixture
def damaged_vma(request: pytest.FixtureRequest) -> VmaSample:
    return VmaSample(request.param, vma_files()[f"damaged/{request.param}"], FACTS["damaged"][request.param])


@pytest.fixture
def basic_vma() -> bytes:
    """What most damaged archives were made from."""
    return vma_files()["basic.vma"]


@pytest.fixture
def crafted_vma() -> bytes:
    """What the ``legal-`` ones were made from."""
    return vma_files()["crafted-legal-59-shuffled.vma"]


@pytest.fixture
def many_extents_vma() -> VmaSample:
    """An archive of 332 extents, with a disk of 1.2 GB."""
    return VmaSample("many-extents.vma", vma_files()["many-extents.vma"], FACTS["sound"]["many-extents.vma"])
