"""``backup`` and what it leaves: sources, names, labels, the summary."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from .conftest import Casbackup, MiB


def test_backup_prints_one_line_for_a_log(cb: Casbackup) -> None:
    disk = cb.disk(data_mib=2)
    line = cb.ok("backup", "vm/100", f"scsi0={disk}").text
    snapshot = cb.json("show", "vm/100")["snapshot"]
    assert line.count("\n") == 1
    assert line.startswith(f"{snapshot['reference']} {snapshot['id'][:8]}: scsi0 6.00 MiB, ")
    assert "read 2.00 MiB, new 2.00 MiB" in line and "zero 4.00 MiB" in line


def test_quiet_backup_prints_nothing(cb: Casbackup) -> None:
    assert cb.ok("backup", "vm/100", f"scsi0={cb.disk()}", "-q").out == b""


def test_second_backup_reuses_everything(cb: Casbackup) -> None:
    disk = cb.disk(data_mib=2)
    first = cb.json("backup", "vm/100", f"scsi0={disk}")["snapshot"]
    second = cb.json("backup", "vm/100", f"scsi0={disk}")["snapshot"]
    assert first["stats"]["new_bytes"] == second["stats"]["reused_bytes"] == 2 * MiB
    assert (second["stats"]["new_bytes"], second["stats"]["new_stored_bytes"]) == (0, 0)
    assert (second["parent"], second["sequence"]) == (first["id"], 2)
    assert first["disks"][0]["root"] == second["disks"][0]["root"]


def test_backup_of_several_disks_with_all_that_can_be_said(cb: Casbackup) -> None:
    a, b = cb.disk("a.raw", seed=1), cb.disk("b.raw", seed=2)
    config = cb.folder / "100.conf"
    config.write_text("memory: 512\n")
    snapshot = cb.json(
        *("backup", "vm/100", f"scsi0={a}", f"virtio1={b}"),
        *("--config", config, "--config", f"other={config}"),
        *("--label", "before-upgrade", "--label", "x", "--notes", "two\nlines"),
        *("--time", "2026-11-22T20:00:00Z", "--namespace", "acme/prod"),
    )["snapshot"]
    assert [disk["name"] for disk in snapshot["disks"]] == ["scsi0", "virtio1"]
    assert [disk["source"] for disk in snapshot["disks"]] == [str(a), str(b)]
    assert [config["name"] for config in snapshot["configs"]] == ["100.conf", "other"]
    assert (snapshot["labels"], snapshot["notes"]) == (["before-upgrade", "x"], "two\nlines")
    assert snapshot["reference"] == "acme/prod:vm/100@2026-11-22T20:00:00.000Z"
    assert cb.json("show", snapshot["reference"])["snapshot"] == snapshot


def test_a_config_alone_is_a_backup(cb: Casbackup) -> None:
    config = cb.folder / "a=b.conf"
    config.write_text("x")
    name = cb.json("backup", "vm/100", "--config", f"vm.conf={config}")["snapshot"]["configs"][0]["name"]
    assert name == "vm.conf"


def test_backup_from_a_pipe(cb: Casbackup, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    content = cb.disk(data_mib=5).read_bytes()
    process = start("backup", "vm/100", "scsi0=-", stdin=subprocess.PIPE)
    out, err = process.communicate(content, timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b"scsi0 6.00 MiB" in out
    assert cb.ok("dump", "vm/100", "scsi0").out == content


def test_an_image_format_can_be_named(cb: Casbackup) -> None:
    disk = cb.disk("disk.qcow2")
    assert cb.fails(5, "backup", "vm/100", f"scsi0={disk}")["code"] == "source-unreadable"
    cb.ok("backup", "vm/100", f"scsi0={disk}", "--format", "raw")
    assert cb.fails(2, "backup", "vm/100", f"scsi0={disk}", "--format", "zip")["code"] == "usage"
