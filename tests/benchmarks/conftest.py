"""Figures of benchmarks, shown in a table when all have run."""

from __future__ import annotations

import os

import pytest

from tests.benchmarks.figures import Figures

_FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    return request.config.stash[_FIGURES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[_FIGURES].lines()
    if lines:
        load = " ".join(f"{value:.2f}" for value in os.getloadavg())
        terminalreporter.section(f"figures ({os.cpu_count()} processors, load {load})")
        for line in lines:
            terminalreporter.write_line(line)
