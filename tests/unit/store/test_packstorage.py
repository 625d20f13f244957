"""The PackStorage port's implementations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from casbackup.errors import RepositoryFull
from casbackup.fs import RealFileSystem
from casbackup.ids import new_pack_id
from casbackup.store.packstorage import FolderPackStorage, PackStorage
from casbackup.testing.packstorage import MemoryPackStorage, PackStorageConformance
from casbackup.testing.simfs import SimulatedMachine

CHECKS = [name for name, _ in PackStorageConformance(None).checks()]  # type: ignore[arg-type]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["folder", "simulated", "memory", "object-store-like"])
def test_conformance(kind: str, check: str, tmp_path: Path) -> None:
    @contextmanager
    def opened() -> Iterator[PackStorage]:
        if kind == "memory":
            yield MemoryPackStorage()
        elif kind == "object-store-like":
            yield MemoryPackStorage(appendable=False)
        else:
            fs = RealFileSystem() if kind == "folder" else SimulatedMachine().process()
            storage = FolderPackStorage(fs, str(tmp_path / "packs"))
            yield storage
            storage.close()

    dict(PackStorageConformance(opened).checks())[check]()


def test_foreign_things_among_the_packs_are_named_and_not_listed(tmp_path: Path) -> None:
    storage = FolderPackStorage(RealFileSystem(), str(tmp_path))
    pack = new_pack_id()
    other = "00" if pack[:2] != "00" else "01"
    for place in ("README", f"{other}/{pack}.pack", f"{pack[:2]}/{pack}.tmp", "zz/notes.pack"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("x")
    assert list(storage.list()) == []
    assert sorted(storage.foreign()) == sorted(
        ["README", f"{other}/{pack}.pack", f"{pack[:2]}/{pack}.tmp", "zz/notes.pack"]
    )


def test_a_folder_that_is_not_there_lists_nothing(tmp_path: Path) -> None:
    storage = FolderPackStorage(RealFileSystem(), str(tmp_path / "absent"))
    assert list(storage.list()) == []
    storage.delete(new_pack_id())


def test_more_open_packs_than_are_kept_open(tmp_path: Path) -> None:
    storage = FolderPackStorage(RealFileSystem(), str(tmp_path))
    packs = []
    for number in range(200):
        appender = storage.create(new_pack_id())
        appender.append([b"%4d" % number])
        appender.sync()
        appender.close()
        packs.append(appender.pack)
    for _ in range(2):
        assert [storage.read(pack, 0, 4) for pack in packs] == [b"%4d" % n for n in range(200)]
    storage.close()


def test_a_deleted_pack_stays_deleted_after_a_crash() -> None:
    machine = SimulatedMachine()
    storage = FolderPackStorage(machine.process(), "/packs")
    appender = storage.create(new_pack_id())
    appender.append([b"content"])
    appender.sync()
    storage.delete(appender.pack)
    machine.restart(seed=0)
    assert list(FolderPackStorage(machine.process(), "/packs").list()) == []


def test_a_synced_pack_survives_a_crash_that_loses_all_else() -> None:
    machine = SimulatedMachine()
    storage = FolderPackStorage(machine.process(), "/packs")
    appender = storage.create(new_pack_id())
    appender.append([b"synced"])
    appender.sync()
    appender.append([b"and not"])
    machine.restart(seed=0)
    assert FolderPackStorage(machine.process(), "/packs").read(appender.pack, 0, 6) == b"synced"
    assert FolderPackStorage(machine.process(), "/packs").size_bytes(appender.pack) == 6


def test_a_full_disk_is_named_as_such() -> None:
    storage = FolderPackStorage(SimulatedMachine(capacity_bytes=10).process(), "/packs")
    appender = storage.create(new_pack_id())
    with pytest.raises(RepositoryFull, match="cannot write to pack"):
        appender.append([b"eleven bytes"])
