"""The memory of a server that many read from at once: the peak of the whole process, with what it maps."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import urllib3

from casbackup.peer.http.address import parse_address
from casbackup.peer.http.rest import RestClient
from casbackup_client.main import main

from .conftest import NAME, ServerProcess

MiB = 2**20
MOST_KIB = 300 * 1000 * 1000 // 1024
"""Measured: 276 MB, 84 MB of it the server by itself, and 75 MB the two exports."""
VMS = 8
DISK_BYTES = 96 * MiB


def peak_kib(process: ServerProcess) -> int:
    assert process.process is not None
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


class Readers:
    """Threads that read until they are told to stop; ``failures`` is what they met."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self.done = {"range": 0, "export": 0, "busy": 0, "slow": 0}
        self._threads: list[threading.Thread] = []

    def start(self, work: object, *arguments: object) -> None:
        def guarded() -> None:
            try:
                while not self.stop.is_set():
                    work(*arguments)  # type: ignore[operator]
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        self._threads.append(thread)

    def join(self, seconds: float) -> None:
        self.stop.wait(seconds)
        self.stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_exports_and_ranges_at_once(process: ServerProcess, tmp_path: Path) -> None:
    """24 clients read ranges of 1 to 8 MiB of eight disks, 8 want exports, and 8 take their time with whole disks."""
    contents = []
    for number in range(VMS):
        contents.append(random.Random(number).randbytes(DISK_BYTES))
        (tmp_path / "disk.raw").write_bytes(contents[-1])
        source = f"scsi0={tmp_path / 'disk.raw'}"
        assert main(["-r", str(process.folder), "backup", f"vm/{number}", source, "-q"]) == 0
    api = f"http://127.0.0.1:{process.port}/v1/repositories/{NAME}/snapshots"
    http = urllib3.PoolManager(retries=False, maxsize=64, timeout=120)
    readers, choice = Readers(), random.Random(9)
    with RestClient(parse_address(process.url)) as client:
        snapshots = client.snapshots()

    def read_range() -> None:
        number = choice.randrange(VMS)
        size = choice.randrange(MiB, 8 * MiB)
        start = choice.randrange(DISK_BYTES - size)
        answer = http.request(
            "GET",
            f"{api}/{snapshots[number].id}/disks/scsi0",
            headers={"Range": f"bytes={start}-{start + size - 1}"},
        )
        if answer.status == 503:
            readers.done["busy"] += 1
            return
        assert answer.status == 206
        assert answer.data == contents[number][start : start + size]
        readers.done["range"] += 1

    def export(format_name: str) -> None:
        path = f"{api}/{choice.choice(snapshots).id}/export?format={format_name}&compress=zstd"
        answer = http.request("GET", path, preload_content=False)
        if answer.status == 503:
            answer.drain_conn()
            readers.done["busy"] += 1
            readers.stop.wait(0.1)
        else:
            assert answer.status == 200
            size = 0
            while piece := answer.read(MiB):
                size += len(piece)
            assert size > DISK_BYTES // 2
            readers.done["export"] += 1
        answer.release_conn()

    def take_time() -> None:
        answer = http.request("GET", f"{api}/{choice.choice(snapshots).id}/disks/scsi0", preload_content=False)
        if answer.status == 200:
            for _ in range(20):
                answer.read(64 * 1024)
                readers.stop.wait(0.1)
            readers.done["slow"] += 1
        answer.close()

    for _ in range(24):
        readers.start(read_range)
    for number in range(8):
        readers.start(export, ("vma", "tar")[number % 2])
    for _ in range(8):
        readers.start(take_time)
    readers.join(20)
    assert readers.failures == []
    assert all(readers.done.values()), readers.done
    peak = peak_kib(process)
    assert peak < MOST_KIB, (peak, readers.done)
