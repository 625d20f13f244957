"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from casbackup.repository.repository import Repository
from casbackup.testing.world import World, temporary_world

# A slow machine is not a failing test; the limit on a whole test is pytest's.
settings.register_profile("casbackup", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("casbackup")


@pytest.fixture
def world() -> Iterator[World]:
    """A simulated machine without a repository yet; jobs run in the calling thread."""
    with temporary_world() as made:
        yield made


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    """An empty repository in a real folder."""
    with Repository.create(str(tmp_path / "repository")) as made:
        yield made
