"""QEMUs under test: a storage daemon for most, and a guest of one boot sector where a real one is needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from casbackup.block.device import Closing
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.uri import NbdAddress
from casbackup.errors import QmpUnreachable
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import Mode

MiB = 1024 * 1024
KiB = 1024
BOOT_SECTOR = Path(__file__).parent / "fixtures" / "writer.bin"
_STEP = 0x9E3779B1
_INVERSE = pow(_STEP, -1, 2**32)
GUEST_DISK_BYTES = 64 * MiB


def need(program: str) -> str:
    """The path of a program; without it the test is skipped."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


def newer(program: str) -> str:
    """A program of the newer QEMU; without one the test is skipped."""
    folder = os.environ.get("CASBACKUP_QEMU_NEWER")
    if not folder:
        pytest.skip("CASBACKUP_QEMU_NEWER names no folder of a newer QEMU (scripts/fetch_newer_qemu.sh)")
    return str(Path(folder) / program)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="cbq-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Process:
    """A QEMU of ours, ended by its id at the end."""

    mode = Mode.PUSH
    """In which it is to be backed up."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.qmp_path = str(folder / "qmp.sock")
        self._log = (folder / "log").open("wb")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)
        self._wait_for_socket(folder)

    def _wait_for_socket(self, folder: Path) -> None:
        deadline = time.monotonic() + 20
        while not os.path.exists(self.qmp_path):
            assert self.process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "QEMU does not start"
            time.sleep(0.005)
        while True:  # the name is there a moment before somebody listens
            with contextlib.suppress(QmpUnreachable), self.qmp():
                return
            assert time.monotonic() < deadline, "QEMU does not answer"

    def qmp(self) -> QmpClient:
        return QmpClient.connect(self.qmp_path)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def quit(self) -> None:
        """End it properly, so that it saves its persistent bitmaps."""
        self.process.terminate()
        self.process.wait(20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()
        self._log.close()


class Daemon(Process):
    """A qemu-storage-daemon whose disks are written to through NBD, as a guest would."""

    def __init__(self, folder: Path, disks: dict[str, Path], image_format: str = "raw") -> None:
        self.folder = folder
        self.disks = disks
        self.image_format = image_format
        self._nbd = str(folder / "nbd.sock")
        for name in ("qmp.sock", "nbd.sock"):
            (folder / name).unlink(missing_ok=True)
        command = [need("qemu-storage-daemon"), "--chardev", f"socket,id=m,path={folder}/qmp.sock,server=on,wait=off"]
        command += ["--monitor", "chardev=m", "--nbd-server", f"addr.type=unix,addr.path={self._nbd},max-connections=0"]
        for name, path in disks.items():
            command += ["--blockdev", f"driver=file,node-name={name}-file,filename={path},discard=unmap"]
            command += ["--blockdev", f"driver={image_format},node-name={name},file={name}-file"]
            command += ["--export", f"type=nbd,id=e-{name},node-name={name},name={name},writable=on"]
        super().__init__(folder, command)

    def guest(self, disk: str) -> NbdClient:
        """The disk as the guest sees it."""
        return self.guest_of(disk)()

    def guest_of(self, disk: str) -> Callable[[], NbdClient]:
        """What opens it, in any process."""
        return partial(NbdClient.connect, NbdAddress(export=disk, socket_path=self._nbd), max_connections=1)


class Vm(Process):
    """A VM with two disks that does nothing by itself: tests write to its disks, as its devices would."""

    mode = Mode.PULL

    def __init__(self, folder: Path, disks: dict[str, Path], extra: list[str] | None = None) -> None:
        self.folder = folder
        self.disks = disks
        command = [newer("qemu-system-x86_64"), "-M", "pc", "-m", "16", "-accel", "tcg", "-display", "none", "-S"]
        command += ["-nodefaults", "-qmp", f"unix:{folder}/qmp.sock,server=on,wait=off"]
        command += ["-qmp", f"unix:{folder}/writer.sock,server=on,wait=off"]
        for name, path in disks.items():
            command += ["-blockdev", f"driver=file,node-name={name}-file,filename={path},discard=unmap"]
            command += ["-blockdev", f"driver=raw,node-name=disk-{name},file={name}-file,discard=unmap"]
            command += ["-device", f"virtio-blk-pci,drive=disk-{name},id={name}"]
        super().__init__(folder, command + (extra or []))
        self._writer = str(folder / "writer.sock")

    @property
    def errors(self) -> int:
        """Of writes that a guest would have seen fail."""
        return (self.folder / "log").read_text(errors="replace").count("failed")

    def guest(self, disk: str) -> VmDisk:
        return self.guest_of(disk)()

    def guest_of(self, disk: str) -> Callable[[], VmDisk]:
        """What opens it, in any process."""
        return partial(VmDisk, self._writer, disk)


class VmDisk(Closing):
    """One disk of a ``Vm``, written to through the device's own block backend."""

    def __init__(self, path: str, disk: str) -> None:
        self._qmp = QmpClient.connect(path)
        self._device = f"/machine/peripheral/{disk}/virtio-backend"

    def write(self, offset: int, data: bytes) -> None:
        """The bytes must all be the same."""
        assert data.count(data[0]) == len(data)
        self._run(f"write -q -P {data[0]} {offset} {len(data)}")

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._run(f"write -q -z {'-u ' if may_trim else ''}{offset} {length}")

    def close(self) -> None:
        self._qmp.close()

    def _run(self, command: str) -> None:
        line = f'qemu-io -d {self._device} "{command}"'
        self._qmp.execute("human-monitor-command", {"command-line": line})


class BootGuest(Process):
    """A VM that writes a deterministic log to two disks in turn, as fast as it can."""

    def __init__(
        self, folder: Path, extra: list[str] | None = None, werror: str = "report", program: str | None = None
    ) -> None:
        """``extra``: arguments. Disks that are in the folder already are used as they are."""
        self.folder = folder
        self.serial = folder / "serial"
        boot = folder / "boot.raw"
        boot.write_bytes(BOOT_SECTOR.read_bytes().ljust(1 * MiB, b"\0"))
        command = [program or need("qemu-system-x86_64"), "-M", "pc", "-m", "16", "-accel", "tcg", "-display", "none"]
        command += [
            "-nodefaults",
            "-serial",
            f"file:{self.serial}",
            "-qmp",
            f"unix:{folder}/qmp.sock,server=on,wait=off",
        ]
        command += ["-blockdev", f"driver=file,node-name=boot-file,filename={boot}"]
        command += ["-blockdev", "driver=raw,node-name=boot,file=boot-file,read-only=on"]
        command += ["-device", "virtio-blk-pci,drive=boot,id=boot,bootindex=1"]
        for name in ("a", "b"):
            path = folder / f"{name}.raw"
            if not path.exists():
                path.write_bytes(b"")
                os.truncate(path, GUEST_DISK_BYTES)
            command += ["-blockdev", f"driver=file,node-name={name}-file,filename={path}"]
            command += ["-blockdev", f"driver=raw,node-name=disk-{name},file={name}-file"]
            command += ["-device", f"virtio-blk-pci,drive=disk-{name},id=virtio-{name},werror={werror}"]
        super().__init__(folder, command + (extra or []))

    def written(self) -> int:
        """How many writes the guest has told of."""
        lines = self.serial.read_text(errors="replace").split() if self.serial.exists() else []
        numbers = [line for line in lines if len(line) == 8]
        return int(numbers[-1], 16) if numbers else 0

    @property
    def errors(self) -> int:
        """I/O errors that the guest has seen."""
        return self.serial.read_text(errors="replace").count("E0")

    def wait_written(self, count: int, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while self.written() < count:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, f"the guest wrote {self.written()} blocks only"
            time.sleep(0.02)


def replay(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Both disks of a boot guest after its first ``count`` writes, as bytes."""
    disks = [np.zeros((GUEST_DISK_BYTES // 4096, 1024), dtype=np.uint32) for _ in range(2)]
    words = np.arange(1024, dtype=np.uint32)
    for number in range(count):
        start = np.uint32(number * _STEP % 2**32)
        disks[number & 1][int(start) >> 18] = words + start
    return disks[0].view(np.uint8).reshape(-1), disks[1].view(np.uint8).reshape(-1)


def writes_in(first: bytes, second: bytes) -> int:
    """How many writes of the log two disks hold, if they are a prefix of it."""
    last = -1
    for content in (first, second):
        heads = np.frombuffer(content, dtype=np.uint32).reshape(-1, 1024)[:, 0].astype(np.uint64)
        if heads.any():
            numbers = heads[heads != 0] * np.uint64(_INVERSE) % np.uint64(2**32)
            last = max(last, int(numbers.max()))
    # Write 0 has the block of zeros 0, 1, 2 … whose first word is zero: it is there whenever anything is.
    return last + 1


def assert_prefix(first: bytes, second: bytes) -> int:
    """Both disks hold exactly the first N writes of the log. Returns N."""
    count = writes_in(first, second)
    expected = replay(count)
    for content, wanted in zip((first, second), expected, strict=True):
        assert np.array_equal(np.frombuffer(content, dtype=np.uint8), wanted), f"not the first {count} writes"
    return count


class Gathering:
    """A consumer that makes images of what it is given, and notices what comes twice."""

    def __init__(self, sizes: list[int]) -> None:
        self.disks = [bytearray(size) for size in sizes]
        self.covered = [np.zeros(-(-size // 512), dtype=np.uint8) for size in sizes]
        self.events = 0

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        self.disks[int(disk)][offset : offset + len(data)] = data
        self._cover(int(disk), offset, len(data))

    def zero(self, disk: str, offset: int, length: int) -> None:
        self.disks[int(disk)][offset : offset + length] = bytes(length)
        self._cover(int(disk), offset, length)

    def _cover(self, disk: int, offset: int, length: int) -> None:
        self.events += 1
        self.covered[disk][offset // 512 : -(-(offset + length) // 512)] += 1

    @property
    def each_once(self) -> bool:
        return all(bool((covered == 1).all()) for covered in self.covered)


def assert_clean(qmp: QmpClient, *, bitmaps: int = 0) -> None:
    """Nothing of ours is left in QEMU but ``bitmaps`` on each disk that has any."""
    assert not [job for job in qmp.execute("query-jobs") if job["id"].startswith("casbackup")]
    for node in qmp.execute("query-named-block-nodes"):
        assert not node.get("node-name", "").startswith("casbackup"), node
        ours = [b["name"] for b in node.get("dirty-bitmaps", ()) if b.get("name", "").startswith("casbackup")]
        assert len(ours) in {0, bitmaps}, ours
    assert not [e for e in qmp.execute("query-block-exports") if e["id"].startswith("casbackup")]


def two_disks(place: Path) -> dict[str, Path]:
    """Files of 32 MiB with some data."""
    disks = {}
    for name in ("a", "b"):
        path = place / f"{name}.raw"
        path.write_bytes(os.urandom(1 * MiB) * 8)
        os.truncate(path, 32 * MiB)
        disks[name] = path
    return disks


@pytest.fixture
def daemon(place: Path) -> Iterator[Daemon]:
    """A storage daemon with two disks of 32 MiB."""
    made = Daemon(place, two_disks(place))
    with contextlib.closing(made):
        yield made


@pytest.fixture
def guest(place: Path) -> Iterator[BootGuest]:
    """A boot guest that has begun to write."""
    made = BootGuest(place)
    with contextlib.closing(made):
        made.wait_written(64)
        yield made


@pytest.fixture
def newer_guest(place: Path) -> Iterator[BootGuest]:
    """The same in the newer QEMU, to be pulled from."""
    made = BootGuest(place, program=newer("qemu-system-x86_64"))
    made.mode = Mode.PULL
    with contextlib.closing(made):
        made.wait_written(64)
        yield made


@pytest.fixture
def vm(place: Path) -> Iterator[Vm]:
    """A VM with two disks of 32 MiB, to be pulled from."""
    made = Vm(place, two_disks(place))
    with contextlib.closing(made):
        yield made


@pytest.fixture(params=["push", "pull"])
def running(request: pytest.FixtureRequest) -> BootGuest:
    """A boot guest, to be backed up in both modes."""
    made = request.getfixturevalue("guest" if request.param == "push" else "newer_guest")
    assert isinstance(made, BootGuest)
    return made


@pytest.fixture(params=["push", "pull"])
def idle(request: pytest.FixtureRequest) -> Daemon | Vm:
    """Disks that only tests write to, to be backed up in both modes."""
    made = request.getfixturevalue("daemon" if request.param == "push" else "vm")
    assert isinstance(made, Daemon | Vm)
    return made
