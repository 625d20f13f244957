"""Snapshots served over NBD, to the programs that people use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from casbackup.block.device import read_bytes
from casbackup.block.nbd.client import NbdClient
from casbackup.errors import NbdRequestFailed
from tests.boot_guest import BOOT_DISK, BootGuest, check_prefix

from .conftest import Casbackup, MiB
from .serving import document_of, ended

Start = Callable[..., subprocess.Popen[bytes]]
Serve = Callable[..., tuple[subprocess.Popen[bytes], dict[str, str]]]


@pytest.fixture
def serve(start: Start) -> Iterator[Serve]:
    """Starts ``nbd-serve REFERENCE OPTIONS``; gives the process, and the URI of each disk."""
    processes: list[subprocess.Popen[bytes]] = []
    folder = tempfile.mkdtemp(prefix="cb-")  # a path that is short enough for sockets

    def run(*arguments: object) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
        listen = [] if "--listen" in arguments else ["--listen", f"unix:{folder}/{len(processes)}"]
        processes.append(start("nbd-serve", *arguments, *listen, "--json"))
        document = document_of(processes[-1])
        return processes[-1], {export["disk"]: export["uri"] for export in document["exports"]}

    yield run
    for process in processes:
        process.kill()
        process.communicate()
    shutil.rmtree(folder)


@pytest.fixture
def two_disks(cb: Casbackup) -> dict[str, bytes]:
    """What the disks of vm/100 hold: one of data, a hole and data that is there twice, and a small one."""
    source = random.Random(4)
    data = source.randbytes(6 * MiB)
    contents = {
        "scsi0": data + bytes(40 * MiB) + data + source.randbytes(12_800),
        "scsi1": source.randbytes(300 * 1024),
    }
    for name, content in contents.items():
        (cb.folder / name).write_bytes(content)
    (cb.folder / "100.conf").write_text("cores: 2\n")
    disks = [f"{name}={cb.folder / name}" for name in contents]
    cb.ok("backup", "vm/100", *disks, "--format", "raw", "--config", cb.folder / "100.conf", "-q")
    return contents


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_programs_see(cb: Casbackup, two_disks: dict[str, bytes], serve: Serve) -> None:
    need("nbdinfo", "nbdcopy")
    process, uris = serve("vm/100")
    info = json.loads(run("nbdinfo", "--json", uris["scsi0"]))["exports"][0]
    reference = cb.json("show", "vm/100")["snapshot"]["reference"]
    assert (info["export-size"], info["description"]) == (len(two_disks["scsi0"]), reference)
    assert info["is_read_only"] and info["can_multi_conn"] and "base:allocation" in info["contexts"]
    zeros = [e for e in json.loads(run("nbdinfo", "--json", "--map", uris["scsi0"])) if e["type"] == 3]
    assert [(zero["offset"], zero["length"]) for zero in zeros] == [(6 * MiB, 40 * MiB)]
    for name, content in two_disks.items():
        copy = cb.folder / f"{name}.copy"
        run("nbdcopy", uris[name], copy)
        assert copy.read_bytes() == content
    assert ended(process) == (0, "", "")


@pytest.mark.qemu
def test_qemu_img_sees_the_same_disk(cb: Casbackup, two_disks: dict[str, bytes], serve: Serve) -> None:
    need("qemu-img")
    _process, uris = serve("vm/100", "--disk", "scsi0", "--listen", "127.0.0.1:0")
    assert list(uris) == ["scsi0"] and uris["scsi0"].startswith("nbd://127.0.0.1:")
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uris["scsi0"], cb.folder / "scsi0")
    info = json.loads(run("qemu-img", "info", "--output=json", uris["scsi0"]))
    assert (info["format"], info["virtual-size"]) == ("raw", len(two_disks["scsi0"]))
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uris["scsi0"], cb.folder / "converted")
    assert (cb.folder / "converted").read_bytes() == two_disks["scsi0"]


def test_libnbd(two_disks: dict[str, bytes], serve: Serve) -> None:
    """Many reads at once, on several connections, in an order of libnbd's own."""
    if subprocess.run(["/usr/bin/python3", "-c", "import nbd"], capture_output=True).returncode != 0:
        pytest.skip("libnbd's Python binding is not installed")
    program = """
import hashlib, nbd, sys
handles = [nbd.NBD() for _ in range(3)]
for handle in handles:
    handle.connect_uri(sys.argv[1])
size, step = handles[0].get_size(), 100_000
buffers = [nbd.Buffer(min(step, size - at)) for at in range(0, size, step)]
cookies = [handles[n % 3].aio_pread(buffer, n * step) for n, buffer in enumerate(buffers)]
for handle in handles:
    while handle.aio_in_flight():
        handle.poll(-1)
assert all(handles[n % 3].aio_command_completed(cookie) for n, cookie in enumerate(cookies))
print(hashlib.sha256(b"".join(buffer.to_bytearray() for buffer in buffers)).hexdigest())
"""
    _process, uris = serve("vm/100")
    printed = run("/usr/bin/python3", "-c", program, uris["scsi0"])
    assert printed.strip() == hashlib.sha256(two_disks["scsi0"]).hexdigest()


def test_clients_that_speak_nonsense_cost_their_own_connection(two_disks: dict[str, bytes], serve: Serve) -> None:
    process, uris = serve("vm/100")
    path = uris["scsi1"].partition("socket=")[2]
    flags, option = (3).to_bytes(4, "big"), b"IHAVEOPT" + (7).to_bytes(4, "big") + b"\xff\xff\xff\xff"
    with NbdClient.connect(uris["scsi1"]) as client:
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", bytes(100), flags + b"\xff" * 100, flags + option):
            with socket.socket(socket.AF_UNIX) as stream:
                stream.connect(path)
                stream.sendall(nonsense)
                stream.settimeout(20)
                with contextlib.suppress(ConnectionResetError):
                    while stream.recv(4096):
                        pass
        assert read_bytes(client, 0, client.size_bytes) == two_disks["scsi1"]
    status, _out, err = ended(process)
    assert status == 0 and len(err.splitlines()) == 4
    assert all(line.startswith("casbackup: a local client: ") for line in err.splitlines())


def test_clients_that_only_look_are_no_news(history: Casbackup, serve: Serve) -> None:
    need("nbdinfo")
    process, uris = serve("vm/100")
    path = uris["scsi0"].partition("socket=")[2]
    assert subprocess.run(["nbdinfo", f"nbd+unix:///x?socket={path}"], capture_output=True).returncode == 1
    assert "scsi0" in run("nbdinfo", "--list", f"nbd+unix:///?socket={path}")
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(path)
    run("nbdinfo", "--size", uris["scsi0"])
    assert ended(process) == (0, "", "")


def test_the_snapshot_stays_while_it_is_served(cb: Casbackup, two_disks: dict[str, bytes], serve: Serve) -> None:
    process, uris = serve("vm/100")
    (session,) = cb.json("sessions")["sessions"]
    assert (session["kind"], session["active"]) == ("reader", True)
    cb.ok("forget", "vm/100@latest", "-q")
    cb.ok("gc", "-q")
    with NbdClient.connect(uris["scsi0"]) as client:
        assert read_bytes(client, 0, client.size_bytes) == two_disks["scsi0"]
    assert ended(process, signal.SIGINT)[0] == 0
    assert cb.json("sessions") == {"sessions": []}


def test_damage_is_an_error_for_the_client_and_a_line_here(
    cb: Casbackup, two_disks: dict[str, bytes], serve: Serve
) -> None:
    pack = next((cb.repository / "packs").rglob("*.pack"))
    with open(pack, "r+b") as file:
        file.seek(MiB)
        file.write(bytes(1))
        file.seek(MiB)
        file.write(b"\x5a\xa5\x5a\xa5")
    content, lost = two_disks["scsi0"], 0
    process, uris = serve("vm/100")
    with NbdClient.connect(uris["scsi0"]) as client:
        for at in range(0, 6 * MiB, 64 * 1024):
            try:
                assert read_bytes(client, at, 64 * 1024) == content[at : at + 64 * 1024]
            except NbdRequestFailed:
                lost += 1
    status, _out, err = ended(process)
    assert status == 0 and 1 <= lost <= 6
    assert err.count(" cannot be read: ") == lost and err.startswith("casbackup: scsi0: 65536 bytes at ")


def test_a_server_that_is_killed_leaves_nothing_that_matters(
    cb: Casbackup, two_disks: dict[str, bytes], serve: Serve
) -> None:
    process, uris = serve("vm/100", "--writable")
    path = uris["scsi0"].partition("socket=")[2]
    process.kill()
    process.wait()
    assert [session["active"] for session in cb.json("sessions")["sessions"]] == [False]
    _again, uris = serve("vm/100", "--listen", f"unix:{path}")
    with NbdClient.connect(uris["scsi1"]) as client:
        assert read_bytes(client, 0, client.size_bytes) == two_disks["scsi1"]
    assert not cb.json("check", "--read-data")["damaged"]


def test_what_was_written_is_saved(cb: Casbackup, two_disks: dict[str, bytes], serve: Serve) -> None:
    expected = {name: bytearray(content) for name, content in two_disks.items()}
    process, uris = serve("vm/100", "--writable", "--save-as", "vm/fixed", "--overlay-folder", cb.folder)
    changes = [("scsi0", 10_001, b"x" * 5000), ("scsi0", 30 * MiB, b"y" * MiB), ("scsi1", 299 * 1024, b"z" * 1024)]
    for name, offset, data in changes:
        with NbdClient.connect(uris[name]) as client:
            client.write(offset, data)
            expected[name][offset : offset + len(data)] = data
            assert read_bytes(client, 0, client.size_bytes) == expected[name]
    with NbdClient.connect(uris["scsi0"]) as client:
        client.write_zeros(2 * MiB, MiB)
        expected["scsi0"][2 * MiB : 3 * MiB] = bytes(MiB)
    status, out, err = ended(process)
    saved = json.loads(out)["snapshot"]
    assert (status, err, saved["vm"]) == (0, "", "vm/fixed")
    assert saved["stats"]["read_bytes"] < 2 * MiB and [config["name"] for config in saved["configs"]] == ["100.conf"]
    for name in expected:
        assert cb.ok("dump", "vm/fixed", name).out == expected[name]
        assert cb.ok("dump", "vm/100", name).out == two_disks[name]
    assert not cb.json("check", "--read-data")["damaged"]


def test_without_save_as_what_was_written_is_gone(cb: Casbackup, two_disks: dict[str, bytes], serve: Serve) -> None:
    process, uris = serve("vm/100", "--writable")
    with NbdClient.connect(uris["scsi1"]) as client:
        client.write(0, b"gone")
    assert ended(process) == (0, "", "")
    assert len(cb.json("snapshots")["snapshots"]) == 1


def test_saving_is_tried_again_until_it_succeeds(cb: Casbackup, two_disks: dict[str, bytes], serve: Serve) -> None:
    process, uris = serve("vm/100", "--writable", "--save-as", "vm/fixed")
    with NbdClient.connect(uris["scsi1"]) as client:
        client.write(0, b"kept")
    sessions = cb.repository / "locks"
    away = sessions.rename(cb.repository / "away")
    sessions.write_bytes(b"")  # no session can be opened
    process.terminate()
    assert process.stderr is not None
    assert b"vm/fixed could not be saved: " in process.stderr.readline()
    assert b"SIGTERM tries again" in process.stderr.readline()
    sessions.unlink()
    away.rename(sessions)
    status, out, _err = ended(process)
    assert status == 0 and json.loads(out)["snapshot"]["vm"] == "vm/fixed"
    assert cb.ok("dump", "vm/fixed", "scsi1").out == b"kept" + two_disks["scsi1"][4:]


@pytest.mark.parametrize(
    ("status", "code", "arguments"),
    [
        (2, "usage", ["--save-as", "vm/200"]),
        (2, "usage", ["--listen", "nowhere"]),
        (2, "usage", ["--listen", "unix:"]),
        (2, "usage", ["--listen", "0.0.0.0:10809"]),
        (2, "usage", ["--tls-verify-clients"]),
        (2, "usage", ["--tls-certificates", "/nowhere"]),
        (2, "invalid-name", ["--writable", "--save-as", "100"]),
        (2, "invalid-value", ["--cache", "1MiB"]),
        (14, "snapshot-not-found", ["--disk", "scsi7"]),
        (6, "address-unusable", ["--listen", "unix:/nowhere/socket"]),
        (6, "address-unusable", ["--listen", "unix:/etc/hostname"]),
        (6, "target-unwritable", ["--writable", "--overlay-folder", "/nowhere"]),
    ],
)
def test_bad_input(history: Casbackup, status: int, code: str, arguments: list[str]) -> None:
    assert history.fails(status, "nbd-serve", "vm/100", *arguments)["code"] == code


# --- a guest that boots from the snapshot and moves to a disk of its own


def overlaid(folder: Path, exports: list[dict[str, Any]]) -> list[str]:
    """QEMU's options for a new qcow2 image on each of the exports."""
    options: list[str] = []
    for number, export in enumerate(exports, 1):
        name = export["disk"]
        run("qemu-img", "create", "-q", "-f", "qcow2", folder / f"{name}.qcow2", export["size_bytes"])
        options += export["qemu"].split(" ", 1)
        options += ["-blockdev", f"driver=file,node-name={name}-file,filename={folder / name}.qcow2"]
        options += ["-blockdev", f"driver=qcow2,node-name={name}-top,file={name}-file,backing={name}"]
        options += ["-device", f"virtio-blk-pci,drive={name}-top,bootindex={number}"]
    return options


def stream_away(qmp_path: Path, disks: list[str]) -> None:
    """Copy what is below the overlays into them, as the documentation says."""
    from casbackup.qemu.qmp import QmpClient

    with QmpClient.connect(str(qmp_path)) as qmp:
        for disk in disks:
            qmp.execute("block-stream", {"job-id": f"stream-{disk}", "device": f"{disk}-top"})
        deadline = time.monotonic() + 60
        while qmp.execute("query-block-jobs"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        nodes = {node["node-name"] for node in qmp.execute("query-named-block-nodes")}
        for disk in disks:
            if disk in nodes:
                qmp.execute("blockdev-del", {"node-name": disk})


@pytest.mark.qemu
def test_a_vm_boots_from_a_snapshot_and_moves_away(cb: Casbackup, start: Start) -> None:
    """Its disks end as the snapshot's with exactly its first writes over them, long after the server has gone."""
    need("qemu-system-x86_64", "qemu-img")
    source = random.Random(8)
    contents = {
        "boot": BOOT_DISK,
        "a": source.randbytes(3 * MiB) + bytes(61 * MiB),
        "b": bytes(61 * MiB) + source.randbytes(3 * MiB),
    }
    for name, content in contents.items():
        (cb.folder / name).write_bytes(content)
    cb.ok("backup", "vm/100", *(f"{name}={cb.folder / name}" for name in contents), "--format", "raw", "-q")
    with tempfile.TemporaryDirectory(prefix="cb-") as short:
        folder = Path(short)
        server = start("nbd-serve", "vm/100", "--listen", f"unix:{folder}/nbd", "--json")
        guest = BootGuest(folder, overlaid(folder, document_of(server)["exports"]))
        try:
            guest.wait_written(64)
            stream_away(guest.qmp_path, list(contents))
            assert ended(server) == (0, "", "")
            guest.wait_written(128)
            assert not guest.saw_errors()
            guest.process.terminate()  # properly, so that QEMU writes out what it knows of the images
            assert guest.process.wait(30) == 0
        finally:
            server.kill()
            guest.kill()
        for name in contents:
            run("qemu-img", "convert", "-O", "raw", folder / f"{name}.qcow2", cb.folder / f"{name}.after")
    after = {name: (cb.folder / f"{name}.after").read_bytes() for name in contents}
    assert after["boot"] == contents["boot"]
    assert check_prefix(after["a"], after["b"], (contents["a"], contents["b"])) >= 192
