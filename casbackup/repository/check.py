"""Checking: is everything that snapshots need there, and, with ``read_data``, is every byte what it should be?

The structural part reads all manifests and all tree nodes (verified against their ids) and compares the index with
the packs. Reading data verifies each record's checksum and each blob against its id, and notes when: later checks
can read just what was not read for long. In an encrypted repository, seals and ids of what is sealed can only be
verified with the key (``Repository.unlock``); without it, checksums are all there is to go by. What is found is marked
in the index, so that the next backup heals it if it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from casbackup.errors import ManifestDamaged, PackDamaged
from casbackup.ids import BlobId
from casbackup.progress import NoProgress, Progress
from casbackup.repository.catalog import Snapshot
from casbackup.repository.damage import AffectedDisk, DamageMap, note_damage
from casbackup.repository.indextable import IndexTable, contains, read_index
from casbackup.repository.mark import Marks, configs_of, mark, roots_of
from casbackup.repository.repository import Repository
from casbackup.repository.scrub import Scrubber
from casbackup.spec.indexdb import STATE_DAMAGED
from casbackup.spec.record import BlobKind
from casbackup.store.packfile import has_footer, read_header

_READ_BYTES = 4 * 1024 * 1024
_NOTE_EVERY = 20_000


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """``read_data`` verifies stored bytes: all, or the ``subset_percent`` that was verified longest ago, or what was
    not verified for ``older_than_s``; oldest first, until ``time_budget_s`` is used up.
    """

    read_data: bool = False
    subset_percent: float | None = None
    older_than_s: float | None = None
    time_budget_s: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong (``severity`` "damage"), or odd but harmless ("note"), and with what."""

    severity: str
    object: str
    message: str


@dataclass(slots=True)
class CheckReport:
    """``affected`` says what the damage means. ``unverified_blobs`` were not read, by choice or for lack of time."""

    findings: list[Finding] = field(default_factory=list)
    affected: list[AffectedDisk] = field(default_factory=list)
    snapshots: int = 0
    nodes: int = 0
    blobs: int = 0
    packs: int = 0
    verified_blobs: int = 0
    verified_bytes: int = 0
    unverified_blobs: int = 0
    healed_blobs: int = 0

    @property
    def damaged(self) -> bool:
        return any(finding.severity == "damage" for finding in self.findings)

    def damage(self, thing: str, message: str) -> None:
        self.findings.append(Finding("damage", thing, message))

    def note(self, thing: str, message: str) -> None:
        self.findings.append(Finding("note", thing, message))


def check(repository: Repository, options: CheckOptions | None = None, progress: Progress | None = None) -> CheckReport:
    """Check the repository. Damage is a result, not an exception. On a read-only repository nothing is noted in the
    index.
    """
    options, progress = options or CheckOptions(), progress or NoProgress()
    report = CheckReport()
    _check_config(repository, report)
    snapshots = _check_manifests(repository, report)
    # Snapshots are listed before the index is read: what they need was in the index before they were committed.
    marks = _check_trees(repository, snapshots, report, progress)
    table = read_index(repository.index)
    damaged = _check_index(repository, table, marks, snapshots, report)
    damaged |= _check_packs(repository, table, report)
    if options.read_data:
        _check_frames(repository, report)
        damaged |= _read_data(repository, table, options, report, progress)
    _conclude(repository, table, marks, snapshots, damaged, report)
    return report


def _check_config(repository: Repository, report: CheckReport) -> None:
    """config.json and its copy were written with the same bytes."""
    layout = repository.layout
    copy = repository.fs.read(layout.config_backup) if repository.fs.exists(layout.config_backup) else b""
    if repository.fs.read(layout.config) != copy:
        report.note(
            layout.config, "differs from its copy config.json.backup: was it edited, or is one of them damaged?"
        )


def _check_manifests(repository: Repository, report: CheckReport) -> list[Snapshot]:
    for key, error in repository.catalog.verify_files():
        report.damage(repository.layout.manifest(key), str(error))
    snapshots, unreadable = repository.catalog.survey()
    for problem in unreadable:
        if not any(finding.message == str(problem) for finding in report.findings):
            report.damage("manifest", str(problem))
    _check_seals(repository, snapshots, report)
    report.snapshots = len(snapshots)
    return snapshots


def _check_seals(repository: Repository, snapshots: Sequence[Snapshot], report: CheckReport) -> None:
    """With the key: were the manifests made by somebody who has it?"""
    seal = repository.manifest_seal
    if seal is None:
        return
    for snapshot in snapshots:
        try:
            seal.open(snapshot.manifest, f"the manifest of {snapshot.reference}")
        except ManifestDamaged as error:
            report.damage(repository.layout.manifest(snapshot.key), str(error))


def _check_trees(
    repository: Repository, snapshots: Sequence[Snapshot], report: CheckReport, progress: Progress
) -> Marks:
    progress.start("tree nodes", None)
    marks = mark(
        repository.store, roots_of(snapshots), configs_of(snapshots), lambda nodes: progress.advance(nodes=nodes)
    )
    progress.finish()
    report.nodes = marks.nodes
    for node, error in marks.unreadable.items():
        report.damage(f"tree node {node.hex()[:16]}", str(error))
    return marks


def _check_index(
    repository: Repository, table: IndexTable, marks: Marks, snapshots: Sequence[Snapshot], report: CheckReport
) -> set[BlobId]:
    """Every blob that is needed has an entry, and one that is not known to be damaged."""
    report.blobs = len(table)
    needed = contains(marks.prefixes, table.prefixes)
    known_bad = set(table.ids_where(needed & ((table.values["state"] & STATE_DAMAGED) > 0)))
    for blob_id in known_bad:
        report.damage(f"blob {blob_id.hex()[:16]}", "was found damaged by an earlier check and is not healed yet")
    present = np.sort(table.prefixes)
    absent = marks.prefixes[~contains(present, marks.prefixes)]
    missing = _full_ids(repository, snapshots, absent[absent != 0]) if len(absent) else set()
    for blob_id in missing:
        report.damage(f"blob {blob_id.hex()[:16]}", "is needed by a snapshot but not in the index")
    return known_bad | missing | set(marks.unreadable)


def _full_ids(repository: Repository, snapshots: Sequence[Snapshot], prefixes: npt.NDArray[np.uint64]) -> set[BlobId]:
    """The ids with these first 8 bytes among all that snapshots need: a second walk, only made when something is
    missing.
    """
    wanted = {int(prefix).to_bytes(8, "little") for prefix in prefixes}
    finder = DamageMap(repository, ())
    return {blob for blob in finder.named(snapshots) if blob[:8] in wanted}


def _check_packs(repository: Repository, table: IndexTable, report: CheckReport) -> set[BlobId]:
    """Every pack of the index is there and long enough; what else lies in the folder is noted."""
    storage = repository.store.storage
    rows = repository.store.pack_rows()
    sizes = {info.pack: info.size_bytes for info in storage.list()}
    report.packs = len(rows)
    ends = table.values["offset"].astype(np.int64) + table.records_bytes()
    damaged: set[BlobId] = set()
    for number, row in rows.items():
        size = sizes.get(row.pack)
        if size is None and number not in repository.store.pack_rows():
            continue  # dropped by a gc since the look
        beyond = (table.values["pack"] == number) & (ends > (size or 0)) if (size or 0) < row.size_bytes else None
        if beyond is None or not beyond.any():
            continue
        what = "is missing" if size is None else f"is truncated to {size} bytes"
        report.damage(f"pack {row.pack}", f"{what}: {int(beyond.sum())} blobs are lost")
        damaged |= set(table.ids_where(beyond))
    for name in storage.foreign():
        report.note(name, "is no pack and is ignored")
    return damaged


def _check_frames(repository: Repository, report: CheckReport) -> None:
    """Headers and footers of packs. Only a rebuild of the index reads them, and it can do without: no data is lost."""
    storage = repository.store.storage
    for row in repository.store.pack_rows().values():
        try:
            if read_header(storage, row.pack) is None:
                report.note(f"pack {row.pack}", "its header is damaged; its records do not need it")
            if row.sealed and not has_footer(storage, row.pack):
                report.note(f"pack {row.pack}", "its footer is damaged; its records do not need it")
        except (PackDamaged, OSError, KeyError):
            continue  # missing or unreadable packs are reported as such


def _read_data(
    repository: Repository, table: IndexTable, options: CheckOptions, report: CheckReport, progress: Progress
) -> set[BlobId]:
    chosen = _choose(table, options, repository.clock.now_ms() // 1000)
    progress.start("stored data", int(table.records_bytes()[chosen].sum()))
    scrubber = Scrubber(repository, table, progress, time_budget_s=options.time_budget_s)
    scrubber.run(chosen)
    progress.finish()
    for blob_id, problem in scrubber.damaged.items():
        report.damage(f"blob {blob_id.hex()[:16]}", problem)
    report.verified_blobs, report.verified_bytes = scrubber.verified_blobs, scrubber.verified_bytes
    report.unverified_blobs = len(table) - report.verified_blobs - len(scrubber.damaged)
    return set(scrubber.damaged)


def _choose(table: IndexTable, options: CheckOptions, now_s: int) -> npt.NDArray[np.int64]:
    """Rows to read: all in pack order, or the ones verified longest ago first (in the future counts as never)."""
    stored = table.values["pack"] > 0
    verified = np.where(table.values["verified"] > now_s, 0, table.values["verified"]).astype(np.int64)
    if options.older_than_s is not None:
        stored &= verified <= now_s - options.older_than_s
    rows = np.flatnonzero(stored)
    oldest_first = options.subset_percent is not None or options.time_budget_s is not None
    age = verified[rows] // 3600 if oldest_first else np.zeros(len(rows), np.int64)
    rows = rows[np.lexsort((table.values["offset"][rows], table.values["pack"][rows], age))]
    if options.subset_percent is not None:
        rows = rows[: int(np.ceil(len(rows) * options.subset_percent / 100))]
    return np.asarray(rows, np.int64)


def _conclude(
    repository: Repository,
    table: IndexTable,
    marks: Marks,
    snapshots: Sequence[Snapshot],
    damaged: set[BlobId],
    report: CheckReport,
) -> None:
    """Say what the damage means, and note it in the index."""
    if not damaged:
        return
    damage_map = DamageMap(repository, damaged)
    report.affected = damage_map.affected(snapshots)
    if not repository.read_only:
        # Of all nodes, not only those of snapshots: a backup may be told of one that none needs any more.
        nodes = table.ids_where(table.values["kind"] == BlobKind.NODE)
        note_damage(repository, sorted(damaged), damage_map.suspects(nodes))
