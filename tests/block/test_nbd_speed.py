"""How fast the NBD server is beside nbdkit, in the same run and in turn: ``pytest -m bench -s``."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from casbackup.block.nbd.uri import NbdAddress, parse_uri
from casbackup.units import GiB, MiB

pytestmark = [pytest.mark.bench, pytest.mark.qemu, pytest.mark.timeout(600)]

SIZE = 1 * GiB
ROUNDS = 5

SINK = f"""
import sys, threading
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.sink import SinkDevice
from casbackup.block.spool import Spool
class Null:
    def write(self, disk, offset, data): pass
    def zero(self, disk, offset, length): pass
sink = SinkDevice(Spool(Null(), limit_bytes={64 * MiB}), "disk", {SIZE})
server = NbdServer([Export.of("", sink, receiver=sink)])
server.listen(NbdAddress(socket_path=sys.argv[1]))
print("ready", flush=True)
threading.Event().wait()
"""
FILE = """
import sys, threading
from casbackup.block.guard import Guarded
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.rawfile import RawFile
server = NbdServer([Export.of("", Guarded(RawFile.open(sys.argv[2])))])
server.listen(NbdAddress(socket_path=sys.argv[1]))
print("ready", flush=True)
threading.Event().wait()
"""


@contextlib.contextmanager
def ours(program: str, *arguments: str) -> Iterator[None]:
    """The server in a process of its own."""
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            process.kill()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of random data, in the page cache."""
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        for number in range(SIZE // (64 * MiB)):
            file.write(random.Random(number).randbytes(64 * MiB))
    return path


def seconds(command: list[str]) -> float:
    start_s = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - start_s


def compare(what: str, one: Callable[[], float], other: Callable[[], float]) -> tuple[float, float]:
    """Speed of the first in MB/s, and the ratio to the second: the best of each, for what else runs only slows down."""
    pairs = [(one(), other()) for _ in range(ROUNDS)]
    first, second = (min(times) for times in zip(*pairs, strict=True))
    print(f"\n{what}: {SIZE / first / 1e6:.0f} MB/s, nbdkit {SIZE / second / 1e6:.0f}, ratio {second / first:.2f}")
    return SIZE / first / 1e6, second / first


def test_export_of_a_raw_file(nbdkit: Callable[..., AbstractContextManager[str]], image: Path, tmp_path: Path) -> None:
    address = NbdAddress(socket_path=str(tmp_path / "ours.sock"))
    with ours(FILE, address.socket_path or "", str(image)), nbdkit("file", str(image)) as uri:
        speed, _ratio = compare(
            "nbdcopy from the export",
            lambda: seconds(["nbdcopy", str(address), "null:"]),
            lambda: seconds(["nbdcopy", uri, "null:"]),
        )
    assert speed >= 500


# QEMU uses one connection; those of nbdcopy share an interpreter here, and have a thread each in nbdkit.
@pytest.mark.parametrize(("writer", "least"), [("nbdcopy", 0.6), ("qemu-img convert", 0.85), ("blockdev-backup", 0.85)])
def test_sink(
    nbdkit: Callable[..., AbstractContextManager[str]],
    daemon: Callable[..., Any],
    image: Path,
    tmp_path: Path,
    writer: str,
    least: float,
) -> None:
    address = NbdAddress(socket_path=str(tmp_path / "ours.sock"))
    qemu = daemon(disk=image)

    def write(target: NbdAddress) -> float:
        if writer == "nbdcopy":
            return seconds(["nbdcopy", "--allocated", str(image), str(target)])
        if writer == "qemu-img convert":
            return seconds(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), str(target)])
        qemu.events.clear()
        qemu.add_target("", target)
        start_s = time.monotonic()
        pace = {"max-workers": 4, "max-chunk": 262144}
        qemu.run(
            "blockdev-backup", job_id="job", device="disk", target="to-", sync="full", auto_dismiss=False, x_perf=pace
        )
        assert qemu.wait_concluded("job") is None
        taken_s = time.monotonic() - start_s
        qemu.run("blockdev-del", node_name="to-")
        return taken_s

    with ours(SINK, address.socket_path or ""), nbdkit("null", f"size={SIZE}") as uri:
        other = parse_uri(uri)
        _speed, ratio = compare(f"{writer} to the sink", lambda: write(address), lambda: write(other))
    assert ratio >= least
