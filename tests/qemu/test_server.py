"""Live backups of a VM into a server, which may vanish, hang or fill up: the guest notices nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casbackup.repository.repository import Repository
from tests.server.conftest import NAME, ServerProcess, client
from tests.server.proxy import Proxy

from .conftest import GUEST_DISK_BYTES, BootGuest, assert_clean, assert_prefix

pytestmark = pytest.mark.qemu
MiB = 1024 * 1024
RANDOM_BYTES = 48 * MiB
SPEED = "16MiB"
"""At which the backup of the guest below takes some 10 s."""


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    Repository.create(str(tmp_path / "repository")).close()
    made = ServerProcess(tmp_path / "repository")
    made.start()
    yield made
    if made.process is not None:
        made.process.send_signal(signal.SIGCONT)
        made.kill()


class Guest(BootGuest):
    """It has a third disk, of random bytes."""

    def __init__(self, folder: Path) -> None:
        path = folder / "c.raw"
        path.write_bytes(os.urandom(RANDOM_BYTES))
        disk = ["-blockdev", f"driver=file,node-name=c-file,filename={path}"]
        disk += ["-blockdev", "driver=raw,node-name=disk-c,file=c-file"]
        disk += ["-device", "virtio-blk-pci,drive=disk-c,id=virtio-c"]
        super().__init__(folder, disk)
        self.wait_written(64)

    def assert_unharmed(self) -> None:
        """It goes on and has seen no error, and QEMU has nothing of ours."""
        self.wait_written(self.written() + 64)
        assert self.errors == 0
        with self.qmp() as qmp:
            assert_clean(qmp)


@pytest.fixture
def vm(place: Path) -> Iterator[Guest]:
    made = Guest(place)
    with contextlib.closing(made):
        yield made


def start(vm: Guest, url: str, *arguments: str) -> subprocess.Popen[str]:
    return client("backup", "vm/100", "--qmp", vm.qmp_path, "-r", url, "--json", *arguments)


def wait_for_copying(process: subprocess.Popen[str], done_bytes: int = 1) -> None:
    """Until the backup has got so far."""
    deadline = time.monotonic() + 30
    while True:
        assert process.poll() is None, process.communicate()
        out, _ = client("job", "list", "--json").communicate()
        if any(job["done_bytes"] >= done_bytes for job in json.loads(out)["jobs"]):
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def failed(process: subprocess.Popen[str], timeout_s: float = 60) -> dict[str, str]:
    """The error that it ends with."""
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode != 0, out
    error: dict[str, str] = json.loads(err[err.index("{") :])["error"]  # after warnings
    return error


def test_backups_into_a_server(vm: Guest, server: ServerProcess, tmp_path: Path) -> None:
    """The first, and an increment, which is restored."""
    for _ in range(2):
        process = start(vm, server.url)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        snapshot = json.loads(out)["snapshot"]
        vm.wait_written(vm.written() + 64)
    assert snapshot["live"]["increments"] == ["virtio-a", "virtio-b", "virtio-c"]
    assert snapshot["stats"]["read_bytes"] <= 2 * GUEST_DISK_BYTES, "the disk that nobody writes to was read"
    restore = client("restore", "vm/100", "--to", tmp_path / "out", "-r", server.url)
    assert restore.wait(60) == 0
    disks = [(tmp_path / "out" / f"virtio-{name}.raw").read_bytes() for name in "abc"]
    assert assert_prefix(disks[0], disks[1]) > 64
    assert disks[2] == (vm.folder / "c.raw").read_bytes()
    with vm.qmp() as qmp:
        assert_clean(qmp, bitmaps=1)
    assert vm.errors == 0


def test_the_server_is_killed_and_comes_back(vm: Guest, server: ServerProcess) -> None:
    """The backup goes on."""
    process = start(vm, server.url, "--speed", SPEED)
    wait_for_copying(process, 24 * MiB)
    server.kill()
    server.start()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(json.loads(out)["snapshot"]["disks"]) == 3
    assert vm.errors == 0


def kill(server: ServerProcess, _proxy: Proxy) -> None:
    server.kill()


def hang(server: ServerProcess, _proxy: Proxy) -> None:
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)


def cut_off(_server: ServerProcess, proxy: Proxy) -> None:
    """Packets vanish: no connection is refused, and nothing comes through any more."""
    proxy.bytes_per_s = 1.0


SLOW = pytest.mark.slow


@pytest.mark.parametrize("misfortune", [kill, pytest.param(hang, marks=SLOW), pytest.param(cut_off, marks=SLOW)])
def test_the_server_is_gone(
    vm: Guest, server: ServerProcess, misfortune: Callable[[ServerProcess, Proxy], None]
) -> None:
    with Proxy(server.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/{NAME}"
        process = start(vm, url, "--speed", SPEED, "--memory", "4MiB", "--max-guest-stall", "1s")
        wait_for_copying(process, 24 * MiB)
        misfortune(server, proxy)
        error = failed(process)
    vm.assert_unharmed()
    assert error["code"] == "backup-broken"
    assert "the guest goes first" in error["message"]
    assert f"http://127.0.0.1:{proxy.port} cannot be reached" in error["message"]


@pytest.mark.slow
@pytest.mark.root
def test_the_disk_of_the_server_is_full(vm: Guest, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "small", folder], check=False).returncode:
        pytest.skip("no tmpfs can be mounted")
    server = ServerProcess(folder / "repository")
    try:
        Repository.create(str(folder / "repository")).close()
        server.start()
        error = failed(start(vm, server.url))
        vm.assert_unharmed()
        assert error["code"] == "repository-full"
    finally:
        if server.process is not None:
            server.kill()
        subprocess.run(["umount", "-l", folder], check=True)
