"""The simulated file system: what it keeps, what it loses, and that it otherwise behaves like the real one."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from casbackup.fs import FileSystem, RealFileSystem, write_durably
from casbackup.testing.simdisk import LOSE_ALL, LOSE_NOTHING
from casbackup.testing.simfs import SimulatedCrash, SimulatedFileSystem, SimulatedMachine


@pytest.fixture
def machine() -> SimulatedMachine:
    made = SimulatedMachine()
    made.process().make_folders("/a/b")
    return made


@pytest.fixture(params=["real", "simulated"])
def fs_and_root(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[FileSystem, str]:
    fs = RealFileSystem() if request.param == "real" else SimulatedMachine().process()
    fs.make_folders(str(tmp_path))
    return fs, str(tmp_path)


def write(fs: FileSystem, path: str, data: bytes, *, sync: bool = True) -> None:
    file = fs.create(path)
    file.write([data[:1], b"", memoryview(data)[1:]])
    if sync:
        file.sync()
    file.close()


def test_both_behave_the_same(fs_and_root: tuple[FileSystem, str]) -> None:
    fs, root = fs_and_root
    fs.make_folders(f"{root}/x/y")
    fs.make_folders(f"{root}/x/y")
    assert [(e.name, e.is_folder) for e in fs.list(root)] == [("x", True)]
    assert fs.list(f"{root}/nowhere") == []
    write(fs, f"{root}/file", b"hello world")
    assert [tuple(e) for e in fs.list(root) if not e.is_folder] == [("file", False, 11)]
    assert fs.read(f"{root}/file") == b"hello world"
    assert fs.size_bytes(f"{root}/file") == 11
    reader = fs.open(f"{root}/file")
    assert (reader.read_at(6, 100), reader.read_at(20, 5), reader.size_bytes()) == (b"world", b"", 11)
    for call, error in (
        (lambda: fs.create(f"{root}/file"), FileExistsError),
        (lambda: fs.create(f"{root}/nowhere/file"), FileNotFoundError),
        (lambda: fs.open(f"{root}/absent"), FileNotFoundError),
        (lambda: fs.read(f"{root}/absent"), FileNotFoundError),
        (lambda: fs.size_bytes(f"{root}/absent"), FileNotFoundError),
        (lambda: fs.rename(f"{root}/absent", f"{root}/other"), FileNotFoundError),
        (lambda: fs.rename_new(f"{root}/absent", f"{root}/other"), FileNotFoundError),
        (lambda: fs.list(f"{root}/file"), NotADirectoryError),
        (lambda: fs.read(f"{root}/x"), IsADirectoryError),
        (lambda: fs.read(f"{root}/file/below"), NotADirectoryError),
    ):
        with pytest.raises(error):
            call()
    write(fs, f"{root}/second", b"2")
    with pytest.raises(FileExistsError):
        fs.rename_new(f"{root}/second", f"{root}/file")
    fs.rename_new(f"{root}/second", f"{root}/third")
    fs.rename(f"{root}/third", f"{root}/file")
    assert fs.read(f"{root}/file") == b"2"
    assert not fs.exists(f"{root}/third") and not fs.exists(f"{root}/second")
    assert reader.read_at(0, 5) == b"hello"
    fs.rename(f"{root}/file", f"{root}/x/moved")
    fs.remove_folder(f"{root}/x")
    assert fs.read(f"{root}/x/moved") == b"2"
    fs.remove(f"{root}/x/moved")
    fs.remove(f"{root}/x/moved")
    fs.remove_folder(f"{root}/x/y")
    fs.remove_folder(f"{root}/x")
    fs.remove_folder(f"{root}/x")
    assert fs.list(root) == []
    write_durably(fs, f"{root}/small", b"one", replace=False)
    with pytest.raises(FileExistsError):
        write_durably(fs, f"{root}/small", b"two", replace=False)
    write_durably(fs, f"{root}/small", b"three", replace=True)
    assert [e.name for e in fs.list(root)] == ["small"]
    assert fs.read(f"{root}/small") == b"three"
    reader.close()


def test_both_lock_the_same(fs_and_root: tuple[FileSystem, str]) -> None:
    fs, root = fs_and_root
    exclusive = fs.lock(f"{root}/lock", shared=False)
    assert exclusive is not None
    assert fs.lock(f"{root}/lock", shared=False) is None
    assert fs.lock(f"{root}/lock", shared=True) is None
    exclusive.release()
    exclusive.release()
    one, two = fs.lock(f"{root}/lock", shared=True), fs.lock(f"{root}/lock", shared=True)
    assert one is not None and two is not None
    assert fs.lock(f"{root}/lock", shared=False) is None
    one.release()
    assert fs.lock(f"{root}/lock", shared=False) is None
    two.release()
    again = fs.lock(f"{root}/lock", shared=False)
    assert again is not None
    fs.remove(f"{root}/lock")
    assert fs.lock(f"{root}/lock", shared=False) is not None, "a lock belongs to the inode"


def test_unsynced_bytes_and_names_are_lost(machine: SimulatedMachine) -> None:
    fs = machine.process()
    write(fs, "/a/synced", b"kept")
    write(fs, "/a/unsynced", b"lost", sync=False)
    fs.sync_folder("/a")
    write(fs, "/a/nameless", b"synced, but its name is not")
    machine.restart(LOSE_ALL)
    fs = machine.process()
    assert sorted(e.name for e in fs.list("/a")) == ["b", "synced", "unsynced"]
    assert fs.read("/a/synced") == b"kept"
    assert fs.read("/a/unsynced") == b""


def test_a_removal_is_lost_as_well(machine: SimulatedMachine) -> None:
    fs = machine.process()
    write(fs, "/a/file", b"1")
    fs.sync_folder("/a")
    fs.remove("/a/file")
    machine.restart(LOSE_ALL)
    assert machine.process().read("/a/file") == b"1"
    machine.process().remove("/a/file")
    machine.restart(LOSE_NOTHING)
    assert not machine.process().exists("/a/file")


def test_a_rename_in_a_folder_is_all_or_nothing() -> None:
    seen = set()
    for seed in range(40):
        machine = SimulatedMachine()
        fs = machine.process()
        fs.make_folders("/a")
        write(fs, "/a/old", b"old")
        write(fs, "/a/target", b"before")
        fs.sync_folder("/a")
        fs.rename("/a/old", "/a/target")
        machine.restart(seed)
        seen.add(tuple(sorted((e.name, machine.content(f"/a/{e.name}")) for e in machine.process().list("/a"))))
    assert seen == {(("old", b"old"), ("target", b"before")), (("target", b"old"),)}


def test_a_rename_across_folders_never_loses_the_file() -> None:
    seen = set()
    for seed in range(60):
        machine = SimulatedMachine()
        fs = machine.process()
        fs.make_folders("/a")
        fs.make_folders("/b")
        write(fs, "/a/file", b"content")
        fs.sync_folder("/a")
        fs.rename("/a/file", "/b/file")
        machine.restart(seed)
        fs = machine.process()
        seen.add((fs.exists("/a/file"), fs.exists("/b/file")))
    assert seen == {(True, False), (True, True), (False, True)}


def test_unsynced_bytes_may_be_torn() -> None:
    seen = set()
    for seed in range(2, 200):
        machine = SimulatedMachine()
        fs = machine.process()
        fs.make_folders("/a")
        file = fs.create("/a/file")
        fs.sync_folder("/a")
        file.write([b"synced"])
        file.sync()
        file.write([b"torn off"])
        machine.restart(seed)
        content = machine.process().read("/a/file")
        assert content.startswith(b"synced") and len(content) <= 14
        seen.add(content)
    assert {b"synced", b"syncedtorn off", b"syncedtorn"} <= seen
    assert any(len(content) > 6 and content[6:] == bytes(len(content) - 6) for content in seen)
    assert len(seen) > 20


def test_names_survive_in_order(machine: SimulatedMachine) -> None:
    seen = set()
    for seed in range(60):
        other = machine.photo()
        fs = other.process()
        for name in "123":
            write(fs, f"/a/b/{name}", b"")
        other.restart(seed)
        seen.add("".join(sorted(e.name for e in other.process().list("/a/b"))))
    assert seen == {"", "1", "12", "123"}


def test_a_crash_stops_all_processes_and_frees_their_locks(machine: SimulatedMachine) -> None:
    one, two = machine.process(), machine.process()
    assert one.lock("/a/lock", shared=False) is not None
    file = one.create("/a/file")
    machine.crash_at(len(machine.log) + 1)
    with pytest.raises(SimulatedCrash):
        file.write([b"data"])
    for call in (
        lambda: two.read("/a/file"),
        lambda: one.remove("/a/file"),
        file.sync,
        lambda: two.list("/"),
    ):
        with pytest.raises(SimulatedCrash):
            call()
    machine.restart(LOSE_NOTHING)
    with pytest.raises(SimulatedCrash):
        one.list("/a")
    assert machine.process().lock("/a/lock", shared=False) is not None


def test_a_killed_process_loses_its_locks_and_nothing_else(machine: SimulatedMachine) -> None:
    one, two = machine.process(), machine.process()
    one.lock("/a/lock", shared=True)
    write(one, "/a/file", b"unsynced", sync=False)
    assert two.lock("/a/lock", shared=False) is None
    one.kill()
    assert two.lock("/a/lock", shared=False) is not None
    assert two.read("/a/file") == b"unsynced"
    with pytest.raises(SimulatedCrash):
        one.read("/a/file")


def test_scripted_failures(machine: SimulatedMachine) -> None:
    fs = machine.process()
    file = fs.create("/a/file")
    machine.fail_at(len(machine.log) + 2)
    file.write([b"1"])
    with pytest.raises(OSError) as caught:
        file.write([b"2"])
    assert caught.value.errno == errno.EIO
    file.write([b"3"])
    assert fs.read("/a/file") == b"13"


def test_a_full_disk(machine: SimulatedMachine) -> None:
    fs = machine.process()
    machine.capacity_bytes = 10
    file = fs.create("/a/file")
    file.write([b"12345678"])
    with pytest.raises(OSError) as caught:
        file.write([b"9abc"])
    assert caught.value.errno == errno.ENOSPC
    assert fs.read("/a/file") == b"123456789a"
    fs.remove("/a/file")
    machine.fill_at(len(machine.log) + 1)
    with pytest.raises(OSError):
        fs.create("/a/other")
    machine.fill_at(0)
    fs.create("/a/other").write([b"1234567890"])


def test_a_photo_is_independent(machine: SimulatedMachine) -> None:
    fs = machine.process()
    write(fs, "/a/file", b"1", sync=False)
    photo = machine.photo()
    fs.sync_folder("/a")
    fs.remove("/a/file")
    photo.restart(LOSE_NOTHING)
    assert photo.process().read("/a/file") == b"1"
    assert not fs.exists("/a/file")


def test_a_read_only_file_system(machine: SimulatedMachine) -> None:
    fs: SimulatedFileSystem = machine.process()
    write(fs, "/a/file", b"1")
    fs.read_only = True
    assert fs.is_read_only("/a")
    assert fs.read("/a/file") == b"1"
    with pytest.raises(OSError) as caught:
        fs.create("/a/other")
    assert caught.value.errno == errno.EROFS
