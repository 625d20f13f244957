"""``forget``, ``gc``, ``check``, ``stats``, ``pin``, ``label``, ``sessions``, ``migrate``."""

from __future__ import annotations

import pytest

from casbackup.errors import UsageError
from casbackup_client.commands.annotate import changed_labels

from .conftest import Casbackup, MiB


def days(cb: Casbackup, vm: str = "vm/100") -> list[int]:
    return [int(s["time"][8:10]) for s in cb.json("snapshots", vm)["snapshots"]]


def test_forget_by_rules(history: Casbackup) -> None:
    plan = history.json("forget", "vm/100", "--keep-last", "1", "--keep-daily", "1", "-n")
    assert (plan["dry_run"], plan["removed"]) == (True, 3)
    assert days(history) == [1, 2, 3, 4, 5]
    shown = history.ok("forget", "vm/100", "--keep-last", "1", "--keep-daily", "1", "-n", "-q").text
    assert "would remove 3 of 5 snapshots; gc would free 3.01 MiB" in shown
    assert shown.count("remove ") == 4 and shown.count("keep ") == 2
    text = history.ok("forget", "vm/100", "--keep-last", "1", "--keep-daily", "1").text
    assert "removed 3 of 5 snapshots; gc can free 3.01 MiB" in text
    assert days(history) == [4, 5]
    freed = history.json("gc")["freed_bytes"]
    assert plan["freed_bytes"] <= freed <= plan["freed_bytes"] + 200_000
    history.ok("check", "--read-data")


def test_forget_rules_are_for_each_vm(history: Casbackup) -> None:
    assert history.json("forget", "--keep-last", "2", "--gc")["gc"]["freed_bytes"] > 2 * MiB
    assert (days(history), days(history, "vm/200")) == ([4, 5], [5])


def test_forget_by_name(history: Casbackup) -> None:
    history.ok("pin", "vm/100@2026-11-03")
    assert history.fails(1, "forget", "vm/100@2026-11-01", "vm/100@2026-11-03")["code"] == "snapshot-pinned"
    assert days(history) == [1, 2, 3, 4, 5]
    document = history.json("forget", "vm/100@2026-11-01", "vm/100@2026-11-02", "vm/100@latest")
    assert (document["removed"], days(history)) == (3, [3, 4])
    # Day 5's disk is shared with vm/200: only days 1 and 2 are freed.
    assert 2 * MiB < document["freed_bytes"] < 2.1 * MiB


def test_forget_a_vm_that_is_no_more(history: Casbackup) -> None:
    history.ok("pin", "vm/100@2026-11-03")
    assert history.json("forget", "vm/100", "--all")["removed"] == 4
    assert (days(history), days(history, "vm/200")) == ([3], [5])


@pytest.mark.parametrize(
    "arguments",
    ["", "vm/100", "--all", "vm/100@latest --keep-last 1", "vm/100 --all --keep-last 1", "--keep-last -1"],
)
def test_forget_asks_back_when_it_is_not_clear(history: Casbackup, arguments: str) -> None:
    assert history.fails(2, "forget", *arguments.split())["code"] == "usage"
    assert days(history) == [1, 2, 3, 4, 5]


def test_forget_knows_slips_of_the_pen(history: Casbackup) -> None:
    assert history.fails(14, "forget", "vm/1000", "--keep-last", "1")["code"] == "snapshot-not-found"


def test_gc_plans_and_executes(history: Casbackup) -> None:
    history.ok("forget", "vm/100", "--all")
    plan = history.json("gc", "--dry-run")
    assert plan["freed_bytes"] > 4 * MiB
    assert "would free" in history.ok("gc", "-n", "-q").text
    assert history.ok("gc").text.startswith("freed 4.")
    assert history.json("gc")["freed_bytes"] == 0


def test_stats_say_what_forgetting_would_free(history: Casbackup) -> None:
    document = history.json("stats", "vm/100")
    assert document["total"]["logical_bytes"] == 6 * 6 * MiB
    by_day = {item["snapshot"][7:17]: item["unique_bytes"] for item in document["snapshots"]}
    assert by_day["2026-11-05"] < MiB < by_day["2026-11-01"]
    assert [item["vm"] for item in document["vms"]] == ["vm/100"]
    assert history.fails(14, "stats", "vm/300")["code"] == "snapshot-not-found"
    text = history.ok("stats").text
    assert "vm/100" in text and "vm/200" in text and "dedup factor 1.20" in text


def test_check_reads_as_much_as_is_asked_for(history: Casbackup) -> None:
    whole = history.json("check", "--read-data")
    assert whole["unverified_blobs"] == 0 and whole["verified_bytes"] > 5 * MiB
    assert history.json("check", "--older-than", "1d")["verified_blobs"] == 0
    assert 0 < history.json("check", "--read-data-subset", "20%")["verified_blobs"] < whole["verified_blobs"]
    assert history.json("check", "--time-budget", "1h")["unverified_blobs"] == 0
    assert history.json("check")["verified_blobs"] == 0
    assert history.ok("check", "-q").out == b""


def test_snapshots_can_be_chosen(history: Casbackup) -> None:
    history.ok("label", "vm/100@2026-11-02", "--add", "monthly", "--notes", "before\nthe upgrade \x1b[31m")
    history.ok("backup", "vm/300", f"scsi0={history.disk()}", "--namespace", "other")
    assert len(history.json("snapshots", "vm/200", "--vm", "vm/100")["snapshots"]) == 6
    assert len(history.json("snapshots", "--label", "monthly")["snapshots"]) == 1
    assert len(history.json("snapshots", "--all-namespaces")["snapshots"]) == 7
    assert len(history.json("snapshots", "--namespace", "other")["snapshots"]) == 1
    text = history.ok("snapshots").text
    assert "monthly" in text and "before the upgrade \\x1b[31m" in text
    assert history.ok("snapshots", "vm/999").text == "no snapshots\n"


def test_labels_and_notes(cb: Casbackup) -> None:
    cb.ok("backup", "vm/100", f"scsi0={cb.disk()}", "--label", "a", "--label", "b")

    def labels(*arguments: str) -> object:
        return cb.json("label", "vm/100", *arguments)["snapshot"]["labels"]

    assert labels("--add", "c", "--remove", "a") == ["b", "c"]
    assert labels("--set", "x", "--set", "y") == ["x", "y"]
    assert labels("--notes", "changed") == ["x", "y"]
    assert cb.json("show", "vm/100")["snapshot"]["notes"] == "changed"
    for arguments in (
        [],
        ["--remove", "q"],
        ["--set", "a", "--add", "b"],
        ["--add", "a b"],
        ["--notes", "x" * 70000],
    ):
        assert cb("label", "vm/100", *arguments).status == 2


def test_there_is_a_limit_to_labels() -> None:
    with pytest.raises(UsageError, match="64"):
        changed_labels((), tuple(f"l{n}" for n in range(65)), (), ())


def test_pins(cb: Casbackup) -> None:
    cb.ok("backup", "vm/100", f"scsi0={cb.disk()}")
    assert cb.json("pin", "vm/100")["snapshot"]["pinned"] is True
    assert "pinned" in cb.ok("snapshots").text
    assert cb.json("pin", "vm/100", "--remove")["snapshot"]["pinned"] is False


def test_show_tells_everything(cb: Casbackup) -> None:
    cb.ok("backup", "vm/100", f"scsi0={cb.disk()}", "--label", "weekly", "--notes", "first\nsecond")
    text = cb.ok("show", "vm/100").text
    for expected in ("weekly", "first", "second", "scsi0", str(6 * MiB), "vm.raw"):
        assert expected in text


def test_diff_names_ranges(cb: Casbackup) -> None:
    disk = cb.disk(data_mib=5)
    cb.ok("backup", "vm/100", f"scsi0={disk}", f"gone={disk}", "--time", "2026-11-01T00:00:00Z")
    with open(disk, "r+b") as file:
        file.seek(4 * MiB + 4096)
        file.write(b"changed")
    cb.ok("backup", "vm/100", f"scsi0={disk}", f"new={disk}", "--time", "2026-11-02T00:00:00Z")
    old, new = "vm/100@2026-11-01", "vm/100@2026-11-02"
    found = {item["disk"]: item for item in cb.json("diff", old, new)["disks"]}
    (changed,) = found["scsi0"]["ranges"]
    assert changed["offset_bytes"] <= 4 * MiB + 4096 < changed["offset_bytes"] + changed["length_bytes"]
    assert (found["gone"]["new_size_bytes"], found["new"]["old_size_bytes"]) == (None, None)
    assert [item["disk"] for item in cb.json("diff", old, new, "--disk", "new")["disks"]] == ["new"]
    assert cb.fails(14, "diff", old, new, "--disk", "none")["code"] == "snapshot-not-found"
    text = cb.ok("diff", old, new, "-v").text
    assert "changed" in text and "removed" in text and str(changed["offset_bytes"]) in text
    assert cb.json("diff", old, old)["disks"][0]["differing_bytes"] == 0


def test_migrate_has_nothing_to_do(cb: Casbackup) -> None:
    assert "nothing to do" in cb.ok("migrate").text
    assert cb.json("migrate", "-n")["steps"] == []


def test_version(bare: Casbackup) -> None:
    from casbackup import __version__

    assert bare.ok("--version").text == f"casbackup {__version__}\n"
    assert bare.ok("version").text.startswith(f"casbackup {__version__}, repository format 1")
