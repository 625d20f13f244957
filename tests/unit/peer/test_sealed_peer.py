"""Encrypted repositories as whoever has the key sees them, and what those can do who have not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from casbackup.codec.codec import keyed_codec
from casbackup.codec.master_key import MasterKey
from casbackup.codec.sealing import ManifestSeal
from casbackup.errors import CommitOutdated, KeyMismatch, ManifestForged, SnapshotRolledBack, UsageError
from casbackup.ids import DEFAULT_NAMESPACE, SnapshotId, VmName
from casbackup.peer.api import Peer
from casbackup.peer.local import LocalPeer
from casbackup.peer.sealed import SealedPeer
from casbackup.peer.seen import Seen, SeenFolder
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.spec.manifest import encode_manifest
from casbackup.testing.peer import TIME_MS, VM, BlobMaker, PeerConformance, committed, stored_disk

KEY = MasterKey(bytes(range(32)))
MAKE = BlobMaker(keyed_codec(KEY))
SEAL = ManifestSeal(KEY)
WITHOUT_A_KEY = {"a_node_with_a_wrong_id_is_refused"}
"""What a repository cannot do that does not know how ids are computed."""
CHECKS = [name for name, _ in PeerConformance(None).checks() if name not in WITHOUT_A_KEY]  # type: ignore[arg-type]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: str, tmp_path: Path) -> None:
    @contextmanager
    def opened() -> Iterator[Peer]:
        path = str(tmp_path / "repository")
        with Repository.create(path, key_fingerprint=KEY.fingerprint) as repository:
            yield SealedPeer(LocalPeer(repository), KEY)

    dict(PeerConformance(opened, MAKE.codec, SEAL.seal).checks())[check]()


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with Repository.create(str(tmp_path / "repository"), key_fingerprint=KEY.fingerprint) as made:
        yield made


@pytest.fixture
def seen(tmp_path: Path) -> SeenFolder:
    return SeenFolder(str(tmp_path / "seen"))


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def peer(repository: Repository, seen: SeenFolder, warnings: list[str]) -> SealedPeer:
    return SealedPeer(LocalPeer(repository), KEY, seen, warnings.append)


def manifest_path(repository: Repository, snapshot: Snapshot) -> str:
    return repository.layout.manifest(snapshot.key)


def made(peer: SealedPeer, number: int) -> Snapshot:
    return committed(peer, b"disk %d" % number, time_ms=TIME_MS + number)


def test_the_key_must_be_the_right_one(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(KeyMismatch, match=KEY.fingerprint):
        SealedPeer(LocalPeer(repository), MasterKey(bytes(32)))
    with Repository.create(str(tmp_path / "plain")) as plain, pytest.raises(KeyMismatch, match="none"):
        SealedPeer(LocalPeer(plain), KEY)


def test_what_is_private_is_seen_with_the_key_only(repository: Repository, peer: SealedPeer) -> None:
    session = peer.open_session(DEFAULT_NAMESPACE, VM)
    draft = stored_disk(session, b"content", make=MAKE, notes="secret", host="secret-host")
    snapshot = session.commit(draft)
    assert (snapshot.notes, snapshot.manifest.host) == ("secret", "secret-host")
    assert peer.find("vm/100", DEFAULT_NAMESPACE) == snapshot == peer.snapshots()[0]
    stored = repository.catalog.all()[0]
    assert (stored.notes, stored.manifest.host, stored.id) == ("", "", snapshot.id)

    changed = peer.annotate(snapshot, notes="secret too", pinned=True)
    assert (changed.notes, peer.snapshots()[0].notes, peer.snapshots()[0].pinned) == ("secret too",) * 2 + (True,)
    with open(repository.layout.sidecar(snapshot.key), "rb") as file:
        assert b"secret" not in file.read()


def test_snapshots_are_chained(repository: Repository, peer: SealedPeer) -> None:
    first, second = made(peer, 1), made(peer, 2)
    assert (first.manifest.sequence, first.manifest.parent) == (1, None)
    assert (second.manifest.sequence, second.manifest.parent) == (2, first.id)


# --- forging


def rewrite(repository: Repository, snapshot: Snapshot, **changes: object) -> None:
    """What somebody can do who can write to the repository: a manifest whose checksums are right."""
    forged = replace(repository.catalog.all()[0].manifest, **changes)  # type: ignore[arg-type]
    data, _ = encode_manifest(forged)
    with open(manifest_path(repository, snapshot), "wb") as file:
        file.write(data)
    repository.index.write(lambda txn: txn.drop(repository.index.snapshots, delete=False))


@pytest.mark.parametrize("how", ["root swapped", "seal removed", "seal of another"])
def test_a_forged_manifest_is_refused_and_the_others_are_not(
    repository: Repository, peer: SealedPeer, how: str
) -> None:
    good = committed(peer, b"other", vm=VmName("vm/200"))
    snapshot = made(peer, 1)
    other = next(s.manifest for s in repository.catalog.all() if s.id == good.id)
    rewrite(
        repository,
        snapshot,
        **{
            "root swapped": {"disks": (replace(snapshot.manifest.disks[0], root=other.disks[0].root),)},
            "seal removed": {"sealed": b""},
            "seal of another": {"sealed": other.sealed},
        }[how],
    )
    with pytest.raises(ManifestForged, match="vm/100"):
        peer.find("vm/100", DEFAULT_NAMESPACE)
    with pytest.raises(ManifestForged, match="vm/100"):
        peer.snapshots()
    found, damaged = peer.survey()
    assert ([s.id for s in found], [type(error) for error in damaged]) == ([good.id], [ManifestForged])


def test_an_old_manifest_is_not_shown_as_a_new_one(repository: Repository, peer: SealedPeer) -> None:
    """Its time is in its name, and sealed in it."""
    old, new = made(peer, 1), made(peer, 2)
    os.replace(manifest_path(repository, old), manifest_path(repository, new))
    repository.index.write(lambda txn: txn.drop(repository.index.snapshots, delete=False))
    found, damaged = peer.survey()
    assert found == []
    assert "is that of" in str(damaged[0])


def test_a_manifest_that_is_not_sealed_is_not_committed_by_a_server(repository: Repository) -> None:
    from casbackup_server.arrival import check_draft

    session = repository.sessions.open(DEFAULT_NAMESPACE, VM)
    with pytest.raises(UsageError, match="sealed"):
        check_draft(repository, stored_disk(session, b"content", make=MAKE))
    session.abort()


# --- rolling back


def roll_back(repository: Repository, snapshot: Snapshot) -> None:
    os.remove(manifest_path(repository, snapshot))
    repository.index.write(lambda txn: txn.drop(repository.index.snapshots, delete=False))


def test_a_removed_newest_snapshot_is_noticed(
    repository: Repository, peer: SealedPeer, warnings: list[str], seen: SeenFolder
) -> None:
    first, second = made(peer, 1), made(peer, 2)
    roll_back(repository, second)
    for reference in ("vm/100", "vm/100@latest"):
        with pytest.raises(SnapshotRolledBack, match=second.id[:16]):
            peer.find(reference, DEFAULT_NAMESPACE)
    assert peer.find(f"vm/100@{first.id[:8]}", DEFAULT_NAMESPACE) == first, "named, it can be had"
    assert peer.snapshots() == [first]
    assert not warnings

    third = made(peer, 3)
    assert [second.id[:16] in text for text in warnings] == [True]
    assert peer.find("vm/100", DEFAULT_NAMESPACE) == third, "from here on it is known"


def test_a_branch_is_noticed(repository: Repository, peer: SealedPeer) -> None:
    """The repository was copied, put back, and another client went on with it."""
    made(peer, 1)
    roll_back(repository, made(peer, 2))
    other = SealedPeer(LocalPeer(repository), KEY)
    branch = made(other, 4)
    assert branch.manifest.sequence == 2
    with pytest.raises(SnapshotRolledBack):
        peer.find("vm/100", DEFAULT_NAMESPACE)


def test_an_empty_repository_in_the_place_of_a_full_one_is_told(
    repository: Repository, peer: SealedPeer, warnings: list[str]
) -> None:
    roll_back(repository, made(peer, 1))
    made(peer, 2)
    assert ["are gone" in text for text in warnings] == [True]


def test_what_this_client_forgets_is_no_rollback(peer: SealedPeer, warnings: list[str]) -> None:
    first, second = made(peer, 1), made(peer, 2)
    peer.remove([second])
    assert peer.find("vm/100", DEFAULT_NAMESPACE) == first
    peer.remove([first])
    made(peer, 3)
    assert not warnings


def test_others_snapshots_are_remembered_when_they_are_seen(
    repository: Repository, peer: SealedPeer, seen: SeenFolder
) -> None:
    made(peer, 1)
    second = made(SealedPeer(LocalPeer(repository), KEY), 2)
    peer.snapshots()
    assert seen.newest(repository.config.repository_id, DEFAULT_NAMESPACE, VM) == Seen(2, second.id)


def test_two_clients_commit_at_once(repository: Repository, peer: SealedPeer) -> None:
    """Whoever comes second numbers and seals its manifest anew."""
    session = peer.open_session(DEFAULT_NAMESPACE, VM)
    draft = stored_disk(session, b"mine", make=MAKE)
    inner = session._session

    class Overtaken:
        """Another client commits right before the first try."""

        def __init__(self) -> None:
            self.tries = 0

        def commit(self, manifest: object) -> Snapshot:
            self.tries += 1
            if self.tries == 1:
                committed(SealedPeer(LocalPeer(repository), KEY), b"other")
            return inner.commit(manifest)  # type: ignore[arg-type]

    overtaken = Overtaken()
    mine = peer.commit(overtaken, draft)  # type: ignore[arg-type]
    assert (overtaken.tries, mine.manifest.sequence) == (2, 2)
    assert [s.manifest.sequence for s in peer.snapshots()] == [1, 2]


def test_a_client_that_is_always_overtaken_gives_up(peer: SealedPeer) -> None:
    class Never:
        def commit(self, manifest: object) -> Snapshot:
            raise CommitOutdated("again")

    session = peer.open_session(DEFAULT_NAMESPACE, VM)
    with pytest.raises(CommitOutdated, match="again and again"):
        peer.commit(Never(), stored_disk(session, b"mine", make=MAKE))  # type: ignore[arg-type]
    session.abort()


# --- what was seen


def test_what_was_seen_is_remembered_and_forgotten(tmp_path: Path) -> None:
    folder = SeenFolder(str(tmp_path / "a" / "b"))
    vm = VmName("vm/1")
    newest = Seen(3, SnapshotId("ab" * 32))
    assert folder.newest("r", DEFAULT_NAMESPACE, vm) is None
    folder.note("r", DEFAULT_NAMESPACE, vm, newest)
    folder.note_key_at("/backup", KEY.fingerprint)
    again = SeenFolder(str(tmp_path / "a" / "b"))
    assert again.newest("r", DEFAULT_NAMESPACE, vm) == newest
    assert again.newest("other", DEFAULT_NAMESPACE, vm) is None
    assert (again.key_at("/backup"), again.key_at("/other")) == (KEY.fingerprint, None)
    again.note("r", DEFAULT_NAMESPACE, vm, None)
    again.note_key_at("/backup", None)
    assert folder.newest("r", DEFAULT_NAMESPACE, vm) is folder.key_at("/backup") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"default:vm/1": 7}', b'{"default:vm/1": [1, "x"]}', b"\xff"])
def test_a_damaged_memory_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    folder = SeenFolder(str(tmp_path))
    assert folder.newest("r", DEFAULT_NAMESPACE, VmName("vm/1")) is None
    folder.note("r", DEFAULT_NAMESPACE, VmName("vm/2"), Seen(1, SnapshotId("cd" * 32)))
    assert json.loads((tmp_path / "r.json").read_bytes())["default:vm/2"] == [1, "cd" * 32]


def test_a_memory_that_cannot_be_written_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = SeenFolder(str(tmp_path / "file" / "below"))
    folder.note("r", DEFAULT_NAMESPACE, VM, Seen(1, SnapshotId("cd" * 32)))
    assert folder.newest("r", DEFAULT_NAMESPACE, VM) is None
