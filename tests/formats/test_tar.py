"""tar: what GNU tar makes of our archives, and what we make of those of GNU tar and Python."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.errors import ArchiveLimit, ArchiveUnsupported
from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveHead, ByteRange, Data, Zeros
from casbackup.formats.tar import FORMAT
from casbackup.formats.tar.reader import TarReader
from casbackup.formats.tar.writer import TarWriter
from casbackup.testing.archives import (
    ArchiveConformance,
    MemorySource,
    MemoryTarget,
    Sample,
    mixed_bytes,
    random_bytes,
    read_archive,
    sample,
    write_archive,
)
from casbackup.units import GiB, KiB, MiB

needs_gnu_tar = pytest.mark.skipif(
    not shutil.which("tar") or b"GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True).stdout,
    reason="GNU tar is not installed",
)
CONFIGS = (ArchiveConfig("qemu-server.conf", b"cores: 2\n"), ArchiveConfig("empty", b""))
SPARSE_FORMS = {
    "old": ["--format=gnu"],
    "0.0": ["--format=posix", "--sparse-version=0.0"],
    "0.1": ["--format=posix", "--sparse-version=0.1"],
    "1.0": ["--format=posix", "--sparse-version=1.0"],
}
SUITE = ArchiveConformance(FORMAT)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in SUITE.checks()])
def test_conformance(check: Callable[[], None]) -> None:
    check()


def scattered_bytes(size: int) -> bytes:
    """More pieces of data than fit into the header of an old sparse member, and into the block behind it."""
    content = bytearray(size)
    for number in range(0, size, 32 * KiB):
        content[number : number + 4 * KiB] = random_bytes(4 * KiB)
    return bytes(content)


def write_sparse(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.truncate(len(content))
        for start in range(0, len(content), 4 * KiB):
            piece = content[start : start + 4 * KiB]
            if piece.strip(b"\0"):
                file.seek(start)
                file.write(piece)


def extract(archive: bytes, folder: Path) -> None:
    (folder / "a.tar").write_bytes(archive)
    done = subprocess.run(["tar", "-C", folder, "-xf", folder / "a.tar"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def packed(folder: Path, *arguments: str) -> bytes:
    """By GNU tar, in a fixed order."""
    command = ["tar", "--sort=name", "-C", str(folder), "-c", *arguments, "."]
    return subprocess.run(command, capture_output=True, check=True).stdout


# --- ours, read by others


@needs_gnu_tar
def test_gnu_tar_extracts_it_sparse(tmp_path: Path) -> None:
    content = sample([8 * MiB + 512, 1 * MiB, 3 * MiB, 0], CONFIGS, fill=scattered_bytes)
    full, zero = random_bytes(1 * MiB), bytes(3 * MiB)
    content = Sample(content.head, (content.contents[0], full, zero, b""))
    extract(write_archive(TarWriter(), content), tmp_path)
    for disk, expected in zip(content.head.disks, content.contents, strict=True):
        assert (tmp_path / f"{disk.name}.raw").read_bytes() == expected
    for config in CONFIGS:
        assert (tmp_path / "config" / config.name).read_bytes() == config.content
    assert os.stat(tmp_path / "drive-scsi0.raw").st_blocks * 512 < 2 * MiB
    assert os.stat(tmp_path / "drive-scsi2.raw").st_blocks * 512 < 64 * KiB


@needs_gnu_tar
def test_gnu_tar_extracts_a_disk_beyond_8_gib(tmp_path: Path) -> None:
    head = ArchiveHead((ArchiveDisk("big", 100 * GiB),), time_s=1)
    target = MemoryTarget(seekable=False)
    output = TarWriter().open(target, head, [[ByteRange(90 * GiB, 4 * KiB)]])
    output.write(0, 90 * GiB, random_bytes(4 * KiB))
    output.finish()
    extract(bytes(target.data), tmp_path)
    with open(tmp_path / "big.raw", "rb") as file:
        assert file.seek(0, os.SEEK_END) == 100 * GiB
        file.seek(90 * GiB)
        assert file.read(4 * KiB) == random_bytes(4 * KiB)
    assert os.stat(tmp_path / "big.raw").st_blocks * 512 < 64 * KiB


def test_a_member_that_stores_more_than_8_gib() -> None:
    class Beginning(MemoryTarget):
        """Keeps the first bytes only."""

        def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
            super().write([bytes(b)[: max(0, 8 * KiB - len(self.data))] for b in buffers])

    size = 9 * GiB
    target = Beginning(seekable=False)
    output = TarWriter().open(target, ArchiveHead((ArchiveDisk("full", size),)), [[ByteRange(0, size)]])
    output.write(0, 0, b"begin")
    with tarfile.open(fileobj=io.BytesIO(bytes(target.data))) as archive:
        assert [(m.name, m.size) for m in (archive.next(), archive.next()) if m][1] == ("full.raw", size)


def test_python_reads_it() -> None:
    content = sample([2 * MiB, 70_000], CONFIGS, fill=mixed_bytes)
    with tarfile.open(fileobj=io.BytesIO(write_archive(TarWriter(), content))) as archive:
        names = archive.getnames()
        assert names == [
            "casbackup.json",
            "config/qemu-server.conf",
            "config/empty",
            "drive-scsi0.raw",
            "drive-scsi1.raw",
        ]
        manifest = json.load(archive.extractfile("casbackup.json"))  # type: ignore[arg-type]
        disk = archive.extractfile("drive-scsi0.raw")
        assert disk is not None and disk.read() == content.contents[0]
    assert (manifest["format"], manifest["version"], manifest["disks"][0]["size"]) == ("casbackup-tar", 1, 2 * MiB)


def test_it_ends_on_a_record_of_a_tape() -> None:
    assert len(write_archive(TarWriter(), sample([70_000], CONFIGS, fill=mixed_bytes))) % 10_240 == 0


@needs_gnu_tar
@pytest.mark.parametrize(
    "name", ["../up", "/etc/passwd", "..", ".", "", "a\0b", "-rf", "ü ñ", "a%2Fb", "a/b", "\udc80", "x" * 240]
)
def test_unsafe_names_stay_in_the_folder_and_come_back(name: str, tmp_path: Path) -> None:
    content = sample([4 * KiB], fill=random_bytes)
    head = replace(
        content.head, disks=(replace(content.head.disks[0], name=name),), configs=(ArchiveConfig(name, b"c"),)
    )
    data = write_archive(TarWriter(), Sample(head, content.contents))
    assert read_archive(TarReader(), data, seekable=False) == Sample(head, content.contents)
    extract(data, tmp_path)
    assert len(list(tmp_path.glob("*.raw"))) == len(list((tmp_path / "config").iterdir())) == 1


@pytest.mark.parametrize(
    "head",
    [
        ArchiveHead((ArchiveDisk("same", 1), ArchiveDisk("same", 2))),
        ArchiveHead((ArchiveDisk("x" * 252, 1),)),
        ArchiveHead((ArchiveDisk("/" * 90, 1),)),
        ArchiveHead((), (ArchiveConfig("c", b""), ArchiveConfig("c", b""))),
        ArchiveHead((ArchiveDisk("d", 2**51),)),
    ],
    ids=["two disks", "long name", "name long once escaped", "two configs", "huge"],
)
def test_what_it_cannot_hold(head: ArchiveHead) -> None:
    with pytest.raises(ArchiveLimit):
        TarWriter().check(head)


def test_the_map_is_what_is_stored() -> None:
    """Zeros within it are written, what was not given as well; data outside of it is refused."""
    head = ArchiveHead((ArchiveDisk("d", 64 * KiB),))
    ranges = [ByteRange(4 * KiB, 4 * KiB), ByteRange(8 * KiB, 8 * KiB), ByteRange(32 * KiB, 4 * KiB)]
    target = MemoryTarget(seekable=False)
    output = TarWriter().open(target, head, [ranges])
    output.write(0, 0, bytes(6 * KiB) + b"x" * (2 * KiB) + bytes(4 * KiB))
    output.zeros(0, 20 * KiB, 4 * KiB)
    with pytest.raises(ValueError, match="not in the map"):
        output.write(0, 24 * KiB, b"y" * KiB)
    output = TarWriter().open(target := MemoryTarget(seekable=False), head, [ranges])
    output.write(0, 0, bytes(6 * KiB) + b"x" * (2 * KiB) + bytes(4 * KiB))
    output.finish()
    found = read_archive(TarReader(), bytes(target.data)).contents[0]
    assert found == bytes(6 * KiB) + b"x" * (2 * KiB) + bytes(56 * KiB)
    with tarfile.open(fileobj=io.BytesIO(bytes(target.data))) as archive:
        member = archive.getmember("d.raw")
        assert member.sparse == [(4 * KiB, 12 * KiB), (32 * KiB, 4 * KiB), (64 * KiB, 0)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("offset", [0, 4 * KiB - 512])
def test_data_out_of_order_is_refused(offset: int) -> None:
    output = TarWriter().open(MemoryTarget(), ArchiveHead((ArchiveDisk("d", 8 * KiB),)), [[ByteRange(0, 8 * KiB)]])
    output.write(0, 0, b"x" * 4 * KiB)
    with pytest.raises(ValueError, match="come after"):
        output.write(0, offset, b"x" * 512)


# --- archives of others


@needs_gnu_tar
@pytest.mark.parametrize("form", SPARSE_FORMS)
def test_sparse_members_of_gnu_tar(form: str, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30) / ("name" * 30)
    folder.mkdir(parents=True)
    contents = {"a.raw": scattered_bytes(3 * MiB + 512), "b.IMG": bytes(1 * MiB), "c.raw": random_bytes(70_000)}
    for name, content in contents.items():
        write_sparse(folder / name, content)
    (folder / "100.conf").write_bytes(b"name: web")
    (folder / "100.log").write_bytes(b"of no interest")
    os.symlink("a.raw", folder / "link.raw")
    found = read_archive(TarReader(), packed(tmp_path, "-S", *SPARSE_FORMS[form]), seekable=True)
    assert found.head.configs == (ArchiveConfig("100.conf", b"name: web"),)
    assert {d.name: c for d, c in zip(found.head.disks, found.contents, strict=True)} == {
        name[:-4]: content for name, content in contents.items()
    }


@needs_gnu_tar
def test_our_archive_packed_anew(tmp_path: Path) -> None:
    """In another order, with other kinds of headers: the manifest still tells what is what."""
    content = sample([2 * MiB, 70_000], CONFIGS, fill=mixed_bytes)
    extract(write_archive(TarWriter(), content), tmp_path)
    (tmp_path / "a.tar").unlink()
    for form in SPARSE_FORMS.values():
        data = packed(tmp_path, "-S", *form)
        assert read_archive(TarReader(), data, seekable=True) == content
        with pytest.raises(ArchiveUnsupported, match="from a file"):
            read_archive(TarReader(), data, seekable=False)


def archive_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_disks_of_equal_names_in_different_folders() -> None:
    data = archive_of({"a/disk.raw": b"1", "b/disk.raw": b"2", "b/root.img": b"3"})
    found = read_archive(TarReader(), data, seekable=True)
    assert [d.name for d in found.head.disks] == ["a_disk", "b_disk", "root"]
    assert found.contents == (b"1", b"2", b"3")


def test_of_a_name_that_repeats_the_last_counts() -> None:
    data = archive_of({"disk.raw": b"old", "other": b""})
    appended = data[:1536] + archive_of({"disk.raw": b"newer"})
    assert read_archive(TarReader(), appended, seekable=True).contents == (b"newer",)


@pytest.mark.parametrize("members", [{"disk.vmdk": b"x", "vm.ovf": b"y"}, {"readme": b""}], ids=["ova", "other"])
def test_an_archive_without_disks(members: dict[str, bytes]) -> None:
    with pytest.raises(ArchiveUnsupported, match="disk image"):
        TarReader().open(MemorySource(archive_of(members)))


def test_large_files_are_no_configs() -> None:
    found = read_archive(TarReader(), archive_of({"d.raw": b"x", "big.conf": bytes(300 * KiB)}), seekable=True)
    assert found.head.configs == ()


def test_recognised_whoever_wrote_it() -> None:
    assert FORMAT.recognises(archive_of({"x": b""})[:1024])
    assert not FORMAT.recognises(b"\0" * 257 + b"ustar\x0000" + b"\0" * 760)


def test_a_later_version_is_refused() -> None:
    manifest = b'{"format": "casbackup-tar", "version": 2}'
    with pytest.raises(ArchiveUnsupported, match="version 2"):
        TarReader().open(MemorySource(archive_of({"casbackup.json": manifest}), seekable=False))


def test_events_of_a_sparse_disk_are_few() -> None:
    head = ArchiveHead((ArchiveDisk("d", 1024 * GiB),))
    output = TarWriter().open(target := MemoryTarget(), head, [[ByteRange(512 * GiB, 1 * MiB)]])
    output.write(0, 512 * GiB, random_bytes(1 * MiB))
    output.finish()
    events = list(TarReader().open(MemorySource(bytes(target.data))).events())
    assert [type(event) for event in events] == [Zeros, Data, Zeros]
