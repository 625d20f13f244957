"""The gateway: what a server restores over HTTP, on a host that has the key."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3

from casbackup.errors import DiskSealed
from casbackup.peer.http.address import parse_address
from casbackup.peer.http.rest import RestClient
from casbackup.peer.http.transport import Credentials
from casbackup.units import MiB

from .conftest import Running, client, serving

HTTP = urllib3.PoolManager(retries=False)
CONTENT = random.Random(7).randbytes(5 * MiB + 4096) + bytes(30 * MiB) + b"the end".ljust(512)
CONFIG = b"memory: 512\n"


@dataclass
class Gateway:
    url: str
    snapshot: str

    @property
    def disk(self) -> str:
        return f"{self.url}/snapshots/{self.snapshot}/disks/scsi0"

    @property
    def rest(self) -> RestClient:
        base, _, name = self.url.partition("/v1/repositories/")
        return RestClient(parse_address(f"{base}/{name}"), patience_s=1)


def backed_up(place: object, folder: Path, run: Any) -> str:
    disk, config = folder / "scsi0.raw", folder / "vm.conf"
    disk.write_bytes(CONTENT)
    config.write_bytes(CONFIG)
    result = run(
        *("-r", place, "backup", "vm/100", f"scsi0={disk}", "--config", f"vm.conf={config}", "--notes", "a note"),
        "--json",
    )
    assert result.status == 0, result.err
    return str(json.loads(result.out)["snapshot"]["id"])


@contextlib.contextmanager
def gateway(place: object, *options: object) -> Iterator[str]:
    """The command as a process; gives what it prints as its address."""
    process = client("-r", place, "gateway", "--listen", "127.0.0.1:0", "--json", *options)
    try:
        assert process.stdout is not None
        lines = ""
        while not lines.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            lines += line
        yield str(json.loads(lines)["url"])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


@pytest.fixture
def encrypted(tmp_path: Path, run: Any) -> Path:
    folder = tmp_path / "repository"
    assert run("-r", folder, "init", "--encrypted", "--no-passphrase").status == 0
    return folder


@pytest.fixture
def served(encrypted: Path, tmp_path: Path, run: Any) -> Iterator[Running]:
    """A server without the key; the repository has a snapshot."""
    with serving(encrypted) as running:
        yield running


def test_a_server_without_the_key_says_why_not(served: Running, tmp_path: Path, run: Any) -> None:
    snapshot = backed_up(served.url, tmp_path, run)
    listed = HTTP.request("GET", f"{served.api}/snapshots").json()["snapshots"][0]
    assert listed["sealed"] is True
    assert (listed["notes"], listed["host"]) == ("", "")
    assert listed["disks"][0]["size_bytes"] == len(CONTENT)
    assert [config["name"] for config in listed["configs"]] == ["config-1"]
    assert HTTP.request("GET", f"{served.api}/vms").json()["vms"][0]["name"] == "vm/100"
    one = f"{served.api}/snapshots/{snapshot}"
    for method, path in (
        ("GET", "/disks/scsi0"),
        ("HEAD", "/disks/scsi0"),
        ("GET", "/configs/config-1"),
        ("GET", "/export?format=tar"),
    ):
        answer = HTTP.request(method, one + path, headers={"Range": "bytes=0-511"})
        assert answer.status == 409, path
        if method == "GET":
            problem = answer.json()
            assert problem["code"] == "disk-sealed"
            assert served.repository.config.key_fingerprint in problem["detail"]
    paths = HTTP.request("GET", f"http://127.0.0.1:{served.port}/v1/openapi.json").json()["paths"]
    for path in ("/disks/{disk}", "/configs/{config}", "/export"):
        assert "409" in paths["/v1/repositories/{repository}/snapshots/{snapshot}" + path]["get"]["responses"]
    with RestClient(parse_address(served.url), patience_s=1) as rest:
        found = rest.snapshot(snapshot)
        assert found.sealed
        with pytest.raises(DiskSealed):
            rest.read_into(found, "scsi0", 0, memoryview(bytearray(512)))
        with pytest.raises(DiskSealed):
            rest.config(found, "config-1")
        with pytest.raises(DiskSealed):
            next(rest.export(found, "tar"))


@pytest.mark.parametrize("upstream", ["folder", "server"])
def test_it_gives_what_a_server_cannot(
    served: Running, encrypted: Path, tmp_path: Path, run: Any, upstream: str
) -> None:
    snapshot = backed_up(encrypted, tmp_path, run)
    with gateway(encrypted if upstream == "folder" else served.url) as url:
        one = Gateway(url, snapshot)
        listed = HTTP.request("GET", f"{url}/snapshots").json()["snapshots"][0]
        assert (listed["sealed"], listed["notes"], listed["configs"][0]["name"]) == (False, "a note", "vm.conf")
        whole = HTTP.request("GET", one.disk)
        assert (whole.status, whole.data) == (200, CONTENT)
        part = HTTP.request("GET", one.disk, headers={"Range": f"bytes={5 * MiB}-{7 * MiB}"})
        assert (part.status, part.data) == (206, CONTENT[5 * MiB : 7 * MiB + 1])
        again = HTTP.request("GET", one.disk, headers={"If-None-Match": whole.headers["ETag"]})
        assert again.status == 304
        head = HTTP.request("HEAD", one.disk)
        assert head.headers["Content-Length"] == str(len(CONTENT))
        config = HTTP.request("GET", f"{url}/snapshots/{snapshot[:8]}/configs/vm.conf")
        assert config.data == CONFIG
        compared = HTTP.request("GET", f"{url}/snapshots/{snapshot}/diff?to={snapshot}")
        assert compared.data.splitlines()[-1] == b'{"complete":true}'
        archive = HTTP.request("GET", f"{url}/snapshots/{snapshot}/export?format=tar")
        with tarfile.open(fileobj=io.BytesIO(archive.data)) as tar:
            disk = tar.extractfile("scsi0.raw")
            assert disk is not None and disk.read() == CONTENT
        with one.rest as rest:
            buffer = bytearray(len(CONTENT))
            rest.read_into(rest.snapshot(snapshot), "scsi0", 0, memoryview(buffer))
            assert buffer == CONTENT


def test_it_can_do_nothing_else(encrypted: Path, tmp_path: Path, run: Any) -> None:
    snapshot = backed_up(encrypted, tmp_path, run)
    with gateway(encrypted) as url:
        for method, path in (
            ("GET", "/config"),
            ("GET", "/key"),
            ("GET", "/manifests"),
            ("POST", "/sessions"),
            ("POST", "/manifests/forget"),
            ("POST", "/fetch"),
            ("GET", "/jobs"),
        ):
            assert HTTP.request(method, url + path, body=b"{}" if method == "POST" else None).status == 404, path
        assert HTTP.request("DELETE", f"{url}/snapshots/{snapshot}").status == 405
        assert HTTP.request("GET", url.replace("/main", "/other") + "/snapshots").status == 404


def test_web_pages_under_other_names_are_refused(encrypted: Path, tmp_path: Path, run: Any) -> None:
    backed_up(encrypted, tmp_path, run)
    with gateway(encrypted) as url:
        for name, status in (
            ("evil.example", 421),
            ("127.0.0.1.evil.example:80", 421),
            ("localhost:80", 200),
            ("[::1]:80", 200),
            ("127.0.0.1", 200),
        ):
            assert HTTP.request("GET", f"{url}/snapshots", headers={"Host": name}).status == status, name


def test_a_token_may_be_wanted(encrypted: Path, tmp_path: Path, run: Any) -> None:
    snapshot = backed_up(encrypted, tmp_path, run)
    file = tmp_path / "token"
    file.write_text("a secret of this machine\n")
    with gateway(encrypted, "--token-file", file, "--name", "vms") as url:
        assert HTTP.request("GET", f"{url}/snapshots").status == 401
        for shown in ("Bearer wrong", "Bearer \xe4", "Basic eDp3cm9uZw=="):
            assert HTTP.request("GET", f"{url}/snapshots", headers={"Authorization": shown}).status == 401
        address = parse_address(url.replace("/v1/repositories", ""))
        with RestClient(address, Credentials("a secret of this machine"), patience_s=1) as rest:
            assert rest.snapshot(snapshot).id == snapshot
    file.write_text("\n")
    assert run("-r", encrypted, "gateway", "--token-file", file).status == 2
    assert run("-r", encrypted, "gateway", "--token-file", tmp_path / "none").status == 2


def test_only_loopback_addresses(encrypted: Path, run: Any) -> None:
    for listen in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.com:0"):
        result = run("-r", encrypted, "gateway", "--listen", listen)
        assert result.status == 2, listen
        assert "loopback" in result.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("-r", encrypted, "gateway", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        assert (result.status, "cannot listen" in result.err) == (2, True)


def test_it_needs_the_key(encrypted: Path, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "no-keys"))
    result = run("-r", encrypted, "gateway", "--listen", "127.0.0.1:0", "--json")
    assert json.loads(result.err)["error"]["code"] == "key-missing"


def test_a_plain_repository(tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "plain"
    assert run("-r", folder, "init").status == 0
    snapshot = backed_up(folder, tmp_path, run)
    with gateway(folder) as url:
        assert HTTP.request("GET", Gateway(url, snapshot).disk).data == CONTENT


def test_damage_breaks_the_connection(served: Running, tmp_path: Path, run: Any) -> None:
    snapshot = backed_up(served.url, tmp_path, run)
    with gateway(served.url) as url:
        for pack in Path(served.repository.layout.packs).rglob("*.pack"):
            content = bytearray(pack.read_bytes())
            content[len(content) // 2] ^= 1
            pack.write_bytes(content)
        answer = HTTP.request("GET", Gateway(url, snapshot).disk, preload_content=False)
        assert answer.status == 200
        with pytest.raises(urllib3.exceptions.HTTPError):
            answer.read()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_curl_and_qemu_img(encrypted: Path, tmp_path: Path, run: Any) -> None:
    snapshot = backed_up(encrypted, tmp_path, run)
    with gateway(encrypted) as url:
        disk = Gateway(url, snapshot).disk
        got = subprocess.run(["curl", "-s", "-r", "100-199", disk], stdout=subprocess.PIPE, check=True)
        assert got.stdout == CONTENT[100:200]
        target = tmp_path / "out.raw"
        done = subprocess.run(
            ["qemu-img", "convert", "-m", "1", "-f", "raw", "-O", "raw", disk, str(target)],
            capture_output=True,
            text=True,
        )
        if "Unknown protocol" in done.stderr:
            pytest.skip("qemu-img has no driver for http")
        assert done.returncode == 0, done.stderr
        assert target.read_bytes() == CONTENT
