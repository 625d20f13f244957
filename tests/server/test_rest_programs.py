"""Programs that know nothing of casbackup restore from it: curl, wget, qemu-img, nbdkit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casbackup_server.rights import Right

from .conftest import Running, grant
from .test_rest import CONTENT, SIZE, backed_up, url

MiB = 2**20


class Place:
    """A disk on a server that wants a token, and a folder for results."""

    def __init__(self, running: Running, folder: Path, run: Any) -> None:
        self.snapshot = backed_up(running, folder, run)
        self.token = grant(running.folder, Right.RESTORE)
        self.url = url(running, self.snapshot)
        self.folder = folder


@pytest.fixture
def place(guarded: Running, tmp_path: Path, run: Any) -> Iterator[Place]:
    yield Place(guarded, tmp_path, run)


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def done(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([str(a) for a in arguments], capture_output=True, timeout=60, check=True, **options)


def test_curl(place: Place) -> None:
    curl = [program("curl"), "--silent", "--fail", "--noproxy", "*"]
    part = done(*curl, "-r", "1000-2000999", "-H", f"Authorization: Bearer {place.token}", place.url).stdout
    assert part == CONTENT[1000:2001000]
    assert done(*curl, "-u", f"x:{place.token}", "-r", "-10", place.url).stdout == CONTENT[-10:]
    target = place.folder / "disk"
    target.write_bytes(CONTENT[: 3 * MiB])
    done(*curl, "-u", f"x:{place.token}", "-C", "-", "-o", target, place.url)
    assert target.read_bytes() == CONTENT
    head = done(*curl, "-I", "-u", f"x:{place.token}", place.url).stdout.decode().lower()
    assert f"content-length: {SIZE}" in head
    refused = subprocess.run([*curl, place.url], capture_output=True)
    assert refused.returncode == 22


def test_curl_notices_damage(guarded: Running, place: Place) -> None:
    curl = program("curl")
    for pack in guarded.folder.glob("packs/*/*.pack"):
        data = bytearray(pack.read_bytes())
        for at in range(2 * MiB, 3 * MiB, 64 * 1024):
            data[at] ^= 1
        pack.write_bytes(data)
    for address in (place.url, place.url.replace("/disks/scsi0", "/export?format=vma&compress=zstd")):
        got = subprocess.run(
            [curl, "--silent", "--fail", "--noproxy", "*", "-u", f"x:{place.token}", "-o", "/dev/null", address],
            capture_output=True,
        )
        assert got.returncode in (18, 56), address


def test_wget_goes_on(place: Place) -> None:
    target = place.folder / "scsi0"
    target.write_bytes(CONTENT[: 4 * MiB + 7])
    wget = [program("wget"), "--quiet", "--no-proxy", "--user=x", f"--password={place.token}", "-c", "-O", target]
    done(*wget, place.url)
    assert target.read_bytes() == CONTENT


@pytest.mark.qemu
def test_qemu_img(place: Place) -> None:
    qemu_img, target = program("qemu-img"), place.folder / "disk.raw"
    secret = ["--object", f"secret,id=token,data={place.token}"]
    image = f"driver=raw,file.driver=http,file.url={place.url},file.username=x,file.password-secret=token"
    got = subprocess.run(
        [qemu_img, "convert", "-m", "1", *secret, "--image-opts", image, "-O", "raw", str(target)],
        capture_output=True,
        timeout=60,
    )
    if b"Unknown driver" in got.stderr or b"Unknown protocol" in got.stderr:
        pytest.skip("QEMU has no curl driver: qemu-block-extra is not installed")
    assert got.returncode == 0, got.stderr
    assert target.read_bytes() == CONTENT + bytes(-SIZE % 512)


@pytest.mark.qemu
def test_nbdkit_curl(place: Place) -> None:
    nbdkit, target = program("nbdkit"), place.folder / "disk.raw"
    program("nbdcopy")
    if subprocess.run([nbdkit, "--dump-plugin", "curl"], capture_output=True).returncode:
        pytest.skip("nbdkit has no curl plugin")
    options = ["-U", "-", "curl", f"url={place.url}", "user=x", f"password={place.token}"]
    done(nbdkit, *options, "--run", f"nbdcopy $uri {target}")
    assert target.read_bytes()[:SIZE] == CONTENT
