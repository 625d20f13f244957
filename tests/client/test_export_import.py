"""``casbackup export`` and ``import``: files, pipes, names, external archivers, and everything that can go wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.formats.conftest import FACTS, vma_files

from .conftest import Casbackup, MiB

Start = Callable[..., subprocess.Popen[bytes]]
ARCHIVER = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name('example_archiver.py')))}"


@pytest.fixture
def backed(cb: Casbackup) -> Casbackup:
    """A repository with a snapshot of vm/100: two disks and a configuration."""
    conf = cb.folder / "100.conf"
    conf.write_bytes(b"cores: 2\nscsi0: local:vm-100-disk-0,size=6M\n")
    cb.disk("a.raw")
    cb.disk("b.raw", data_mib=0.3, size_mib=5, seed=1)
    disks = [f"scsi0={cb.folder / 'a.raw'}", f"scsi1={cb.folder / 'b.raw'}"]
    cb.ok("backup", "vm/100", *disks, "--config", conf, "--time", "2026-11-22T20:42:28Z")
    return cb


def fixture(folder: Path, name: str, as_name: str | None = None) -> Path:
    path = folder / (as_name or name)
    path.write_bytes(vma_files()[name])
    return path


# --- export


def test_a_folder_gets_a_file_with_the_name_that_qmrestore_wants(backed: Casbackup) -> None:
    folder = backed.folder / "dump"
    folder.mkdir()
    document = backed.json("export", "vm/100", folder, "--compress", "zstd")
    assert os.listdir(folder) == ["vzdump-qemu-100-2026_11_22-20_42_28.vma.zst"]
    assert document["target"] == str(folder / "vzdump-qemu-100-2026_11_22-20_42_28.vma.zst")
    assert (document["format"], document["compression"]) == ("vma", "zstd")
    assert [(d["disk"], d["name"], d["size_bytes"]) for d in document["disks"]] == [
        ("scsi0", "drive-scsi0", 6 * MiB),
        ("scsi1", "drive-scsi1", 5 * MiB),
    ]
    assert backed.fails(6, "export", "vm/100", folder, "--compress", "zstd")["code"] == "target-exists"
    backed.ok("export", "vm/100", folder, "--compress", "zstd", "--force")
    assert "vzdump" in backed.ok("export", "vm/100", folder, "--compress", "gzip").text
    assert backed.json("export", "vm/100", folder, "--tar")["target"].endswith("/100-2026_11_22-20_42_28.tar")


def test_the_ending_of_the_target_tells_the_format(backed: Casbackup) -> None:
    for name, kind, compression, disks in [
        ("x.vma", "vma", "none", []),
        ("x.VMA.gz", "vma", "gzip", []),
        ("x.tar.zst", "tar", "zstd", []),
        ("x.qcow2", "qcow2", "none", ["--disk", "scsi0"]),
        ("x.vmdk", "vmdk", "none", ["--disk", "scsi1"]),
        ("x.raw", "raw", "none", ["--disk", "scsi1"]),
        ("x.casarch", "stream", "none", []),
    ]:
        result = backed("export", "vm/100", backed.folder / name, *disks, "--json")
        assert result.status == 0, result.err
        assert (result.json["format"], result.json["compression"]) == (kind, compression)
        assert result.json["left_out"] == (["100.conf"] if disks else [])
        assert ("config 100.conf is not in it" in result.err) == bool(disks)
    assert (backed.folder / "x.raw").read_bytes() == (backed.folder / "b.raw").read_bytes()


def test_standard_output(backed: Casbackup) -> None:
    archive = backed.ok("export", "vm/100", "-").out
    path = backed.folder / "x.vma"
    backed.ok("export", "vm/100", path)
    assert archive == path.read_bytes()
    assert backed.fails(2, "export", "vm/100", "-")["code"] == "usage"


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        ([], 2, "usage"),
        (["x.vma", "--exec", "true"], 2, "usage"),
        (["x.vma", "--compress", "rar"], 2, "usage"),
        (["x.zip"], 5, "archive-unknown"),
        (["x.vma", "--format", "zip"], 5, "archive-unknown"),
        (["x.bz2", "--vma"], 2, "usage"),
        (["x.qcow2"], 2, "archive-limit"),
        (["x.vma", "-o", "level=1"], 2, "usage"),
        (["x.qcow2", "--disk", "scsi0", "-o", "compression=rar"], 2, "usage"),
        (["x.qcow2.zst", "--disk", "scsi0", "-o", "compression=zlib"], 5, "archive-unsupported"),
        (["x.vma", "--disk", "sda"], 14, "snapshot-not-found"),
        (["no/folder/x.vma"], 6, "target-unsuitable"),
        (["/dev/full", "--vma"], 7, "target-full"),
        (["--exec", "true", "--vma"], 2, "usage"),
    ],
)
def test_exports_that_cannot_be(
    backed: Casbackup, arguments: list[str], status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(os.listdir(backed.folder))
    monkeypatch.chdir(backed.folder)
    assert backed.fails(status, "export", "vm/100", *arguments)["code"] == code
    assert sorted(os.listdir(backed.folder)) == before, "nothing is left behind"


def test_a_reader_that_goes_away(backed: Casbackup, start: Start) -> None:
    for options in ([], ["--compress", "zstd"], ["--compress", "gzip"]):
        reader, writer = os.pipe()
        os.close(reader)
        process = start("export", "vm/100", "-", *options, stdout=writer)
        os.close(writer)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 141
        assert err.startswith(b"casbackup: ")
        assert b"Traceback" not in err


def test_damage_leaves_nothing_behind(backed: Casbackup) -> None:
    for pack in (backed.repository / "packs").rglob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(data)
    before = sorted(os.listdir(backed.folder))
    error = backed.fails(4, "export", "vm/100", backed.folder / "x.vma")
    assert error["code"] == "blob-damaged"
    assert sorted(os.listdir(backed.folder)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_stopped(backed: Casbackup, start: Start, number: signal.Signals) -> None:
    """Nobody reads, so it waits within a write."""
    backed.disk("c.raw", data_mib=16, size_mib=16, seed=7)
    backed.ok("backup", "vm/200", f"scsi0={backed.folder / 'c.raw'}")
    process = start("export", "vm/200", "-")
    assert process.stdout is not None
    process.stdout.read(1)
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(30) == 130
    process.communicate()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(backed: Casbackup) -> None:
    with small_disk(backed.folder / "small", "1m") as folder:
        assert backed.fails(7, "export", "vm/100", folder)["code"] == "target-full"
        assert os.listdir(folder) == []
        archive = backed.folder / "x.vma"
        backed.ok("export", "vm/100", archive)
        error = backed.fails(6, "archive", "extract", archive, folder / "out")
        assert error["code"] == "target-unwritable"
        assert os.listdir(folder / "out") == []


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_repository(bare: Casbackup) -> None:
    source = bare.disk("big.raw", data_mib=12, size_mib=12)
    archive = bare.folder / "x.vma"
    bare.ok("archive", "convert", source, archive)
    with small_disk(bare.folder / "small", "8m") as folder:
        repository = folder / "repository"
        bare.ok("init", "-r", repository)
        assert bare.fails(7, "import", "vm/1", archive, "-r", repository)["code"] == "repository-full"
        assert bare.json("snapshots", "-r", repository) == {"snapshots": []}


# --- import


def test_what_was_exported_is_imported(backed: Casbackup) -> None:
    archive = backed.folder / "x.vma.zst"
    backed.ok("export", "vm/100", archive)
    document = backed.json("import", "vm/300", archive, "--label", "moved", "--notes", "n")
    snapshot = document["snapshot"]
    assert (document["format"], document["missing"], document["damage"]) == ("vma", [], None)
    assert (snapshot["vm"], snapshot["time"]) == ("vm/300", "2026-11-22T20:42:28.000Z")
    assert (snapshot["labels"], snapshot["notes"]) == (["moved"], "n")
    assert [disk["name"] for disk in snapshot["disks"]] == ["scsi0", "scsi1"]
    assert [disk["source"] for disk in snapshot["disks"]] == [str(archive)] * 2
    assert snapshot["stats"]["new_chunks"] == 0
    roots = [d["root"] for d in backed.json("show", "vm/100")["snapshot"]["disks"]]
    assert [d["root"] for d in snapshot["disks"]] == roots
    before = backed.ok("export", "vm/100", "-").out
    assert backed.ok("export", "vm/300", "-").out == before
    assert backed.ok("dump", "vm/300", "--config", "qemu-server.conf").text.startswith("cores: 2\n")


def test_the_vm_is_told_from_the_name_or_the_content(cb: Casbackup) -> None:
    named = fixture(cb.folder, "tiny.vma", "vzdump-qemu-4711-2026_11_22-20_42_28.vma")
    assert cb.json("import", named)["snapshot"]["vm"] == "vm/4711"
    unnamed = fixture(cb.folder, "basic.vma", "x.vma")
    result = cb("import", unnamed, "--json")
    conf = cb.ok("archive", "config", unnamed).text
    if "vm-" in conf:
        assert result.status == 0
    else:
        assert result.error["code"] == "usage"
        assert "vm/100" in result.error["message"]


def test_standard_input(backed: Casbackup, start: Start) -> None:
    for name, options in [("x.vma", []), ("x.vma.gz", ["--compress", "gzip"]), ("x.tar", [])]:
        path = backed.folder / name
        backed.ok("export", "vm/100", path, *options)
        with path.open("rb") as file:
            process = start("import", "vm/400", "-", "--json", stdin=file)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert json.loads(out)["snapshot"]["disks"][0]["source"] == "stdin"
    with (backed.folder / "x.vma").open("rb") as file:
        pipe = start("import", "vm/500", "-", stdin=subprocess.PIPE)
        _, err = pipe.communicate(file.read(), timeout=60)
    assert (pipe.returncode, err) == (0, b"")


@pytest.mark.parametrize("length", [0, 100, 12_287, 12_800, 100_000, 316_927])
def test_truncated_input(cb: Casbackup, start: Start, length: int) -> None:
    data = vma_files()["basic.vma"]
    process = start("import", "vm/1", "-", "--json", stdin=subprocess.PIPE)
    out, err = process.communicate(data[:length], timeout=60)
    error = json.loads(err)["error"]
    assert out == b""
    assert error["code"] in ("archive-unknown", "archive-damaged", "archive-incomplete")
    assert process.returncode == error["exit_status"] != 0
    assert cb.json("snapshots") == {"snapshots": []}


def test_incomplete_archives(cb: Casbackup) -> None:
    path = fixture(cb.folder, "damaged/missing-ext0.vma", "x.vma")
    assert cb.fails(3, "import", "vm/1", path)["code"] == "archive-incomplete"
    assert cb.json("snapshots") == {"snapshots": []}
    result = cb("import", "vm/1", path, "--allow-incomplete", "--json")
    assert (result.status, result.error["code"]) == (3, "archive-losses")
    document = result.json
    assert document["missing_bytes"] == sum(gap["length_bytes"] for gap in document["missing"]) > 0
    shown = cb.json("show", "vm/1")["snapshot"]
    assert shown["archive"]["missing"] == document["missing"]
    truncated = cb.folder / "y.vma"
    truncated.write_bytes(vma_files()["basic.vma"][:200_000])
    result = cb("import", "vm/2", truncated, "--allow-incomplete", "--json")
    assert result.status == 3
    assert result.json["damage"]
    text = cb("import", "vm/2", truncated, "--allow-incomplete")
    assert "missing: " in text.text
    assert "not read to its end" in text.err


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 5, "archive-unknown"),
        (b"hello, world\n", 5, "archive-unknown"),
        (bytes(100_000), 5, "archive-unknown"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 100, 4, "archive-damaged"),
        (b"VMA\0" + bytes(20_000), 4, "archive-damaged"),
        (b"VMA\0\0\0\0\1" + bytes(48) + b"\x7f\xff\xff\x00" + bytes(20_000), 5, "archive-unsupported"),
    ],
)
def test_what_is_no_archive(cb: Casbackup, content: bytes, status: int, code: str) -> None:
    path = cb.folder / "x"
    path.write_bytes(content)
    assert cb.fails(status, "import", "vm/1", path)["code"] == code
    assert cb.json("snapshots") == {"snapshots": []}
    assert cb.json("sessions") == {"sessions": []}


def test_a_header_that_claims_two_gigabytes(cb: Casbackup, start: Start) -> None:
    data = b"VMA\0\0\0\0\1" + bytes(48) + b"\x7f\xff\xff\x00"
    process = start("import", "vm/1", "-", "--json", stdin=subprocess.PIPE)
    _, err = process.communicate(data + bytes(2 * MiB), timeout=60)
    assert json.loads(err)["error"]["code"] == "archive-unsupported"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "usage"),
        (["vm/1", "x", "y"], "usage"),
        (["web", "x.vma"], "invalid-name"),
        (["vm/1", "missing.vma"], "source-not-found"),
        (["vm/1", "/"], "source-unreadable"),
        (["vm/1", "x", "--label", "a b"], "invalid-name"),
        (["vm/1", "--exec", "true", "--format", "vma"], "usage"),
        (["vm/1", "--exec", " "], "usage"),
        (["vm/1", "x", "--format", "zip"], "archive-unknown"),
    ],
)
def test_imports_that_make_no_sense(
    cb: Casbackup, arguments: list[str], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cb.folder)
    (cb.folder / "x").write_bytes(b"")
    result = cb("import", *arguments, "--json")
    assert result.status != 0
    assert result.error["code"] == code


def test_a_kill_in_the_middle_leaves_no_snapshot(cb: Casbackup, start: Start) -> None:
    source = cb.disk("big.raw", data_mib=24, size_mib=24)
    archive = cb.folder / "x.vma"
    cb.ok("archive", "convert", source, archive)
    data = archive.read_bytes()
    process = start("import", "vm/1", "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(data[: len(data) * 3 // 4])
    process.stdin.flush()
    time.sleep(0.5)
    process.kill()
    process.communicate()
    assert cb.json("snapshots") == {"snapshots": []}
    cb.ok("check", "--read-data")
    cb.ok("import", "vm/1", archive)
    assert cb.ok("dump", "vm/1", "big").out == source.read_bytes()


def test_an_interrupted_import_can_be_resumed(cb: Casbackup, start: Start) -> None:
    data = vma_files()["basic.vma"]
    process = start("import", "vm/1", "-", "--json", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(data[:250_000])
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while not list((cb.repository / "locks").glob("session-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    error = json.loads(err)["error"]
    assert (process.returncode, error["code"]) == (130, "interrupted")
    cb.ok("import", "vm/1", fixture(cb.folder, "basic.vma"), "--resume", error["session"])
    assert cb.json("sessions") == {"sessions": []}


# --- external archivers


def test_an_external_archiver_stores_and_fetches(backed: Casbackup) -> None:
    folder = backed.folder / "kept"
    document = backed.json("export", "vm/100", "--exec", f"{ARCHIVER} store {folder}")
    assert document["format"] == "stream"
    assert sorted(os.listdir(folder)) == ["0.disk", "1.disk", "head.json"]
    assert (folder / "0.disk").read_bytes() == (backed.folder / "a.raw").read_bytes()
    snapshot = backed.json("import", "vm/600", "--exec", f"{ARCHIVER} fetch {folder}")["snapshot"]
    assert snapshot["stats"]["new_chunks"] == 0
    assert [disk["name"] for disk in snapshot["disks"]] == ["scsi0", "scsi1"]
    assert backed.ok("dump", "vm/600", "--config", "100.conf").text.startswith("cores: 2")


def test_an_external_archiver_that_fails(backed: Casbackup) -> None:
    for command, text in [
        ("exit 3", "exit status 3"),
        ("cat > /dev/null; echo tape is full >&2; exit 1", "tape is full"),
        ("head -c 100 > /dev/null; echo broken >&2; exit 9", "broken"),
        ("head -c 100 > /dev/null", "ended before the stream did"),
        ("no-such-program-here", "exit status 127"),
        ("kill -9 $$", "SIGKILL"),
    ]:
        backed.disk("c.raw", data_mib=2, size_mib=2, seed=3)
        error = backed.fails(5, "export", "vm/100", "--exec", command)
        assert error["code"] == "tool-failed"
        assert text in error["message"]


def test_an_external_archiver_that_fails_to_fetch(backed: Casbackup) -> None:
    stream = backed.folder / "x.casarch"
    backed.ok("export", "vm/100", stream)
    before = backed.json("snapshots")
    for command, code, text in [
        ("exit 3", "tool-failed", "exit status 3"),
        ("true", "archive-damaged", "ends within"),
        (f"cat {stream}; echo tape torn >&2; exit 1", "tool-failed", "tape torn"),
        (f"head -c 5000 {stream}", "archive-damaged", "ends"),
        (f"{ARCHIVER} fetch {backed.folder}/nowhere", "tool-failed", "No such file"),
    ]:
        result = backed("import", "vm/700", "--exec", command, "--json")
        assert (result.status, result.error["code"]) == (result.error["exit_status"], code)
        assert text in result.error["message"]
    assert backed.json("snapshots") == before


def test_an_archiver_is_told_when_the_export_fails(backed: Casbackup) -> None:
    for pack in (backed.repository / "packs").rglob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(data)
    folder = backed.folder / "kept"
    said = backed.folder / "said"
    error = backed.fails(4, "export", "vm/100", "--exec", f"{ARCHIVER} store {folder} 2> {said}")
    assert error["code"] == "blob-damaged"


def test_an_archiver_that_hangs_is_stopped_with_the_export(backed: Casbackup, start: Start) -> None:
    process = start("export", "vm/100", "--exec", "echo started; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


# --- the reference program, where it is installed


@pytest.mark.skipif(shutil.which("vma") is None, reason="the vma program is not installed")
def test_the_reference_program_extracts_what_is_exported(backed: Casbackup) -> None:
    archive = backed.folder / "x.vma"
    backed.ok("export", "vm/100", archive)
    out = backed.folder / "out"
    subprocess.run(["vma", "extract", archive, out], check=True, capture_output=True)
    assert (out / "disk-drive-scsi0.raw").read_bytes() == (backed.folder / "a.raw").read_bytes()


def test_there_are_fixtures() -> None:
    assert len(FACTS["sound"]) > 10
