"""Damage as a user meets it: found, located, never restored silently, and healed by the next backup."""

from __future__ import annotations

import pytest

from .conftest import Casbackup, MiB


@pytest.fixture
def damaged(cb: Casbackup) -> Casbackup:
    """A repository where a byte of a chunk is wrong."""
    cb.ok("backup", "vm/100", f"scsi0={cb.disk(data_mib=2)}")
    pack = next((cb.repository / "packs").rglob("*.pack"))
    with open(pack, "r+b") as file:
        file.seek(pack.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return cb


def test_check_finds_it_and_says_what_it_means(damaged: Casbackup) -> None:
    result = damaged("check", "--read-data", "--json")
    document = result.json
    assert (result.status, result.error["code"], document["damaged"]) == (4, "damage-found", True)
    affected = document["affected"]
    assert [(item["disk"], item["config"]) for item in affected] == [("scsi0", None)]
    assert affected[0]["snapshot"] == damaged.json("show", "vm/100")["snapshot"]["reference"]
    assert 0 < affected[0]["lost_bytes"] <= 256 * 1024
    text = damaged("check", "--read-data")
    assert text.status == 4
    start = affected[0]["ranges"][0]["offset_bytes"]
    assert f"{affected[0]['snapshot']} scsi0, {affected[0]['lost_bytes']} bytes from byte {start} on" in text.text


def test_check_without_reading_does_not_see_it(damaged: Casbackup) -> None:
    assert "no damage" in damaged.ok("check").text


def test_restore_stops_at_it(damaged: Casbackup) -> None:
    target = damaged.folder / "target.raw"
    error = damaged.fails(4, "restore", "vm/100", "--disk", f"scsi0={target}")
    assert error["code"] == "blob-damaged"
    assert "scsi0" in error["message"] and "--best-effort" in error["message"]
    assert not target.exists()
    assert damaged("dump", "vm/100", "scsi0").status == 4


def test_best_effort_lists_what_is_lost(damaged: Casbackup) -> None:
    target, disk = damaged.folder / "target.raw", damaged.folder / "vm.raw"
    result = damaged("restore", "vm/100", "--disk", f"scsi0={target}", "--best-effort", "--json")
    assert (result.status, result.error["code"]) == (3, "restore-incomplete")
    lost = result.json["disks"][0]["lost"]
    expected = bytearray(disk.read_bytes())
    for item in lost:
        start, length = item["offset_bytes"], item["length_bytes"]
        expected[start : start + length] = bytes(length)
    assert target.read_bytes() == expected != disk.read_bytes()
    quiet = damaged("restore", "vm/100", "--disk", f"scsi0={target}", "--best-effort", "--force", "-q")
    assert (quiet.status, quiet.out) == (3, b"")
    assert f"lost: scsi0, {lost[0]['length_bytes']} bytes from byte {lost[0]['offset_bytes']} on" in quiet.err


def test_the_next_backup_heals_it(damaged: Casbackup) -> None:
    assert damaged("check", "--read-data", "-q").status == 4
    assert damaged.fails(4, "repair")["code"] == "damage-found"
    disk = damaged.folder / "vm.raw"
    again = damaged.json("backup", "vm/100", f"scsi0={disk}")["snapshot"]
    assert 0 < again["stats"]["new_bytes"] < MiB
    damaged.ok("repair")
    damaged.ok("check", "--read-data")
    for number in (1, 2):
        snapshot = damaged.json("snapshots")["snapshots"][number - 1]
        assert damaged.ok("dump", snapshot["id"], "scsi0").out == disk.read_bytes()


def test_forgetting_works_although_accounting_cannot(cb: Casbackup) -> None:
    cb.ok("backup", "vm/100", f"scsi0={cb.disk()}")
    for manifest in (cb.repository / "snapshots").rglob("*.snap"):
        manifest.write_bytes(b"nonsense")
    assert cb("check", "-q").status == 4
    cb.ok("repair")
    cb.ok("check", "--read-data")


def test_a_missing_index_is_rebuilt(cb: Casbackup) -> None:
    disk = cb.disk()
    cb.ok("backup", "vm/100", f"scsi0={disk}")
    (cb.repository / "index" / "data.mdb").unlink()
    error = cb.fails(4, "snapshots")
    assert error["code"] == "index-missing"
    assert "--rebuild-index" in error["advice"]
    cb.ok("repair", "--rebuild-index")
    assert cb.ok("dump", "vm/100", "scsi0").out == disk.read_bytes()
