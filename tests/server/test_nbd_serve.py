"""``nbd-serve`` of a repository on a server, which may go and come back."""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.block.device import read_bytes
from casbackup.block.nbd.client import NbdClient
from casbackup.errors import NbdError

from .conftest import ServerProcess, client

MiB = 1024 * 1024
CONTENT = random.Random(5).randbytes(8 * MiB)


@pytest.fixture
def served(process: ServerProcess, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """An ``nbd-serve`` of a snapshot of CONTENT, and the URI of its disk."""
    (tmp_path / "vm.raw").write_bytes(CONTENT)
    backup = client("-r", process.url, "backup", "vm/100", f"scsi0={tmp_path / 'vm.raw'}", "-q")
    assert backup.wait(60) == 0
    with tempfile.TemporaryDirectory(prefix="cb-") as folder:
        serving = client("-r", process.url, "nbd-serve", "vm/100", "--listen", f"unix:{folder}/nbd", "--json")
        assert serving.stdout is not None
        lines = iter(serving.stdout.readline, "}\n")
        yield serving, json.loads("".join(lines) + "}")["exports"][0]["uri"]


def test_reads_wait_for_a_server_that_is_started_again(
    process: ServerProcess, served: tuple[subprocess.Popen[str], str]
) -> None:
    serving, uri = served
    with NbdClient.connect(uri) as disk:
        assert read_bytes(disk, 0, 4096) == CONTENT[:4096]
        process.kill()
        back = threading.Timer(1, process.start)
        back.start()
        assert read_bytes(disk, 4 * MiB, 2 * MiB) == CONTENT[4 * MiB : 6 * MiB]
        back.join()
    serving.terminate()
    assert serving.wait(30) == 0


def test_it_ends_soon_without_the_server(process: ServerProcess, served: tuple[subprocess.Popen[str], str]) -> None:
    serving, uri = served
    failures: list[NbdError] = []

    def read() -> None:
        try:
            read_bytes(disk, 4 * MiB, MiB)
        except NbdError as error:
            failures.append(error)

    with NbdClient.connect(uri) as disk:
        assert read_bytes(disk, 0, 4096) == CONTENT[:4096]
        process.kill()
        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.5)
        serving.terminate()
        assert serving.wait(30) == 0
        reader.join(30)
    assert len(failures) == 1
