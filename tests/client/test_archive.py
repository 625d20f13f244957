"""``casbackup archive``: archives without a repository."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveHead
from casbackup.formats.stream.writer import StreamWriter
from casbackup.testing.archives import Sample, mixed_bytes, write_archive
from tests.formats.conftest import FACTS, vma_files

from .conftest import Casbackup

Start = Callable[..., subprocess.Popen[bytes]]
HOSTILE = ArchiveHead(
    (ArchiveDisk("../../escaped", 4096, 1), ArchiveDisk("/etc/passwd", 512, 2), ArchiveDisk("a\nb\x1b[31m", 512, 3)),
    (ArchiveConfig("../x", b"config"), ArchiveConfig("..", b"dots"), ArchiveConfig("x/../../y", b"y")),
    bytes(16),
    5,
)


@pytest.fixture
def archives(bare: Casbackup) -> Callable[[str], Path]:
    """Archives of the reference program as files."""

    def write(name: str) -> Path:
        path = bare.folder / os.path.basename(name)
        path.write_bytes(vma_files()[name])
        return path

    return write


@pytest.fixture
def hostile(bare: Casbackup) -> Path:
    path = bare.folder / "hostile.casarch"
    content = Sample(HOSTILE, (mixed_bytes(4096), b"p" * 512, b"t" * 512))
    path.write_bytes(write_archive(StreamWriter(), content))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- list, config


@pytest.mark.parametrize("name", FACTS["sound"])
def test_the_lines_of_the_reference_program(bare: Casbackup, archives: Callable[[str], Path], name: str) -> None:
    lines = bare.ok("archive", "list", archives(name), "--vma").out
    assert lines.decode("utf-8", "surrogateescape") == FACTS["sound"][name]["reference_list"]


def test_lists(bare: Casbackup, archives: Callable[[str], Path], hostile: Path) -> None:
    document = bare.json("archive", "list", archives("vmstate.vma"))
    assert document["uuid"] == FACTS["sound"]["vmstate.vma"]["uuid"]
    assert document["time"] == "2026-11-22T20:42:29.000Z"
    assert [(d["name"], d["disk"], d["device_id"], d["vmstate"]) for d in document["disks"]] == [
        ("drive-scsi0", "scsi0", 1, False),
        ("vmstate", "vmstate", 2, True),
    ]
    text = bare.ok("archive", "list", archives("basic.vma")).text
    assert "drive-scsi0" in text
    assert "qemu-server.fw" in text
    assert "\x1b" not in bare.ok("archive", "list", hostile).text


def test_list_reads_the_head_only(bare: Casbackup, start: Start) -> None:
    data = vma_files()["basic.vma"]
    process = start("archive", "list", "-", "--vma", stdin=subprocess.PIPE)
    out, err = process.communicate(data[:12_800], timeout=30)
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == FACTS["sound"]["basic.vma"]["reference_list"]


def test_configs(bare: Casbackup, archives: Callable[[str], Path], hostile: Path) -> None:
    path = archives("basic.vma")
    sizes = {name: (size, digest) for name, size, digest in FACTS["sound"]["basic.vma"]["configs"]}
    for arguments, name in [([], "qemu-server.conf"), (["qemu-server.fw"], "qemu-server.fw")]:
        out = bare.ok("archive", "config", path, *arguments).out
        assert (len(out), hashlib.sha256(out).hexdigest()) == sizes[name]
    assert bare.ok("archive", "config", hostile, "../x").out == b"config"
    error = bare.fails(2, "archive", "config", archives("noconfig.vma"))
    assert "has no config qemu-server.conf; it has: none" in error["message"]
    assert bare.json("archive", "config", hostile, "../x")["content"] == "config"


# --- verify


@pytest.mark.parametrize("name", FACTS["sound"])
def test_sound_archives(bare: Casbackup, archives: Callable[[str], Path], name: str) -> None:
    path = archives(name)
    document = bare.json("archive", "verify", path)
    assert (document["sound"], document["errors"]) == (True, 0)
    bare.ok("archive", "verify", path, "--quick", "-q")


@pytest.mark.parametrize("name", FACTS["damaged"])
def test_damaged_archives(bare: Casbackup, archives: Callable[[str], Path], name: str) -> None:
    result = bare("archive", "verify", archives(f"damaged/{name}"), "--json")
    refused = FACTS["damaged"][name]["reference_extract"][0] not in (0, "0")
    assert result.status in (0, 1, 2)
    assert "Traceback" not in result.err
    if refused:
        assert result.status in (1, 2), "at least as strict as the reference program's extract"
    if result.status == 1:
        assert (result.error["code"], result.json["sound"]) == ("archive-unsound", False)
        assert result.json["errors"] == sum(f["severity"] == "error" for f in result.json["findings"]) > 0
    elif result.status == 2:
        assert (result.error["code"], result.out) == ("archive-unreadable", b"")


def test_findings_for_people(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    result = bare("archive", "verify", archives("damaged/missing-ext0.vma"))
    assert result.status == 1
    assert "NOT SOUND" in result.text
    assert "error: missing-data: " in result.text
    assert "disk drive-" in result.text
    quiet = bare("archive", "verify", "-q", bare.folder / "missing-ext0.vma")
    assert quiet.text == result.text[: result.text.rindex(";")] + quiet.text[quiet.text.rindex(";") :]


def test_what_cannot_be_read_as_an_archive(bare: Casbackup) -> None:
    (bare.folder / "text").write_bytes(b"hello\n")
    for path in (bare.folder / "text", bare.folder / "missing", bare.folder):
        assert bare.fails(2, "archive", "verify", path)["code"] == "archive-unreadable"


def test_warnings_count_if_asked_for(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    for name in FACTS["damaged"]:
        document = bare("archive", "verify", archives(f"damaged/{name}"), "--json")
        if document.status == 0 and document.json["warnings"]:
            result = bare("archive", "verify", archives(f"damaged/{name}"), "--strict", "--json")
            assert (result.status, result.json["sound"]) == (1, False)
            return
    raise AssertionError("no fixture has warnings only")


def test_other_formats_are_verified_by_reading(bare: Casbackup, hostile: Path) -> None:
    assert bare.json("archive", "verify", hostile)["sound"]
    torn = bare.folder / "torn.casarch"
    torn.write_bytes(hostile.read_bytes()[:-30])
    assert bare("archive", "verify", torn).status == 1


# --- extract


@pytest.mark.parametrize("name", FACTS["sound"])
def test_extracted_disks_are_those_of_the_reference_program(
    bare: Casbackup, archives: Callable[[str], Path], name: str
) -> None:
    out = bare.folder / "out"
    document = bare.json("archive", "extract", archives(name), out)
    disks = FACTS["sound"][name]["disks"].values()
    found = {disk["name"]: Path(disk["target"]) for disk in document["disks"]}
    for disk, size, _, digest in disks:
        assert found[disk].stat().st_size == size
        if disk != "vmstate":
            assert sha256(found[disk]) == digest
    assert sorted(os.listdir(out)) == sorted(
        os.path.basename(path) for path in [*map(str, found.values()), *document["configs"]]
    )


def test_files_are_sparse(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    bare.ok("archive", "extract", archives("sparse-tail.vma"), bare.folder / "out")
    (disk,) = (bare.folder / "out").glob("*.raw")
    assert disk.stat().st_blocks * 512 < disk.stat().st_size // 10


def test_nothing_leaves_the_folder(bare: Casbackup, hostile: Path) -> None:
    out = bare.folder / "deep" / "out"
    bare.ok("archive", "extract", hostile, out)
    disks = {"_._.._escaped.raw", "_etc_passwd.raw", "a_b__31m.raw"}
    assert set(os.listdir(out)) == disks | {"_._x", "_.", "x_.._.._y"}
    assert os.listdir(bare.folder / "deep") == ["out"]


def test_single_disks(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    path = archives("basic.vma")
    for number, name in enumerate(("virtio1", "drive-virtio1")):
        out = bare.folder / f"out{number}"
        bare.ok("archive", "extract", path, out, "--disk", name)
        assert os.listdir(out) == ["virtio1.raw"]
    error = bare.fails(2, "archive", "extract", path, bare.folder / "x", "--disk", "sda")
    assert "it has: scsi0, virtio1" in error["message"]
    assert not (bare.folder / "x").exists()


def test_existing_files_are_kept(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    path, out = archives("basic.vma"), bare.folder / "out"
    out.mkdir()
    for name in ("scsi0.raw", "qemu-server.fw"):
        (out / name).write_bytes(b"precious")
        assert bare.fails(6, "archive", "extract", path, out)["code"] == "target-exists"
        assert os.listdir(out) == [name]
        bare.ok("archive", "extract", path, out, "--force")
        shutil.rmtree(out)
        out.mkdir()


def test_incomplete_archives_leave_nothing(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    path, out = archives("damaged/missing-ext0.vma"), bare.folder / "out"
    assert bare.fails(3, "archive", "extract", path, out)["code"] == "archive-incomplete"
    assert os.listdir(out) == []
    result = bare("archive", "extract", path, out, "--allow-incomplete", "--json")
    assert result.status == 3
    assert result.json["missing_bytes"] > 0
    assert (out / "scsi0.raw").stat().st_size > 0


# --- salvage


def test_salvage(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    path, out = archives("damaged/missing-ext0.vma"), bare.folder / "out"
    result = bare("archive", "salvage", path, out, "--json")
    assert (result.status, result.error["code"]) == (3, "archive-losses")
    document = result.json
    assert document["missing_bytes"] > 0
    assert any(finding["code"] == "missing-data" for finding in document["findings"])
    assert json.loads((out / "report.json").read_bytes()) == document
    assert {"report.json", "scsi0.raw", "virtio1.raw", "qemu-server.conf"} <= set(os.listdir(out))


def test_salvage_of_a_sound_archive(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    out = bare.folder / "out"
    document = bare.json("archive", "salvage", archives("basic.vma"), out)
    assert (document["missing"], document["findings"]) == ([], [])
    for name, _, _, digest in FACTS["sound"]["basic.vma"]["disks"].values():
        assert sha256(out / f"{name.removeprefix('drive-')}.raw") == digest


def test_salvage_without_a_beginning(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    path = archives("basic.vma")
    path.write_bytes(b"\xff" * 12_800 + path.read_bytes()[12_800:])
    result = bare("archive", "salvage", path, bare.folder / "out", "--json")
    assert result.status in (0, 3)
    assert [disk["name"] for disk in result.json["disks"]] == ["disk1", "disk2"]


def test_what_cannot_be_salvaged(bare: Casbackup, hostile: Path) -> None:
    assert bare.fails(5, "archive", "salvage", hostile, bare.folder / "out")["code"] == "archive-unsupported"
    (bare.folder / "x").write_bytes(bytes(100_000))
    assert bare.fails(4, "archive", "salvage", bare.folder / "x", bare.folder / "out")["code"] == "archive-damaged"
    assert not (bare.folder / "out").exists()


# --- convert


def test_conversions_there_and_back(bare: Casbackup) -> None:
    disk = bare.folder / "scsi0.raw"
    disk.write_bytes(mixed_bytes(5 * 1024 * 1024 + 512))
    chain = ["x.vma", "x.tar", "x.casarch", "x.vma.zst", "x.qcow2", "x.vmdk", "y.vma.gz", "z.raw"]
    previous: Path = disk
    for name in chain:
        target = bare.folder / name
        result = bare("archive", "convert", previous, target)
        assert result.status == 0, (name, result.err)
        previous = target
    assert previous.read_bytes() == disk.read_bytes()
    assert not [name for name in os.listdir(bare.folder) if "casbackup" in name], "no temporary files"


def test_an_archive_in_disorder_to_a_format_that_wants_order(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    path = archives("crafted-legal-59-shuffled.vma")
    for name in ("x.tar", "x.casarch", "y.vma"):
        bare.ok("archive", "convert", path, bare.folder / name, "-q")
        out = bare.folder / f"out-{name}"
        bare.ok("archive", "extract", bare.folder / name, out, "-q")
        for disk, _, _, digest in FACTS["sound"]["crafted-legal-59-shuffled.vma"]["disks"].values():
            assert sha256(out / f"{disk.removeprefix('drive-')}.raw") == digest
    kept = bare.json("archive", "list", bare.folder / "y.vma")
    before = bare.json("archive", "list", path)
    assert [kept[key] for key in ("uuid", "time", "disks", "configs")] == [
        before[key] for key in ("uuid", "time", "disks", "configs")
    ]


def test_conversions_that_cannot_be(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    path = archives("basic.vma")
    assert bare.fails(2, "archive", "convert", path, bare.folder / "x.qcow2")["code"] == "archive-limit"
    assert bare.fails(2, "archive", "convert", path, "-")["code"] == "usage"
    for name, code in [("missing-ext0.vma", "archive-incomplete"), ("trunc-312500.vma", "archive-damaged")]:
        for target in ("x.tar", "x.vma"):
            damaged = archives(f"damaged/{name}")
            assert bare("archive", "convert", damaged, bare.folder / target, "--json").error["code"] == code
            assert not (bare.folder / target).exists()
    assert sorted(os.listdir(bare.folder)) == ["basic.vma", "missing-ext0.vma", "trunc-312500.vma"]


def test_a_conversion_to_a_pipe(bare: Casbackup, archives: Callable[[str], Path]) -> None:
    path = archives("basic.vma")
    archive = bare.ok("archive", "convert", path, "-", "--vma").out
    (bare.folder / "x.vma").write_bytes(archive)
    assert bare.json("archive", "verify", bare.folder / "x.vma")["findings"] == []


# --- formats


def test_formats(bare: Casbackup) -> None:
    document = bare.json("archive", "formats")
    formats = {item["name"]: item for item in document["formats"]}
    assert {"vma", "tar", "qcow2", "vmdk", "raw", "stream"} <= set(formats)
    assert formats["vma"]["salvages"] and formats["vma"]["verifies"] and formats["vma"]["max_disks"] == 254
    assert not formats["qcow2"]["reads_pipes"]
    assert document["broken"] == []
    assert "qcow2: -o compression" in bare.ok("archive", "formats").text


def test_no_repository_is_needed(
    bare: Casbackup, archives: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CASBACKUP_REPOSITORY")
    bare.ok("archive", "list", archives("tiny.vma"))
