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
    on_cbw_error: bool = False
    """``blockdev-backup`` takes ``on-cbw-error``: a failed target breaks the backup, not the guest (10.1)."""
    set_active: bool = False
    """``blockdev-set-active``: disks that a migration has given away can be taken back (10.0)."""


def detect(qmp: QmpClient) -> Features:
    """Read ``query-qmp-schema``. Errors as ``QmpClient.execute``."""
    schema = _Schema(qmp.execute("query-qmp-schema"))
    backup = schema.members(schema.argument("blockdev-backup"))
    return Features(
        backup_perf="x-perf" in backup,
        on_cbw_error="on-cbw-error" in backup,
        set_active=schema.has("blockdev-set-active"),
    )


class _Schema:
    """The types of the schema have numbers for names; an unknown one has no members."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._entries: Mapping[str, dict[str, Any]] = {entry["name"]: entry for entry in entries}

    def has(self, command: str) -> bool:
        return command in self._entries

    def argument(self, command: str) -> str:
        return str(self._entries.get(command, {}).get("arg-type", ""))

    def members(self, kind: str) -> dict[str, str]:
        """The names of an object's members, and their types."""
        return {member["name"]: member["type"] for member in self._entries.get(kind, {}).get("members", ())}
