"""How quickly a command starts, and what it does not load for that."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest

from .conftest import START, Casbackup

Start = Callable[..., subprocess.Popen[bytes]]

HEAVY = {
    "rich",
    "numpy",
    "platformdirs",
    "asyncio",
    "logging",
    "concurrent.futures",
    "urllib",
    "socket",
    "subprocess",
}
LIST_MODULES = START.replace("sys.exit(main())", "main(); sys.stdout.flush(); print(*sys.modules, file=sys.stderr)")


def loaded(process: subprocess.Popen[bytes]) -> set[str]:
    _, err = process.communicate(timeout=60)
    modules = set(err.decode().splitlines()[-1].split())
    assert "casbackup_client.cli" in modules
    return modules


def test_help_is_quick(start: Start) -> None:
    """0.15 s is the figure on a calm machine; a test must pass on a busy one, so it looks at processor time."""
    assert processor_time_s(start) <= max(0.3, 2 * processor_time_s(start, code="import click"))


def processor_time_s(start: Start, code: str = START) -> float:
    """The least of five runs of ``casbackup --help``, or of other code."""
    times = []
    for _ in range(5):
        process = start("--help", code=code, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        process.communicate()
        times.append(usage.ru_utime + usage.ru_stime)
    return min(times)


def test_help_loads_no_command_and_nothing_heavy(start: Start) -> None:
    modules = loaded(start("--help", code=LIST_MODULES))
    assert not modules & HEAVY
    assert [name for name in modules if name.startswith("casbackup_client.commands.")] == []
    assert "lmdb" not in modules


def test_a_backup_loads_nothing_that_it_does_not_need(cb: Casbackup, start: Start) -> None:
    disk = cb.disk()
    cb.ok("backup", "vm/100", f"scsi0={disk}")
    modules = loaded(start("backup", "vm/100", f"scsi0={disk}", code=LIST_MODULES))
    assert not modules & HEAVY
    assert "zstandard" not in modules  # nothing is new, so nothing is compressed


@pytest.mark.parametrize("arguments", ["snapshots", "show vm/100", "pin vm/100", "sessions"])
def test_other_commands_load_no_display(cb: Casbackup, start: Start, arguments: str) -> None:
    cb.ok("backup", "vm/100", f"scsi0={cb.disk()}")
    assert not loaded(start(*arguments.split(), code=LIST_MODULES)) & {"rich", "platformdirs", "asyncio"}
