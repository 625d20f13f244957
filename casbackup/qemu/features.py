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
    pull: bool = False
    """All that pull mode takes: ``copy-before-write`` with a policy and a timeout (7.1), ``snapshot-access`` (7.0),
    ``blockdev-reopen`` (6.1), exports with bitmaps of other nodes (7.1), and the graph of all nodes (4.0)."""
    min_cluster_size: bool = False
    """``copy-before-write`` takes ``min-cluster-size`` (9.2)."""


def detect(qmp: QmpClient) -> Features:
    """Read ``query-qmp-schema``. Errors as ``QmpClient.execute``."""
    schema = _Schema(qmp.execute("query-qmp-schema"))
    backup = schema.members(schema.argument("blockdev-backup"))
    filter_options = schema.variant("blockdev-add", "copy-before-write")
    return Features(
        backup_perf="x-perf" in backup,
        on_cbw_error="on-cbw-error" in backup,
        set_active=schema.has("blockdev-set-active"),
        pull=_can_pull(schema, filter_options),
        min_cluster_size="min-cluster-size" in filter_options,
    )


def _can_pull(schema: _Schema, filter_options: Mapping[str, str]) -> bool:
    exports = schema.variant("block-export-add", "nbd")
    return (
        {"on-cbw-error", "cbw-timeout"} <= filter_options.keys()
        and bool(schema.variant("blockdev-add", "snapshot-access"))
        and schema.is_alternate(schema.element(exports.get("bitmaps", "")))
        and schema.has("blockdev-reopen")
        and schema.has("x-debug-query-block-graph")
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

    def variant(self, command: str, case: str) -> dict[str, str]:
        """The members that the argument of a command has in one case, besides those of all cases."""
        variants = self._entries.get(self.argument(command), {}).get("variants", ())
        return next((self.members(variant["type"]) for variant in variants if variant["case"] == case), {})

    def element(self, kind: str) -> str:
        """The type of an array's elements."""
        return str(self._entries.get(kind, {}).get("element-type", ""))

    def is_alternate(self, kind: str) -> bool:
        """Whether it is one of several types."""
        return self._entries.get(kind, {}).get("meta-type") == "alternate"
