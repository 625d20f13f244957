"""Encrypted repositories on a server that never has the key: every command works, and nothing readable leaves the
client.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import urllib3

from casbackup.block.device import read_bytes
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.uri import parse_uri
from casbackup.clock import SystemClock
from casbackup.codec.master_key import MasterKey
from casbackup.errors import ClockSkewed, RightMissing
from casbackup.ids import DEFAULT_NAMESPACE, VmName
from casbackup.jobs.backup import backup
from casbackup.jobs.rekey import rekey
from casbackup.jobs.sync import SyncRequest
from casbackup.keys.ring import KeyRing
from casbackup.keys.wrapping import unwrap
from casbackup.limits import MAX_CLOCK_SKEW_MS
from casbackup.peer.api import Peer
from casbackup.peer.local import LocalPeer
from casbackup.peer.sealed import SealedPeer
from casbackup.repository.repository import Repository
from casbackup.testing.world import request, restored
from casbackup.units import MiB
from casbackup_server.rights import Right

from .conftest import NAME, Running, ServerProcess, client, grant, serving, token_gate
from .proxy import Proxy

HTTP = urllib3.PoolManager(retries=False)
CONTENT = random.Random(11).randbytes(6 * MiB) + bytes(20 * MiB) + b"the end of the disk".ljust(4096)
CHANGED = CONTENT[:MiB] + random.Random(12).randbytes(64 * 1024) + CONTENT[MiB + 64 * 1024 :]
CONFIG = b"memory: 512\nname: a-machine-of-ours\n"
SECRETS = [
    b"a-machine-of-ours",
    b"the end of the disk",
    b"what the notes say",
    b"what they say later",
    b"a-path-of-ours",
    b"a-config-of-ours",
    *(CHANGED[at : at + 24] for at in range(0, 6 * MiB, 64 * 1024)),
]
"""Content and names of ours. Blocks are random, so that no compression hides them."""


@dataclass
class Site:
    """A server process with an encrypted repository, and a client with the key, which talks to it through a proxy."""

    process: ServerProcess
    proxy: Proxy
    folder: Path
    run: Callable[..., Any]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}/{NAME}"

    @property
    def disk(self) -> Path:
        return self.folder / "a-path-of-ours.raw"

    def ok(self, *arguments: object) -> str:
        result = self.run("-r", self.url, *arguments)
        assert result.status == 0, result.err
        return str(result.out)

    def json(self, *arguments: object) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def backup(self, content: bytes = CONTENT) -> dict[str, Any]:
        self.disk.write_bytes(content)
        config = self.folder / "vm.conf"
        config.write_bytes(CONFIG)
        options = ["--config", f"a-config-of-ours={config}", "--notes", "what the notes say", "--label", "weekly"]
        return dict(self.json("backup", "vm/100", f"scsi0={self.disk}", *options)["snapshot"])

    def leaks(self) -> set[bytes]:
        """The secrets that are readable in the repository, in the server's log, or on the wire."""
        files = [path for path in self.process.folder.rglob("*") if path.is_file()]
        places = [path.read_bytes() for path in [*files, self.process.log]]
        assert self.proxy.recorded and sum(map(len, self.proxy.recorded)) > 4 * MiB
        places += map(bytes, self.proxy.recorded)
        searched = [*SECRETS, *_forms_of_keys(self.folder / "keys")]
        return {secret for secret in searched if any(secret in place for place in places)}


@contextlib.contextmanager
def made(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, *init: str) -> Iterator[Site]:
    """The server is started where the key is not."""
    with monkeypatch.context() as patch:
        patch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "keys"))
        assert run("-r", tmp_path / "repository", "init", *init).status == 0
    process = ServerProcess(tmp_path / "repository")
    try:
        process.start()
        monkeypatch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "keys"))
        with Proxy(process.port) as proxy:
            proxy.recorded = []
            yield Site(process, proxy, tmp_path, run)
    finally:
        if process.process is not None:
            process.kill()


@pytest.fixture
def site(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with made(tmp_path, run, monkeypatch, "--encrypted", "--no-passphrase") as site:
        yield site


def _forms_of_keys(folder: Path) -> list[bytes]:
    if not folder.exists():
        return []
    secret = key_of(folder).reveal()
    return [secret, secret.hex().encode(), base64.b64encode(secret), base64.b32encode(secret)[:50]]


def key_of(folder: Path) -> MasterKey:
    ring = KeyRing(str(folder))
    return unwrap(ring.read(ring.only()), "the test's key", identities=(), passphrases=iter(()))


def test_the_search_finds_what_is_readable(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with made(tmp_path, run, monkeypatch) as plain:
        plain.backup()
        plain.backup(CHANGED)
        plain.ok("label", "vm/100", "--notes", "what they say later")
        assert plain.leaks() == set(SECRETS)


def test_commands_and_what_the_server_sees_of_them(site: Site) -> None:
    first, second = site.backup(), site.backup(CHANGED)
    assert second["stats"]["new_bytes"] < MiB
    out = site.folder / "out"
    site.ok("restore", "vm/100", "--to", out)
    assert (out / "scsi0.raw").read_bytes() == CHANGED
    assert (out / "a-config-of-ours").read_bytes() == CONFIG
    part = site.folder / "part"
    site.ok("dump", first["id"], "scsi0", "--offset", MiB, "--length", 4096, "-o", part)
    assert part.read_bytes() == CONTENT[MiB : MiB + 4096]
    ranges = site.json("diff", first["id"], second["id"])["disks"][0]["ranges"]
    assert ranges and MiB - 256 * 1024 <= ranges[0]["offset_bytes"] <= MiB
    site.ok("label", "vm/100", "--notes", "what they say later")
    site.ok("pin", "vm/100")
    shown = site.json("show", "vm/100")["snapshot"]
    assert (shown["notes"], shown["pinned"], shown["labels"]) == ("what they say later", True, ["weekly"])
    assert [config["name"] for config in shown["configs"]] == ["a-config-of-ours"]
    assert shown["disks"][0]["source"] == str(site.disk)
    archive = site.folder / "exported.vma"
    site.ok("export", "vm/100", archive, "--vma", "-q")
    site.ok("import", "vm/101", archive, "-q")
    site.ok("restore", "vm/101", "--to", site.folder / "imported")
    assert (next((site.folder / "imported").glob("*.raw"))).read_bytes()[: len(CHANGED)] == CHANGED
    listed = site.json("snapshots")["snapshots"]
    assert [item["vm"] for item in listed] == ["vm/100", "vm/100", "vm/101"]
    site.ok("stats")
    site.ok("forget", first["id"])
    assert site.leaks() == set()


def test_nbd_serve(site: Site) -> None:
    site.backup()
    options = ["--listen", "127.0.0.1:0", "--writable", "--save-as", "vm/100-changed", "--json"]
    process = client("-r", site.url, "nbd-serve", "vm/100", *options)
    document = _document(process)
    with contextlib.closing(NbdClient.connect(parse_uri(document["exports"][0]["uri"]))) as disk:
        assert read_bytes(disk, 0, len(CONTENT)) == CONTENT
        disk.write(MiB, CHANGED[MiB : MiB + 64 * 1024])
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    site.ok("restore", "vm/100-changed", "--to", site.folder / "out")
    assert (site.folder / "out" / "scsi0.raw").read_bytes() == CHANGED
    assert site.leaks() == set()


def test_mount(site: Site) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or shutil.which("fusermount3") is None:
        pytest.skip("/dev/fuse or fusermount3 is not there, or may not be used")
    pytest.importorskip("mfusepy")
    site.backup()
    folder = site.folder / "mounted"
    folder.mkdir()
    process = client("-r", site.url, "mount", "vm/100@latest", folder)
    deadline = time.monotonic() + 60
    while not os.path.ismount(folder):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert (folder / "scsi0.raw").read_bytes() == CONTENT
    assert (folder / "a-config-of-ours").read_bytes() == CONFIG
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert site.leaks() == set()


@pytest.mark.qemu
def test_a_live_backup(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    program = shutil.which("qemu-storage-daemon")
    if program is None:
        pytest.skip("qemu-storage-daemon is not installed")
    site.disk.write_bytes(CONTENT)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(site.folder))
    with _short_folder() as short:
        qmp = short / "qmp"
        command = [program, "--chardev", f"socket,id=m,path={qmp},server=on,wait=off", "--monitor", "chardev=m"]
        command += ["--blockdev", f"driver=file,node-name=f,filename={site.disk}"]
        command += ["--blockdev", "driver=raw,node-name=scsi0,file=f"]
        command += ["--export", "type=nbd,id=e,node-name=scsi0,name=scsi0,writable=on"]
        command += ["--nbd-server", f"addr.type=unix,addr.path={short / 'nbd'}"]
        command = _nbd_server_first(command)
        daemon = subprocess.Popen(command)
        try:
            while not qmp.exists():
                assert daemon.poll() is None
                time.sleep(0.05)
            snapshots = [site.json("backup", "vm/100", "--qmp", qmp)["snapshot"] for _ in range(2)]
        finally:
            daemon.kill()
            daemon.wait()
    assert snapshots[1]["live"]["increments"] == ["scsi0"]
    assert snapshots[1]["stats"]["read_bytes"] == 0
    site.ok("restore", "vm/100", "--to", site.folder / "out")
    assert (site.folder / "out" / "scsi0.raw").read_bytes() == CONTENT
    assert site.leaks() == set()


def _nbd_server_first(command: list[str]) -> list[str]:
    """The daemon wants it before exports."""
    at = command.index("--nbd-server")
    server = command[at : at + 2]
    return [command[0], *server, *command[1:at], *command[at + 2 :]]


def test_jobs_of_the_server(site: Site, tmp_path: Path) -> None:
    """gc, check of all data, retention, and a sync to a folder, in a process that has no key."""
    config = tmp_path / "server.toml"
    config.write_text(
        f'[repositories.{NAME}]\npath = "{site.process.folder}"\nretention = {{ last = 1 }}\n'
        '[repositories.main.tasks.full-check]\nkind = "check"\nread-data = true\n'
        '[repositories.main.tasks.keep-one]\nkind = "forget"\n'
        f'[repositories.main.tasks.copy]\nkind = "sync"\nto = "{tmp_path / "copy"}"\n'
        f'[repositories.main.tasks.elsewhere]\nkind = "sync"\nto = "{tmp_path / "other-key"}"\n'
    )
    key = key_of(tmp_path / "keys").fingerprint
    assert site.run("-r", tmp_path / "copy", "init", "--encrypted", "--key", key).status == 0
    assert site.run("-r", tmp_path / "other-key", "init").status == 0
    site.backup()
    second = site.backup(CHANGED)
    site.process.stop()
    site.process.options += ["--config", str(config)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASBACKUP_KEY_FOLDER", str(tmp_path / "no-keys"))
        site.process.start()
    site.proxy._target = site.process.port
    assert [_job(site, task)["state"] for task in ("full-check", "copy", "keep-one", "gc", "full-check")] == (
        ["succeeded"] * 5
    )
    refused = _job(site, "elsewhere")
    assert (refused["state"], refused["error"]) == ("failed", "key-mismatch")
    assert key in refused["result"]
    (left,) = site.json("snapshots")["snapshots"]
    assert left["id"] == second["id"]
    with Repository.open(str(tmp_path / "copy")) as copy:
        opened = SealedPeer(LocalPeer(copy), key_of(tmp_path / "keys"))
        disks = [restored(opened, snapshot)["scsi0"] for snapshot in opened.snapshots()]
    assert disks == [CONTENT, CHANGED]
    site.ok("restore", "vm/100", "--to", tmp_path / "out")
    assert (tmp_path / "out" / "scsi0.raw").read_bytes() == CHANGED


def _job(site: Site, task: str) -> dict[str, Any]:
    api = f"http://127.0.0.1:{site.process.port}/v1/repositories/{NAME}/jobs"
    job: dict[str, Any] = HTTP.request("POST", api, json={"task": task}).json()
    assert "id" in job, job
    deadline = time.monotonic() + 60
    while job["ended"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        job = HTTP.request("GET", f"{api}/{job['id']}").json()
    return job


# --- several clients


KEY = MasterKey(bytes(range(32)))


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Running]:
    """A server in this process that wants tokens."""
    Repository.create(str(tmp_path / "sealed"), key_fingerprint=KEY.fingerprint).close()
    with serving(tmp_path / "sealed", token_gate) as running:
        yield running


@pytest.mark.parametrize("where", ["server", "folder"])
def test_two_clients_back_up_the_same_vm_at_once(sealed: Running, where: str) -> None:
    """Each numbers its snapshot, and again when the other one was quicker."""
    tokens = [grant(sealed.folder, Right.BACKUP) for _ in range(4)]
    start, failures = threading.Barrier(4), list[BaseException]()

    def work(number: int) -> None:
        try:
            with sealed.peer(tokens[number]) as stored:
                peer: Peer = SealedPeer(stored if where == "server" else sealed.local(), KEY)
                start.wait()
                for times in range(3):
                    content = random.Random(10 * number + times).randbytes(8192)
                    backup(peer, request({"scsi0": content}, VmName("vm/100")))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = SealedPeer(sealed.local(), KEY).snapshots()
    assert [s.manifest.sequence for s in found] == list(range(1, 13))
    assert [s.manifest.parent for s in found] == [None, *(s.id for s in found[:-1])]


@pytest.mark.parametrize("isolated", [False, True])
def test_clients_that_may_only_add(sealed: Running, isolated: bool) -> None:
    content = {"scsi0": CONTENT, "a.conf": b"a"}
    others = grant(sealed.folder, Right.ADMIN)
    with sealed.peer(others) as stored:
        backup(SealedPeer(stored, KEY), request(content, VmName("vm/200")))
    token = grant(sealed.folder, Right.BACKUP, isolated=isolated, vms=("vm/100",))
    with sealed.peer(token) as stored:
        peer = SealedPeer(stored, KEY)
        first = backup(peer, request(content, VmName("vm/100")))
        second = backup(peer, request(content, VmName("vm/100")))
        assert (first.manifest.stats.new_bytes > 0) == isolated
        assert second.manifest.stats.new_bytes == 0
        for skew_ms in (-2 * MAX_CLOCK_SKEW_MS, 2 * MAX_CLOCK_SKEW_MS):
            with pytest.raises(ClockSkewed):
                late = SystemClock().now_ms() + skew_ms
                backup(peer, request(content, VmName("vm/100"), time_ms=late))
        assert [s.id for s in peer.snapshots(DEFAULT_NAMESPACE, VmName("vm/100"))] == [first.id, second.id]
    opened = SealedPeer(sealed.local(), KEY)
    assert restored(opened, opened.find("vm/100", DEFAULT_NAMESPACE)) == content


def test_rekeying_over_http(sealed: Running, tmp_path: Path) -> None:
    """From a plain server to one with a key, and on to a folder with another key."""
    content = {"scsi0": CONTENT, "a.conf": b"a"}
    with serving(tmp_path / "plain", token_gate) as plain:
        made = backup(plain.local(), request(content, VmName("vm/100")))
        reader = grant(plain.folder, Right.RESTORE, vms=("vm/100",), isolated=True)
        writer = grant(sealed.folder, Right.BACKUP, Right.PRUNE)
        with plain.peer(reader) as source, sealed.peer(writer) as stored:
            report = rekey(source, SealedPeer(stored, KEY), SyncRequest())
            assert report.expected.content_bytes is None  # an isolated token is not told what others have, too
            assert (report.sync.is_complete, report.sync.total.chunks > 0) == (True, True)
            assert rekey(source, SealedPeer(stored, KEY), SyncRequest()).read_bytes == 0
    (copy,) = SealedPeer(sealed.local(), KEY).snapshots()
    assert (copy.manifest.copy_of, copy.manifest.time_ms) == (made.id, made.manifest.time_ms)
    other = MasterKey(bytes(32))
    reader = grant(sealed.folder, Right.RESTORE)
    with (
        Repository.create(str(tmp_path / "other"), key_fingerprint=other.fingerprint) as repository,
        sealed.peer(reader) as source,
    ):
        target = SealedPeer(LocalPeer(repository), other)
        report = rekey(SealedPeer(source, KEY), target, SyncRequest())
        assert report.expected.content_bytes == report.read_bytes > 6 * MiB
        assert restored(target, target.snapshots()[0]) == content
    with sealed.peer(grant(sealed.folder, Right.BACKUP)) as stored:
        peer = SealedPeer(stored, KEY)
        session = peer.open_session(DEFAULT_NAMESPACE, VmName("vm/100"))
        with pytest.raises(RightMissing, match="prune"):  # who copies decides about times and pins
            session.adopt(peer.as_stored(copy.manifest))
        session.abort()


def _document(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    text = ""
    while not text.rstrip("\n").endswith("\n}"):
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        text += line
    return json.loads(text)


@contextlib.contextmanager
def _short_folder() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="cbe-", dir="/tmp") as folder:
        yield Path(folder)
