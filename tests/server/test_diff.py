"""Comparing snapshots over HTTP: the server finds where they differ, and little travels."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3

from casbackup.errors import BlobMissing, RightMissing, ServerBusy, ServerProtocolError, SnapshotNotFound
from casbackup.ids import DiskName
from casbackup.limits import MAX_REST_READERS, SEGMENT_BYTES
from casbackup.peer.differing import walked_ranges
from casbackup.peer.http.address import parse_address
from casbackup.peer.http.diffs import read_diff
from casbackup.peer.http.peer import HttpPeer
from casbackup.peer.http.rest import RestClient
from casbackup.peer.http.transport import Credentials, Transport
from casbackup.repository.catalog import Snapshot
from casbackup_server.rights import Right
from casbackup_server.routes import diffs

from .conftest import NAME, Result, Running, grant
from .proxy import Proxy

HTTP = urllib3.PoolManager(retries=False)
DISK = DiskName("scsi0")
MiB = 1024 * 1024
Run = Callable[..., Result]


@pytest.fixture
def pair(running: Running, tmp_path: Path, run: Run) -> tuple[Snapshot, Snapshot]:
    """Two snapshots of a disk of 40 MiB that was changed in 60 places; the second one has another disk, too."""
    return backed_up(running, tmp_path, run)


def backed_up(running: Running, folder: Path, run: Run) -> tuple[Snapshot, Snapshot]:
    source, other = folder / "disk.raw", folder / "other.raw"
    source.write_bytes(random.Random(1).randbytes(40 * MiB))
    other.write_bytes(b"x" * 100_000)
    assert run("-r", running.folder, "backup", "vm/100", f"scsi0={source}").status == 0
    place = random.Random(2)
    with source.open("r+b") as file:
        for _ in range(60):
            file.seek(place.randrange(40 * MiB))
            file.write(b"changed")
    assert run("-r", running.folder, "backup", "vm/100", f"scsi0={source}", f"scsi1={other}").status == 0
    old, new = running.repository.catalog.all()
    return old, new


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Requests by the last part of their path."""
    found: Counter[str] = Counter()
    once = Transport._answer

    def counting(self: Transport, method: str, path: str, *rest: Any) -> Any:
        found[path.partition("?")[0].rpartition("/")[2]] += 1
        return once(self, method, path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transport, "_answer", counting)
        yield found


def test_the_command_says_the_same_as_of_the_folder(
    running: Running, pair: tuple[Snapshot, Snapshot], run: Run
) -> None:
    arguments = ("diff", pair[0].id, pair[1].id, "--json")
    here = run("-r", running.folder, *arguments)
    with counted() as requests:
        there = run("-r", running.url, *arguments)
    assert (here.status, there.status) == (0, 0), there.err
    assert json.loads(here.out) == json.loads(there.out)
    assert [(d["disk"], d["old_size_bytes"]) for d in json.loads(there.out)["disks"]] == [
        ("scsi0", 40 * MiB),
        ("scsi1", None),
    ]
    assert requests["diff"] == 2
    assert requests["fetch"] == 0


def test_fewer_bytes_and_round_trips_than_walking_the_trees(running: Running, pair: tuple[Snapshot, Snapshot]) -> None:
    with Proxy(running.port) as proxy, HttpPeer(parse_address(f"http://127.0.0.1:{proxy.port}/{NAME}")) as peer:
        with counted() as requests:
            found = peer.differing(*pair, DISK)
        passed = proxy.passed_bytes
        with counted() as walking:
            assert list(walked_ranges(peer, *pair, DISK)) == found
        assert len(found) > 30
        assert requests.total() == 1
        assert walking.total() > 20
        assert passed * 5 < proxy.passed_bytes - passed


def test_the_client(running: Running, pair: tuple[Snapshot, Snapshot]) -> None:
    with RestClient(parse_address(running.url)) as client:
        old, new = client.snapshots()
        first, second = client.diff(old, new)
        assert (first.disk, first.old_size_bytes, first.new_size_bytes) == ("scsi0", 40 * MiB, 40 * MiB)
        assert first.ranges == list(running.local().differing(*pair, DISK))
        assert (second.disk, second.old_size_bytes, second.new_size_bytes) == ("scsi1", None, 100_000)
        assert sum(item.length for item in second.ranges) == 100_000
        assert [item.ranges for item in client.diff(new, new)] == [[], []]
        assert client.diff(old, new, disks=("scsi1",)) == [second]
        with pytest.raises(SnapshotNotFound, match="neither"):
            client.diff(old, new, disks=("ide0",))


def test_many_pieces(running: Running, pair: tuple[Snapshot, Snapshot], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffs, "_PIECE_BYTES", 10)
    with running.peer() as peer:
        assert peer.differing(*pair, DISK) == list(running.local().differing(*pair, DISK))


def test_what_a_token_must_be_good_for(guarded: Running, tmp_path: Path, run: Run) -> None:
    pair = backed_up(guarded, tmp_path, run)

    def asked(token: str) -> Any:
        with guarded.peer(token) as peer:
            return peer.differing(*pair, DISK)

    assert asked(grant(guarded.folder, Right.RESTORE, isolated=True, vms=("vm/100",)))
    with pytest.raises(RightMissing):
        asked(grant(guarded.folder, Right.READ))
    with pytest.raises(SnapshotNotFound):
        asked(grant(guarded.folder, Right.RESTORE, vms=("vm/1",)))


def test_damage_is_said_also_in_the_middle(
    running: Running, pair: tuple[Snapshot, Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> Iterator[object]:
        yield from walked_ranges(*_)  # type: ignore[arg-type]
        raise BlobMissing("a node is lost")

    monkeypatch.setattr(diffs, "walked_ranges", lost)
    with running.peer() as peer:
        with pytest.raises(BlobMissing, match="a node is lost"):
            peer.differing(*pair, DISK)
        monkeypatch.setattr(diffs, "_PIECE_BYTES", 10)
        with pytest.raises(BlobMissing, match="a node is lost"):
            peer.differing(*pair, DISK)


def test_no_more_than_so_many_at_once(running: Running, pair: tuple[Snapshot, Snapshot]) -> None:
    reading = running.server.repositories[NAME].reading
    leases = [reading.acquire(pair[0]) for _ in range(MAX_REST_READERS - 1)]
    with running.peer(patience_s=0.2) as peer, pytest.raises(ServerBusy):
        peer.differing(*pair, DISK)
    for lease in leases:
        lease.end()
    with running.peer() as peer:
        assert peer.differing(*pair, DISK)
    require_nothing_kept(running)


def require_nothing_kept(running: Running) -> None:
    """Snapshots stay open for a while, but not for ever: nobody reads them."""
    deadline_s = time.monotonic() + 10
    while running.repository.sessions.all():
        assert time.monotonic() < deadline_s
        running.server.repositories[NAME].reading.close_idle(-1)


@pytest.mark.parametrize(
    ("query", "status"),
    [("", 422), ("to=xyz", 422), ("to=" + "0" * 64, 404), ("to={new}&disk=../x", 400), ("to={new}&disk=ide0", 404)],
)
def test_bad_requests(running: Running, pair: tuple[Snapshot, Snapshot], query: str, status: int) -> None:
    text = query.format(new=pair[1].id)
    answer = HTTP.request("GET", f"{running.api}/snapshots/{pair[0].id}/diff?{text}")
    assert answer.status == status
    assert answer.json()["status"] == status
    require_nothing_kept(running)


@pytest.mark.parametrize(
    "body", [b"rubbish\n", b"[]\n", b'{"offset":1,"length":2}\n', b'{"disk":1}\n', b"x" * 200_000, b'{"no":1}\n']
)
def test_answers_that_make_no_sense(body: bytes) -> None:
    class Answer:
        def __init__(self) -> None:
            self.parts = [body]

        def read(self, _: int) -> bytes:
            return self.parts.pop() if self.parts else b""

    class Strange:
        @contextlib.contextmanager
        def stream(self, _method: str, _path: str) -> Iterator[Answer]:
            yield Answer()

    with pytest.raises(ServerProtocolError):
        read_diff(Strange(), "/x")  # type: ignore[arg-type]


def test_disks_of_other_sizes(running: Running, tmp_path: Path, run: Run) -> None:
    for size in (SEGMENT_BYTES + 5000, 3 * SEGMENT_BYTES):
        (tmp_path / "disk.raw").write_bytes(random.Random(3).randbytes(size))
        assert run("-r", running.url, "backup", "vm/100", f"scsi0={tmp_path / 'disk.raw'}").status == 0
    old, new = running.repository.catalog.all()
    with RestClient(parse_address(running.url), Credentials()) as client:
        (found,) = client.diff(*client.snapshots())
    assert (found.old_size_bytes, found.new_size_bytes) == (SEGMENT_BYTES + 5000, 3 * SEGMENT_BYTES)
    assert found.ranges == list(running.local().differing(old, new, DISK))
    assert found.ranges[-1].offset + found.ranges[-1].length == 3 * SEGMENT_BYTES
