"""Copying to, from and between chunk servers: the same job, and what only a network makes necessary."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casbackup.errors import DataDamage, RightMissing, ServerUnreachable
from casbackup.jobs.heal import heal
from casbackup.jobs.sync import SyncRequest, sync
from casbackup.jobs.sync_report import SyncReport
from casbackup.peer.api import Peer
from casbackup.peer.http.address import parse_address
from casbackup.peer.http.peer import HttpPeer
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.repository import Repository
from casbackup.testing.world import changed, disk_bytes
from casbackup_server.rights import Right
from tests.server.conftest import NAME, ServerProcess, client, grant, serving, token_gate
from tests.server.proxy import Proxy
from tests.sync.conftest import DISK, OTHER_VM, Pair, Site, site
from tests.sync.peers import WatchedPeer
from tests.sync.test_heal import CHUNK, NODE, spoil
from tests.sync.test_sync import damage, outcomes

PATIENCE_S = 20.0


@contextlib.contextmanager
def reached(place: Site, how: str) -> Iterator[Peer]:
    """The site as a peer: its folder, or through a server."""
    if how == "folder":
        yield place.peer
        return
    with serving(Path(place.repository.layout.root)) as server, server.peer(patience_s=PATIENCE_S) as peer:
        yield peer


WAYS = [("folder", "server"), ("server", "folder"), ("server", "server")]


@pytest.fixture(params=WAYS, ids=["push", "pull", "between servers"])
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


def copied(pair: Pair, way: tuple[str, str], request: SyncRequest = SyncRequest()) -> SyncReport:  # noqa: B008
    with reached(pair.here, way[0]) as source, reached(pair.there, way[1]) as destination:
        return sync(source, destination, request)


def test_both_ends_get_the_same(pair: Pair, way: tuple[str, str]) -> None:
    for day in range(3):
        made = pair.here.backup({"scsi0": changed(DISK, day, 10), "vm.conf": b"x"}, OTHER_VM)
        pair.here.backup({"scsi0": disk_bytes(day, 100)})
    pair.here.peer.annotate(made, pinned=True, labels=("a",), notes="n")
    planned = copied(pair, way, SyncRequest(dry_run=True))
    assert outcomes(planned) == ["planned"] * 6
    assert pair.there.ids == []
    report = copied(pair, way)
    assert outcomes(report) == ["copied"] * 6
    assert (report.total.chunks, report.total.nodes) == (planned.total.chunks, planned.total.nodes)
    assert report.proof is not None
    assert report.proof.equal
    assert pair.here.repository.catalog.all() == pair.there.repository.catalog.all()
    pair.require_equal()
    assert pair.there.repository.sessions.all() == []
    assert pair.here.repository.sessions.all() == []
    pair.here.peer.annotate(made, notes="other")
    assert len(copied(pair, way).changed) == 1
    pair.here.peer.remove(pair.here.repository.catalog.all()[:1])
    assert len(copied(pair, way, SyncRequest(mirror=True)).removed) == 1
    pair.require_equal()


@pytest.mark.parametrize("what", ["chunk", "node", "config"])
def test_damage_is_not_spread(pair: Pair, way: tuple[str, str], what: str) -> None:
    for day in range(3):
        pair.here.backup({"scsi0": disk_bytes(day, 1100), "vm.conf": b"day %d" % day})
    made = pair.here.repository.catalog.all()
    damage(pair.here, made[1], what=what)
    report = copied(pair, way)
    assert outcomes(report) == ["copied", "failed", "copied"]
    assert isinstance(report.failed[0].error, DataDamage)
    assert pair.there.ids == [made[0].id, made[2].id]
    pair.there.require_sound()


def test_healing_from_a_server(pair: Pair) -> None:
    pair.here.backup({"scsi0": DISK, "vm.conf": b"x"})
    pair.sync()
    spoilt = spoil(pair.here, CHUNK, NODE, most=2)
    with reached(pair.there, "server") as partner:
        assert heal(pair.here.repository, partner).healed_blobs == spoilt
    pair.require_equal()


# --- rights


def test_what_a_token_must_be_good_for(pair: Pair) -> None:
    pair.here.backup({"scsi0": DISK})
    folder = Path(pair.there.repository.layout.root)
    with serving(folder, token_gate) as server:
        with server.peer(grant(folder, Right.BACKUP)) as peer, pytest.raises(RightMissing, match="prune"):
            sync(pair.here.peer, peer, SyncRequest())
        assert pair.there.ids == []
        with server.peer(grant(folder, Right.BACKUP, Right.PRUNE)) as peer:
            assert sync(pair.here.peer, peer, SyncRequest()).is_complete
        pair.require_equal()
        with server.peer(grant(folder, Right.RESTORE)) as peer:  # to pull, reading is enough
            assert sync(peer, pair.here.peer, SyncRequest()).is_complete
        with server.peer(grant(folder, Right.READ)) as peer, pytest.raises(RightMissing, match="restore"):
            sync(peer, site(folder.parent / "third").peer, SyncRequest())


def test_an_isolated_token_sends_what_it_may_not_know_of(pair: Pair) -> None:
    pair.there.backup({"scsi0": DISK}, OTHER_VM)
    pair.here.clock.pass_time(60)
    pair.here.backup({"scsi0": DISK, "vm.conf": b"x"})
    folder = Path(pair.there.repository.layout.root)
    with serving(folder, token_gate) as server:
        token = grant(folder, Right.BACKUP, Right.PRUNE, isolated=True, vms=("vm/100",))
        with server.peer(token) as peer:
            report = sync(pair.here.peer, peer, SyncRequest())
    assert report.is_complete
    assert report.total.chunks > 50
    assert set(pair.here.ids) < set(pair.there.ids)
    pair.there.require_sound()


# --- bad links


@contextlib.contextmanager
def cut_often(proxy: Proxy, after_bytes: int, times: int) -> Iterator[None]:
    """Break all connections whenever so much has passed."""
    over = threading.Event()

    def work() -> None:
        while proxy.cuts < times and not over.wait(0.005):
            if proxy.cut_after_bytes is None:
                proxy.cut_after_bytes = after_bytes

    cutter = threading.Thread(target=work)
    cutter.start()
    try:
        yield
    finally:
        over.set()
        cutter.join()


@pytest.mark.parametrize("which", ["source", "destination"])
def test_connections_that_break_again_and_again(pair: Pair, which: str) -> None:
    """The sync goes on by itself, with what had come through."""
    for day in range(2):
        pair.here.backup({"scsi0": disk_bytes(day, 4000)})
    end = pair.here if which == "source" else pair.there
    with serving(Path(end.repository.layout.root)) as server, Proxy(server.port, bytes_per_s=20e6) as proxy:
        address = parse_address(f"http://127.0.0.1:{proxy.port}/{NAME}")
        with HttpPeer(address, patience_s=PATIENCE_S) as remote, cut_often(proxy, 5_000_000, 4):
            ends = (remote, pair.there.peer) if which == "source" else (pair.here.peer, remote)
            report = sync(*ends, SyncRequest())
    assert report.is_complete
    assert proxy.cuts >= 4
    pair.require_equal()


def test_a_link_that_stays_down(pair: Pair) -> None:
    pair.here.backup({"scsi0": disk_bytes(1, 4000)})
    with serving(Path(pair.there.repository.layout.root)) as server:
        with Proxy(server.port) as proxy:
            peer = HttpPeer(parse_address(f"http://127.0.0.1:{proxy.port}/{NAME}"), patience_s=0.5)
            with peer:
                source = WatchedPeer(pair.here.peer)
                source.before = lambda what: proxy.__exit__(None, None, None) if what == "fetch" else None
                with pytest.raises(ServerUnreachable):
                    sync(source, peer, SyncRequest())
        assert pair.there.ids == []
        with server.peer() as peer:
            assert sync(pair.here.peer, peer, SyncRequest()).is_complete
    pair.require_equal()


# --- kills


class Sites:
    """Two server processes, with repositories that are only looked at while these are down."""

    def __init__(self, folder: Path, disks: int) -> None:
        self.processes = [ServerProcess(folder / "here"), ServerProcess(folder / "there")]
        made = site(folder / "here")
        for day in range(disks):
            made.backup({"scsi0": disk_bytes(day, 2500), "vm.conf": b"%d" % day})
        self.ids = made.ids
        made.repository.close()
        site(folder / "there").repository.close()

    def urls(self) -> list[str]:
        return [process.url for process in self.processes]

    def start(self) -> None:
        for process in self.processes:
            if process.process is None:
                process.start()

    def stop(self) -> None:
        for process in self.processes:
            if process.process is not None:
                process.kill()

    def require_sound(self, *, complete: bool) -> set[str]:
        """Both sides check clean; returns what was copied."""
        found: list[set[str]] = []
        for process in self.processes:
            with Repository.open(str(process.folder)) as repository:
                report = check(repository, CheckOptions(read_data=True))
                assert not report.damaged, report.findings
                found.append({snapshot.id for snapshot in repository.catalog.all()})
        assert found[0] == set(self.ids)
        assert found[1] == found[0] if complete else found[1] <= found[0]
        return found[1]


def kill_rounds(folder: Path, rounds: int, seed: int) -> None:
    source = random.Random(seed)
    sites = Sites(folder, 4)
    there: set[str] = set()
    try:
        for _ in range(rounds):
            sites.start()
            process = client("sync", *sites.urls())
            time.sleep(source.uniform(0.2, 2.0))
            victim = source.choice(["sync", "source", "destination"])
            if victim == "sync":
                process.send_signal(signal.SIGKILL)
                process.communicate()
            else:
                end = sites.processes[victim == "destination"]
                end.kill()
                end.start()
                out, err = process.communicate(timeout=100)
                # A server that is down when it is first spoken to is not waited for.
                assert process.returncode == 0 or "cannot be reached" in err, (out, err)
            sites.stop()
            now = sites.require_sound(complete=process.returncode == 0)
            assert there <= now, "what was copied stays"
            there = now
            if there == set(sites.ids):
                with Repository.open(str(sites.processes[1].folder)) as repository:
                    repository.catalog.remove(repository.catalog.all()[source.randrange(4) :])
                    there = {snapshot.id for snapshot in repository.catalog.all()}
        sites.start()
        process = client("sync", *sites.urls())
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, (out, err)
    finally:
        sites.stop()
    sites.require_sound(complete=True)


def test_a_few_kills(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 4, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 100, seed=2)
