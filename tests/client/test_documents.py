"""Every command's ``--json`` is the document that docs/reference/json.md describes."""

from __future__ import annotations

import types
from typing import Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from casbackup_client import documents

from .conftest import Casbackup


def conforms(value: Any, kind: Any, place: str = "document") -> None:
    """Assert that a value parsed from JSON has exactly the shape of a type."""
    origin = get_origin(kind)
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        required = {key for key, hint in hints.items() if get_origin(hint) is not NotRequired}
        assert required <= value.keys() <= hints.keys(), f"{place}: {sorted(value)}"
        for key in value:
            conforms(value[key], hints[key], f"{place}.{key}")
    elif origin is list:
        assert isinstance(value, list), place
        for item in value:
            conforms(item, get_args(kind)[0], f"{place}[]")
    elif origin is NotRequired:
        conforms(value, get_args(kind)[0], place)
    elif origin in (Union, types.UnionType):
        if value is not None:
            conforms(value, next(arm for arm in get_args(kind) if arm is not type(None)), place)
    else:
        accepted = (int, float) if kind is float else kind
        assert isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)), f"{place}: {value!r}"


def test_every_command_prints_its_document(bare: Casbackup) -> None:
    cb, disk, config = bare, bare.disk(), bare.folder / "100.conf"
    config.write_text("cores: 2\n")
    out, piece = cb.folder / "out", cb.folder / "piece"
    commands: list[tuple[type, list[object]]] = [
        (documents.InitDocument, ["init"]),
        (documents.SnapshotResultDocument, ["backup", "vm/100", f"scsi0={disk}", "--config", config]),
        (documents.SnapshotResultDocument, ["backup", "vm/100", f"scsi0={disk}", "--label", "weekly"]),
        (documents.SnapshotsDocument, ["snapshots"]),
        (documents.SnapshotResultDocument, ["show", "vm/100"]),
        (documents.DifferenceDocument, ["diff", "vm/100", "vm/100"]),
        (documents.RestoreDocument, ["restore", "vm/100", "--to", out]),
        (documents.DumpDocument, ["dump", "vm/100", "scsi0", "-o", piece, "--length", "1M"]),
        (documents.StatsDocument, ["stats"]),
        (documents.SnapshotResultDocument, ["pin", "vm/100"]),
        (documents.SnapshotResultDocument, ["label", "vm/100", "--add", "x"]),
        (documents.ForgetDocument, ["forget", "--keep-last", "1", "-n"]),
        (documents.ForgetDocument, ["forget", "--keep-last", "1", "--gc"]),
        (documents.GcDocument, ["gc", "-n"]),
        (documents.GcDocument, ["gc"]),
        (documents.CheckDocument, ["check", "--read-data"]),
        (documents.RepairDocument, ["repair"]),
        (documents.RebuildDocument, ["repair", "--rebuild-index"]),
        (documents.MigrateDocument, ["migrate"]),
        (documents.MigrateDocument, ["migrate", "-n"]),
        (documents.SessionsDocument, ["sessions"]),
        (documents.JobsDocument, ["job", "list"]),
        (documents.VersionDocument, ["version"]),
        (documents.CompletionDocument, ["completion", "bash"]),
    ]
    for kind, arguments in commands:
        conforms(cb.json(*arguments), kind, " ".join(map(str, arguments[:1])))


def test_documents_of_archives(cb: Casbackup) -> None:
    cb.ok("backup", "vm/100", f"scsi0={cb.disk()}")
    archive, damaged = cb.folder / "x.vma", cb.folder / "damaged.vma"
    commands: list[tuple[type, list[object]]] = [
        (documents.ExportDocument, ["export", "vm/100", archive]),
        (documents.ImportDocument, ["import", "vm/200", archive]),
        (documents.SnapshotResultDocument, ["show", "vm/200"]),
        (documents.ArchiveListDocument, ["archive", "list", archive]),
        (documents.ArchiveConfigContentDocument, ["archive", "config", archive]),
        (documents.ArchiveVerifyDocument, ["archive", "verify", archive]),
        (documents.ArchiveExtractDocument, ["archive", "extract", archive, cb.folder / "out"]),
        (documents.ArchiveSalvageDocument, ["archive", "salvage", archive, cb.folder / "saved"]),
        (documents.ArchiveConvertDocument, ["archive", "convert", archive, cb.folder / "x.tar"]),
        (documents.FormatsDocument, ["archive", "formats"]),
    ]
    for kind, arguments in commands:
        conforms(cb.json(*arguments), kind, " ".join(map(str, arguments[:2])))
    damaged.write_bytes(archive.read_bytes()[:-5000])
    for kind, arguments, status in [
        (documents.ImportDocument, ["import", "vm/300", damaged, "--allow-incomplete"], 3),
        (documents.ArchiveVerifyDocument, ["archive", "verify", damaged], 1),
        (documents.ArchiveExtractDocument, ["archive", "extract", damaged, cb.folder / "a", "--allow-incomplete"], 3),
        (documents.ArchiveSalvageDocument, ["archive", "salvage", damaged, cb.folder / "b"], 3),
    ]:
        result = cb(*arguments, "--json")
        assert result.status == status
        conforms(result.json, kind, " ".join(map(str, arguments[:2])))
    conforms(cb.json("show", "vm/300"), documents.SnapshotResultDocument)


def test_errors_are_documents_too(bare: Casbackup) -> None:
    for arguments in (["snapshots"], ["no-such-command"], ["backup"]):
        result = bare(*arguments, "--json")
        assert result.status != 0
        assert result.out == b""
        conforms({"error": result.error}, documents.FailureDocument)


@pytest.mark.parametrize("place", ["before", "after"])
def test_json_may_stand_before_or_after_the_command(cb: Casbackup, place: str) -> None:
    arguments = ["--json", "snapshots"] if place == "before" else ["snapshots", "--json"]
    assert cb.ok(*arguments).json == {"snapshots": []}
