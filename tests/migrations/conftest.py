"""The steps of an imaginary format; what lies beside this file can be imported by the tests."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from casbackup_migrations.registry import Registry, discover

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def registry() -> Registry:
    """From format 1 to 3."""
    return Registry(discover(importlib.import_module("sample_steps")), 3)
