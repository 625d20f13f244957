"""What a QEMU can do, asked of itself: options come and go with versions, and distributions patch theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from casbackup.qemu.qmp import QmpClient


@dataclass(frozen=True, slots=True)
class Features:
    """Of the QEMU behind one monitor. The version that brought each stands beside it."""

    backup_perf: bool = False
    """``blockdev-backup`` takes ``x-perf``: workers and chunk size (6.0)."""
    min_cluster_size: bool = False
    """``x-perf`` takes ``min-cluster-size`` (9.2)."""
    on_cbw_error: bool = False
    """``blockdev-backup`` takes ``on-cbw-error``: a failed target breaks the backup, not the guest (10.1)."""
    copy_before_write: bool = False
    """The filter is a node of its own (6.2)."""
    cbw_timeout: bool = False
    """The filter takes ``cbw-timeout`` (7.1)."""
    snapshot_access: bool = False
    """What the filter saved can be read (7.0; right since 8.0)."""
    yank: bool = False
    """A hung connection can be cut (6.0; not in qemu-storage-daemon)."""
    background_snapshot: bool = False
    """RAM can be saved while the VM runs (6.0)."""


def detect(qmp: QmpClient) -> Features:
    """Read ``query-qmp-schema``. Errors as ``QmpClient.execute``."""
    schema = _Schema(qmp.execute("query-qmp-schema"))
    backup = schema.members(schema.argument("blockdev-backup"))
    blockdev = schema.argument("blockdev-add")
    filter_options = schema.members(schema.variant(blockdev, "copy-before-write"))
    return Features(
        backup_perf="x-perf" in backup,
        min_cluster_size="min-cluster-size" in schema.members(backup.get("x-perf", "")),
        on_cbw_error="on-cbw-error" in backup,
        copy_before_write="on-cbw-error" in filter_options,
        cbw_timeout="cbw-timeout" in filter_options,
        snapshot_access=bool(schema.variant(blockdev, "snapshot-access")),
        yank=schema.has_command("yank"),
        background_snapshot=schema.has_command("migrate-set-capabilities"),
    )


class _Schema:
    """The types of the schema have numbers for names; an unknown one has no members."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._entries: Mapping[str, dict[str, Any]] = {entry["name"]: entry for entry in entries}

    def has_command(self, name: str) -> bool:
        return self._entries.get(name, {}).get("meta-type") == "command"

    def argument(self, command: str) -> str:
        return str(self._entries.get(command, {}).get("arg-type", ""))

    def members(self, kind: str) -> dict[str, str]:
        """The names of an object's members, and their types."""
        return {member["name"]: member["type"] for member in self._entries.get(kind, {}).get("members", ())}

    def variant(self, kind: str, case: str) -> str:
        """The type that holds the further members of a union, when its tag has the value ``case``."""
        variants = self._entries.get(kind, {}).get("variants", ())
        return next((str(item["type"]) for item in variants if item["case"] == case), "")
