"""What snapshots cost, as a peer tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from casbackup.errors import ServerProtocolError

if TYPE_CHECKING:
    from casbackup.repository.accounting import Usage
    from casbackup.repository.catalog import Snapshot
    from casbackup.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class UsageReport:
    """``groups`` as they were asked for. The rest is about the whole repository."""

    groups: Sequence[Usage]
    total: Usage
    dedup_factor: float
    compression_factor: float
    packs_bytes: int
    index_bytes: int


def usage_of(repository: Repository, groups: Sequence[Sequence[Snapshot]]) -> UsageReport:
    """:raise DataDamage: when a tree node cannot be read."""
    from casbackup.repository.accounting import account  # noqa: PLC0415  numpy: 90 ms

    accounting = account(repository)
    return UsageReport(
        groups=[accounting.usage(group) for group in groups],
        total=accounting.total(),
        dedup_factor=accounting.dedup_factor,
        compression_factor=accounting.compression_factor,
        packs_bytes=sum(info.size_bytes for info in repository.store.storage.list()),
        index_bytes=repository.index.size_bytes(),
    )


def usage_to_map(report: UsageReport) -> dict[str, Any]:
    """The report as JSON has it."""
    return {**asdict(report), "groups": [asdict(group) for group in report.groups]}


def usage_from_map(content: dict[str, Any]) -> UsageReport:
    """:raise ServerProtocolError: when it is none."""
    from casbackup.repository.accounting import Usage  # noqa: PLC0415  numpy: 90 ms

    try:
        groups = [Usage(**group) for group in content["groups"]]
        return UsageReport(**{**content, "groups": groups, "total": Usage(**content["total"])})
    except (KeyError, TypeError) as error:
        raise ServerProtocolError(f"the server's report is not understood: {error}") from error
