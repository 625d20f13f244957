"""The command line under test: in this process for speed, as a process of its own where that matters."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from casbackup_client.main import main

MiB = 1024 * 1024
ROOT = Path(__file__).resolve().parents[2]
START = "import sys; from casbackup_client.main import main; sys.exit(main())"
"""What the installed console script does."""


@dataclass
class Result:
    """How a command ended and what it printed."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error that ``--json`` prints; nothing else is on stderr."""
        content: dict[str, Any] = json.loads(self.err)["error"]
        return content


class Casbackup:
    """``casbackup`` with a repository, in this process."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[bytes]) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        self._capture = capture

    def __call__(self, *arguments: object) -> Result:
        """Run a command whatever comes of it."""
        self._capture.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        return Result(status, out, err.decode())

    def ok(self, *arguments: object) -> Result:
        """Run a command that must succeed and say nothing on stderr."""
        result = self(*arguments)
        assert (result.status, result.err) == (0, ""), result.err
        return result

    def json(self, *arguments: object) -> Any:
        """The document of a command that must succeed."""
        return self.ok(*arguments, "--json").json

    def fails(self, status: int, *arguments: object) -> dict[str, Any]:
        """The error of a command that must fail with ``status``."""
        result = self(*arguments, "--json")
        assert result.status == status, (result.status, result.err)
        assert result.error["exit_status"] == status
        return result.error

    def disk(self, name: str = "vm.raw", *, data_mib: float = 1, size_mib: float = 6, seed: int = 0) -> Path:
        """A sparse raw image in the folder: random data, then a hole."""
        path = self.folder / name
        path.write_bytes(random.Random(seed).randbytes(int(data_mib * MiB)))
        os.truncate(path, int(size_mib * MiB))
        return path


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own settings reaches a test."""
    for name in [name for name in os.environ if name.startswith("CASBACKUP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("CASBACKUP_REPOSITORY", str(tmp_path / "repository"))
    monkeypatch.setenv("TZ", "UTC")


@pytest.fixture
def bare(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Casbackup:
    """The command, and no repository yet."""
    return Casbackup(tmp_path, capfdbinary)


@pytest.fixture
def cb(bare: Casbackup) -> Casbackup:
    """The command and an empty repository."""
    bare.ok("init", "-q")
    return bare


@pytest.fixture(scope="session")
def five_days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with five days of vm/100, each all new, and the last one as vm/200 too. To be copied."""
    folder = tmp_path_factory.mktemp("five-days")
    repository, disk = folder / "repository", folder / "vm.raw"
    assert main(["-r", str(repository), "init", "-q"]) == 0
    for day in range(1, 6):
        disk.write_bytes(random.Random(day).randbytes(MiB))
        os.truncate(disk, 6 * MiB)
        for vm in ("vm/100", "vm/200") if day == 5 else ("vm/100",):
            when = ["--time", f"2026-11-0{day}T20:00:00Z", "--namespace", "default", "-q"]
            assert main(["-r", str(repository), "backup", vm, f"scsi0={disk}", *when]) == 0
    return repository


@pytest.fixture
def history(bare: Casbackup, five_days: Path) -> Casbackup:
    """The command and a repository of ``five_days``."""
    shutil.copytree(five_days, bare.repository)
    return bare


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[bytes]]:
    """Starts ``casbackup ARGUMENTS`` as a process; keyword arguments are those of ``Popen``."""

    def run(*arguments: object, code: str = START, **settings: Any) -> subprocess.Popen[bytes]:
        paths = [str(ROOT), str(ROOT / "client"), str(ROOT / "migrations")]
        environment = {**os.environ, **settings.pop("env", {}), "PYTHONPATH": os.pathsep.join(paths)}
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, **settings}
        return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **settings)

    return run
