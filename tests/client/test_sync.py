"""``sync`` and ``repair --from``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Casbackup


@pytest.fixture
def other(history: Casbackup) -> Path:
    """A second, empty repository."""
    folder = history.folder / "other"
    history.ok("init", "-q", "-r", folder)
    return folder


def listed(cb: Casbackup, folder: Path) -> list[str]:
    return [s["id"] for s in cb.json("snapshots", "-r", folder)["snapshots"]]


def outcomes(document: dict[str, Any]) -> list[str]:
    return [item["outcome"] for item in document["snapshots"]]


def damage(folder: Path) -> None:
    pack = max((folder / "packs").rglob("*.pack"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.write_bytes(content)


def test_all_snapshots_are_copied(history: Casbackup, other: Path) -> None:
    document = history.json("sync", history.repository, other)
    assert outcomes(document) == ["copied"] * 6
    assert document["equal"] is True
    assert document["source_digest"] == document["destination_digest"]
    assert listed(history, other) == listed(history, history.repository)
    again = history.json("sync", history.repository, other)
    assert (outcomes(again), again["sent_bytes"], again["equal"]) == (["present"] * 6, 0, True)


def test_in_a_log_it_is_one_line_a_snapshot_and_with_q_nothing(history: Casbackup, other: Path) -> None:
    lines = history.ok("sync", history.repository, other).text.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("vm/100@2026-11-01T20:00:00.000Z ")
    assert lines[-1].startswith("sync: 6 copied; ")
    assert lines[-1].endswith("both ends have the same")
    assert history.ok("sync", history.repository, other, "-q").out == b""


def test_filters(history: Casbackup, other: Path) -> None:
    assert len(history.json("sync", history.repository, other, "--vm", "vm/2*")["snapshots"]) == 1
    assert len(history.json("sync", history.repository, other, "--last", 2)["snapshots"]) == 3
    assert len(history.json("sync", history.repository, other, "--since", "2026-11-04")["snapshots"]) == 3
    assert history.json("sync", history.repository, other, "--namespace", "acme/*")["snapshots"] == []
    assert history.json("sync", history.repository, other, "--label", "none")["snapshots"] == []
    assert len(listed(history, other)) == 3


def test_a_dry_run_changes_nothing(history: Casbackup, other: Path) -> None:
    document = history.json("sync", history.repository, other, "--dry-run")
    assert outcomes(document) == ["planned"] * 6
    assert document["equal"] is None
    assert listed(history, other) == []
    done = history.json("sync", history.repository, other)
    assert document["sent_blobs"] == done["sent_blobs"]
    # Random data does not compress, and each blob has a header.
    assert document["sent_bytes"] == pytest.approx(done["sent_bytes"], rel=0.01)


def test_mirror(history: Casbackup, other: Path) -> None:
    history.ok("sync", "-q", history.repository, other)
    first, second = listed(history, other)[:2]
    history.ok("pin", "-r", other, second, "-q")
    history.ok("forget", "-q", first, second)
    assert len(history.json("sync", history.repository, other)["removed"]) == 0
    text = history.ok("sync", history.repository, other, "--mirror", "-n").text
    assert "vm/100@2026-11-01T20:00:00.000Z: would be removed" in text
    document = history.json("sync", history.repository, other, "--mirror")
    assert document["removed"] == ["vm/100@2026-11-01T20:00:00.000Z"]
    assert document["spared"] == ["vm/100@2026-11-02T20:00:00.000Z"]
    assert listed(history, other) == [second, *listed(history, history.repository)]


def test_damage_makes_it_incomplete(history: Casbackup, other: Path) -> None:
    damage(history.repository)
    result = history("sync", history.repository, other, "-q")
    assert result.status == 3
    lines = result.text.splitlines()
    assert len(lines) == 2
    assert "failed: the record of blob" in lines[0]
    assert "not copied:" in result.err
    assert history("check", "-r", other, "--read-data").status == 0
    assert history.fails(3, "sync", history.repository, other)["code"] == "sync-incomplete"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("{here}", "{here}"), 2, "both ends are the same repository"),
        (("{here}", "{here}/../repository"), 2, "both ends are the same repository"),
        (("{here}", "{none}"), 10, "nothing at"),
        (("{none}", "{other}"), 10, "nothing at"),
        (("{here}", "http://nowhere"), 2, "address of a repository"),
        (("{here}", "profile:none"), 2, "no profile"),
        (("{here}", "{other}", "--limit-rate", "0"), 2, "never end"),
        (("{here}", "{other}", "--limit-rate", "fast"), 2, "not a size"),
        (("{here}", "{other}", "--since", "tomorrow"), 2, "not a time"),
        (("{here}", "{other}", "--vm", "100"), 2, "matches no VM"),
        (("{here}", "{other}", "--last", "0"), 2, "0"),
        (("{other}", "{here}", "--mirror"), 2, "mirroring"),
    ],
)
def test_what_makes_no_sense(
    history: Casbackup, other: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    places = {"here": history.repository, "other": other, "none": history.folder / "none"}
    error = history.fails(status, "sync", *(argument.format(**places) for argument in arguments))
    assert said in error["message"]
    assert len(listed(history, history.repository)) == 6


def test_a_profile_is_an_end(history: Casbackup, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = history.folder / "config.toml"
    config.write_text(f'[profiles.away]\nrepository = "{other}"\n')
    monkeypatch.setenv("CASBACKUP_CONFIG", str(config))
    assert history.json("sync", history.repository, "profile:away")["equal"] is True
    assert len(listed(history, other)) == 6


def test_repair_from_a_partner(history: Casbackup) -> None:
    partner = history.folder / "partner"
    shutil.copytree(history.repository, partner)
    damage(history.repository)
    assert history("check", "--read-data", "-q").status == 4
    document = history.json("repair", "--from", partner)
    assert (document["healed_blobs"], document["fetched_blobs"], document["lost_blobs"]) == (1, 1, 0)
    assert document["fetched_bytes"] > 10_000
    history.ok("check", "--read-data")


def test_repair_from_a_partner_that_cannot_help(history: Casbackup, other: Path) -> None:
    damage(history.repository)
    assert history("check", "--read-data", "-q").status == 4
    result = history("repair", "--from", other)
    assert result.status == 4
    assert "the other repository: " in result.text
    assert history.fails(2, "repair", "--from", other, "--rebuild-index")["code"] == "usage"
    assert history.fails(2, "repair", "--from", history.repository)["code"] == "usage"
