"""The LMDB index: growing, sharing, and what is said of one that cannot be used."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from casbackup.errors import IndexDamaged, IndexFull, IndexMissing, NetworkFileSystem, RepositoryReadOnly
from casbackup.repository import repository as repository_module
from casbackup.repository.mounts import file_system_type, is_network_file_system
from casbackup.repository.repository import Repository
from casbackup.store.index import Index, Transaction

ID = "f550d5f295c6f82a21664a20021babe1"
TINY = 256 * 1024


@pytest.fixture
def folder() -> Iterator[str]:
    """In memory where that can be had: LMDB syncs each transaction."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="casbackup-", dir=base) as made:
        yield made


@pytest.fixture
def index(folder: str) -> Iterator[Index]:
    made = Index.create(folder, ID, map_bytes=TINY)
    yield made
    made.close()


def put(index: Index, first: int, count: int, size: int = 1000) -> None:
    def change(txn: Transaction) -> None:
        for number in range(first, first + count):
            txn.put(b"%032d" % number, b"v" * size, db=index.blobs)

    index.write(change)


def count(index: Index) -> int:
    with index.read() as txn:
        return int(txn.stat(index.blobs)["entries"])


def test_a_tiny_map_grows_within_one_transaction(index: Index) -> None:
    calls = []

    def change(txn: Transaction) -> int:
        calls.append(index.next_number(txn, "pack"))
        for number in range(3000):
            txn.put(b"%032d" % number, bytes(1000), db=index.blobs)
        return 7

    assert index.write(change) == 7
    assert len(calls) > 1, "the map was too small at first"
    assert set(calls) == {1}, "a transaction that is run again starts from the same state"
    assert count(index) == 3000
    assert index.size_bytes() > TINY
    with index.read() as txn:
        assert index.number(txn, "pack") == 1
        assert index.number(txn, "session") == 0


def test_numbers_are_counted_one_by_one_and_a_failed_change_leaves_nothing(index: Index) -> None:
    assert [index.write(lambda txn: index.next_number(txn, "pack")) for _ in range(3)] == [1, 2, 3]

    def fail(txn: Transaction) -> None:
        index.next_number(txn, "pack")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        index.write(fail)
    assert index.write(lambda txn: index.next_number(txn, "pack")) == 4


def test_full_at_the_limit(index: Index) -> None:
    index._max_bytes = 2 * TINY
    put(index, 0, 50)
    with pytest.raises(IndexFull):
        put(index, 1000, 5000)
    assert count(index) == 50, "the failed change left nothing"
    put(index, 50, 1)
    assert count(index) == 51


OTHER_PROCESS = """
import sys
from casbackup.store.index import Index
index = Index.open(sys.argv[1], sys.argv[2], read_only=False)
first = int(sys.argv[3])
def change(txn):
    for number in range(first, first + 2000):
        txn.put(b"%032d" % number, b"v" * 1000, db=index.blobs)
index.write(change)
index.close()
"""


def test_growth_by_another_process_is_followed(index: Index, folder: str) -> None:
    put(index, 0, 10)
    for first, follow in ((1000, partial(count, index)), (5000, partial(put, index, 10, 10))):
        subprocess.run([sys.executable, "-c", OTHER_PROCESS, folder, ID, str(first)], check=True)
        follow()
    assert count(index) == 2000 + 2000 + 20


def test_reading_and_writing_threads_while_the_map_grows(index: Index) -> None:
    failures: list[BaseException] = []
    done = threading.Event()

    def guarded(work: partial[None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def write(start: int) -> None:
        for batch in range(15):
            put(index, start + batch * 100, 100)

    def read() -> None:
        before = 0
        while not done.wait(0.002):  # readers that never pause would keep the interpreter to themselves
            now = count(index)
            assert now >= before and now % 100 == 0
            before = now

    writers = [threading.Thread(target=guarded, args=[partial(write, n * 100_000)]) for n in range(2)]
    readers = [threading.Thread(target=guarded, args=[partial(read)]) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join(60)
    done.set()
    for thread in readers:
        thread.join(60)
    assert not failures and not any(t.is_alive() for t in writers + readers)
    assert count(index) == 3000


def test_an_index_is_shared_within_a_process_and_ends_with_its_last_user(index: Index, folder: str) -> None:
    again = Index.open(folder, ID, read_only=True)
    assert again is index
    again.close()
    put(index, 0, 1)
    assert count(index) == 1


def test_reading_what_was_written_and_refusing_to_write(folder: str) -> None:
    made = Index.create(folder, ID, map_bytes=TINY)
    put(made, 0, 5)
    made.close()
    index = Index.open(folder, ID, read_only=True)
    assert count(index) == 5
    with pytest.raises(RepositoryReadOnly):
        put(index, 5, 1)
    index.close()


# --- indexes that are none


@pytest.mark.parametrize("read_only", [True, False])
def test_no_index(folder: str, read_only: bool) -> None:
    with pytest.raises(IndexMissing):
        Index.open(folder, ID, read_only=read_only)
    assert list(Path(folder).iterdir()) == []


@pytest.mark.parametrize("still_open", [True, False])
def test_the_index_of_another_repository(folder: str, still_open: bool) -> None:
    made = Index.create(folder, ID, map_bytes=TINY)
    if not still_open:
        made.close()
    with pytest.raises(IndexMissing, match="another"):
        Index.open(folder, "0" * 32, read_only=False)
    index = made if still_open else Index.open(folder, ID, read_only=False)
    assert count(index) == 0
    index.close()


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("content", [b"garbage " * 4096, b"short", bytes(65536)], ids=["text", "short", "zeros"])
def test_garbage(folder: str, content: bytes, read_only: bool) -> None:
    Path(folder, "data.mdb").write_bytes(content)
    with pytest.raises(IndexDamaged):
        Index.open(folder, ID, read_only=read_only)


@pytest.mark.parametrize("read_only", [True, False])
def test_an_empty_file(folder: str, read_only: bool) -> None:
    Path(folder, "data.mdb").touch()
    with pytest.raises((IndexDamaged, IndexMissing)):
        Index.open(folder, ID, read_only=read_only)


def test_an_index_without_its_databases_is_damaged_and_can_be_replaced_at_once(folder: str) -> None:
    import lmdb

    lmdb.open(folder, lib_version=0).close()
    try:
        Index.open(folder, ID, read_only=True)
        pytest.fail("opened")
    except IndexDamaged:
        shutil.rmtree(folder)
        Path(folder).mkdir()
        made = Index.create(folder, ID, map_bytes=TINY)
        put(made, 0, 1)
        made.close()


# --- network file systems

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/nas rw,relatime shared:2 - nfs4 nas:/export rw,vers=4.2
31 30 8:2 / /mnt/nas/local rw - xfs /dev/sdb rw
32 22 0:41 / /mnt/with\\040space rw master:3 - cifs //server/share rw
33 22 0:42 / /mnt/over rw - ext4 /dev/sdc rw
34 22 0:43 / /mnt/over rw - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/mnt/nas", "nfs4"),
        ("/mnt/nas/repository/index", "nfs4"),
        ("/mnt/nasty", "ext4"),
        ("/mnt/nas/local/x", "xfs"),
        ("/mnt/with space/x", "cifs"),
        ("/mnt/over/x", "fuse.sshfs"),
    ],
)
def test_the_mount_that_holds_a_path(path: str, kind: str, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system_type(path, str(mounts)) == kind
    network = kind if kind in ("nfs4", "cifs", "fuse.sshfs") else None
    assert is_network_file_system(path, str(mounts)) == network


def test_a_system_that_cannot_tell(tmp_path: Path) -> None:
    assert file_system_type("/", str(tmp_path / "absent")) is None
    assert is_network_file_system("/", str(tmp_path / "absent")) is None


def test_repositories_on_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Repository.create(str(tmp_path / "made-before")).close()
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS + f"40 22 0:50 / {tmp_path.resolve()} rw - nfs nas:/x rw\n")
    monkeypatch.setattr(
        repository_module, "is_network_file_system", partial(is_network_file_system, mounts_file=str(mounts))
    )
    with pytest.raises(NetworkFileSystem, match="nfs"):
        Repository.create(str(tmp_path / "repository"))
    with pytest.raises(NetworkFileSystem, match="nfs"):
        Repository.open(str(tmp_path / "made-before"))
