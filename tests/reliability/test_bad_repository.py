"""Folders that are no repository, or not a sound one: each is told apart by its error, and nothing in them is lost."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from casbackup.errors import (
    ConfigDamaged,
    IndexMissing,
    MigrationNeeded,
    NotARepository,
    RepositoryBusy,
    RepositoryExists,
    RepositoryNotFound,
    RepositoryReadOnly,
    SessionBusy,
    SessionNotFound,
    TargetUnsuitable,
    UnsupportedFormat,
)
from casbackup.ids import DEFAULT_NAMESPACE, SessionId
from casbackup.jobs.backup import backup
from casbackup.peer.local import LocalPeer
from casbackup.repository.check import CheckOptions, check
from casbackup.repository.gc import execute_gc, plan_gc
from casbackup.repository.rebuild import rebuild_index
from casbackup.repository.repository import Repository
from casbackup.testing.clock import FakeClock
from casbackup.testing.world import VM, Content, contents, disk_bytes, request

CONTENT: Content = {"scsi0": disk_bytes(1, 100, tail=5), "qemu-server.conf": b"cores: 2\n"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one snapshot, closed."""
    path = tmp_path / "repository"
    with Repository.create(str(path)) as made:
        backup(LocalPeer(made), request(CONTENT))
    return path


def verify(root: Path, count: int = 1) -> None:
    with Repository.open(str(root)) as repository:
        assert not check(repository, CheckOptions(read_data=True)).damaged
        assert [contents(repository, s) for s in repository.catalog.all()] == [CONTENT] * count


def files(root: Path) -> dict[str, bytes]:
    """Everything that lasts, without locks."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "locks" not in path.parts and path.name != "lock.mdb"
    }


# --- opening


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFound):
        Repository.open(str(tmp_path / "absent"))
    with pytest.raises(RepositoryNotFound):
        rebuild_index(str(tmp_path / "absent"))
    assert not list(tmp_path.iterdir())


def test_not_a_repository(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("photos")
    for use in (Repository.open, rebuild_index):
        with pytest.raises(NotARepository):
            use(str(tmp_path))
    with pytest.raises(NotARepository):
        Repository.open(str(tmp_path / "holiday.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


def test_a_newer_and_an_older_format(root: Path) -> None:
    path = root / "config.json"
    content = json.loads(path.read_text())
    for number, error in ((content["format"] + 1, UnsupportedFormat), (content["format"] - 1, MigrationNeeded)):
        path.write_text(json.dumps({**content, "format": number, "unheard of": True}))
        before = files(root)
        with pytest.raises(error):
            Repository.open(str(root))
        with pytest.raises(error):
            rebuild_index(str(root))
        assert files(root) == before
    path.write_text(json.dumps(content))
    verify(root)


def test_a_migration_that_was_interrupted(root: Path) -> None:
    (root / "migration.json").write_text("{}")
    for use in (Repository.open, rebuild_index):
        with pytest.raises(MigrationNeeded):
            use(str(root))


# --- index and config


def test_a_missing_index(root: Path) -> None:
    shutil.rmtree(root / "index")
    with pytest.raises(IndexMissing):
        Repository.open(str(root))
    rebuild_index(str(root))
    verify(root)


def test_an_index_of_another_repository(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    Repository.create(str(other)).close()
    shutil.rmtree(root / "index")
    shutil.copytree(other / "index", root / "index")
    with pytest.raises(IndexMissing, match="another repository"):
        Repository.open(str(root))
    rebuild_index(str(root))
    verify(root)


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 300, b"[]", b'{"casbackup": "repository", "format": 1}'])
def test_a_damaged_config_is_put_back(root: Path, damage: bytes) -> None:
    good = (root / "config.json").read_bytes()
    (root / "config.json").write_bytes(damage)
    with pytest.raises(ConfigDamaged):
        Repository.open(str(root))
    report = rebuild_index(str(root))
    assert any("config.json" in note for note in report.notes)
    assert (root / "config.json").read_bytes() == good
    verify(root)


def test_a_damaged_config_without_a_good_copy(root: Path) -> None:
    for name in ("config.json", "config.json.backup"):
        (root / name).write_bytes(b"?")
    before = files(root)
    with pytest.raises(ConfigDamaged):
        rebuild_index(str(root))
    (root / "config.json.backup").unlink()
    with pytest.raises(ConfigDamaged):
        rebuild_index(str(root))
    before.pop("config.json.backup")
    assert files(root) == before


def test_a_missing_config(root: Path) -> None:
    """As the how-to says: put the copy in its place, then rebuild the index."""
    (root / "config.json").unlink()
    for use in (Repository.open, rebuild_index):
        with pytest.raises(NotARepository):
            use(str(root))
    with pytest.raises(RepositoryExists):
        Repository.create(str(root))
    shutil.copy(root / "config.json.backup", root / "config.json")
    verify(root)
    rebuild_index(str(root))
    verify(root)


def test_rebuilding_while_it_is_in_use(root: Path) -> None:
    with Repository.open(str(root)), pytest.raises(RepositoryBusy):
        rebuild_index(str(root))
    verify(root)


# --- the folder


def test_moved_to_another_path(root: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "deep"
    moved.parent.mkdir()
    root.rename(moved)
    with pytest.raises(RepositoryNotFound):
        Repository.open(str(root))
    verify(moved)
    with Repository.open(str(moved)) as repository:
        backup(LocalPeer(repository), request(CONTENT))
    verify(moved, 2)
    copied = tmp_path / "copied"  # as the how-to says: without index and locks
    shutil.copytree(moved, copied, ignore=shutil.ignore_patterns("index", "locks"))
    rebuild_index(str(copied))
    verify(copied, 2)


def test_opened_for_reading(root: Path) -> None:
    """It can be checked and restored; what would change it is refused."""
    with Repository.open(str(root), read_only=True) as repository:
        assert repository.read_only
        assert not check(repository, CheckOptions(read_data=True)).findings
        snapshot = repository.catalog.find(VM)
        assert contents(repository, snapshot) == CONTENT
        with LocalPeer(repository).reading(snapshot):
            pass
        with pytest.raises(RepositoryReadOnly):
            backup(LocalPeer(repository), request(CONTENT))
        with pytest.raises(RepositoryReadOnly), repository.maintenance():
            pass
        with pytest.raises(RepositoryReadOnly):
            execute_gc(repository, plan_gc(repository))
    verify(root)


def test_a_read_only_folder(root: Path) -> None:
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        if os.access(root, os.W_OK):
            pytest.skip("this user may write to read-only folders (root)")
        with Repository.open(str(root)) as repository:
            assert repository.read_only
            assert contents(repository, repository.catalog.find(VM)) == CONTENT
            with pytest.raises(RepositoryReadOnly):
                backup(LocalPeer(repository), request(CONTENT))
        with pytest.raises(RepositoryReadOnly):
            rebuild_index(str(root))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    verify(root)


# --- init


def test_a_second_init(root: Path) -> None:
    before = files(root)
    with pytest.raises(RepositoryExists):
        Repository.create(str(root))
    assert files(root) == before
    verify(root)


def test_init_where_something_else_is(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.txt").write_text("photos")
    with pytest.raises(RepositoryExists):
        Repository.create(str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["holiday.txt"]
    with pytest.raises(TargetUnsuitable):
        Repository.create(str(tmp_path / "full" / "holiday.txt"))


def test_two_inits_at_once(tmp_path: Path) -> None:
    """One of them may fail; what is there afterwards is one sound repository."""
    root = tmp_path / "repository"
    start = threading.Barrier(2)
    failures: list[Exception] = []

    def init() -> None:
        start.wait()
        try:
            Repository.create(str(root)).close()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=init) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) < 2, failures
    with Repository.open(str(root)) as repository:
        backup(LocalPeer(repository), request(CONTENT))
    verify(root)


# --- sessions


def test_resuming_a_session_that_is_gone(root: Path) -> None:
    clock = FakeClock()
    with Repository.open(str(root), clock=clock) as repository:
        with pytest.raises(SessionNotFound):
            repository.sessions.resume(SessionId("0" * 32))
        committed = backup(LocalPeer(repository), request(CONTENT))
        aborted = repository.sessions.open(DEFAULT_NAMESPACE, VM)
        with pytest.raises(SessionBusy):
            repository.sessions.resume(aborted.id)
        aborted.abort()
        parked = repository.sessions.open(DEFAULT_NAMESPACE, VM)
        parked.park()
        repository.sessions.resume(parked.id).park()
        clock.pass_time(25 * 3600)
        with repository.maintenance():
            assert execute_gc(repository, plan_gc(repository)).expired_sessions == 1
        for gone in (aborted, parked):
            with pytest.raises(SessionNotFound):
                repository.sessions.resume(gone.id)
            with pytest.raises(SessionNotFound):
                backup(LocalPeer(repository), request(CONTENT, resume=gone.id))
        assert not repository.sessions.all()
        assert not [name for name in os.listdir(root / "locks") if name.startswith("session-")]
        assert repository.catalog.find(VM).id == committed.id
    verify(root, 2)


def test_a_session_is_gone_with_the_index(root: Path) -> None:
    with Repository.open(str(root)) as repository:
        session = repository.sessions.open(DEFAULT_NAMESPACE, VM)
        session.park()
    rebuild_index(str(root))
    with Repository.open(str(root)) as repository, pytest.raises(SessionNotFound):
        backup(LocalPeer(repository), request(CONTENT, resume=session.id))
    with Repository.open(str(root)) as repository:
        backup(LocalPeer(repository), request(CONTENT))
    verify(root, 2)
