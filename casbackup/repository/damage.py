"""From damaged blobs to what they mean: which ranges of which disks of which snapshots; and noting them in the index.

A damaged blob is marked, and so is every tree node above it (as suspect): ``missing`` names them all, so the next
backup that still has the content sends the chunk again, and with it the way down to it. That heals the snapshots
that share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from casbackup.errors import DataDamage
from casbackup.ids import ZERO_ID, BlobId, DiskName
from casbackup.limits import INDEX_BATCH_ENTRIES
from casbackup.repository.catalog import Snapshot
from casbackup.repository.repository import Repository
from casbackup.spec.indexdb import (
    NO_PACK,
    STATE_DAMAGED,
    STATE_OFFSET,
    STATE_SUSPECT,
    STATE_TOLD_BY_KEY,
    BlobEntry,
    decode_entry,
)
from casbackup.spec.node import Inner, Leaf, decode_node
from casbackup.spec.record import BlobKind
from casbackup.store.index import Transaction
from casbackup.tree.builder import level_of
from casbackup.tree.diff import Range, merged
from casbackup.tree.reader import span_of


@dataclass(frozen=True, slots=True)
class AffectedDisk:
    """Byte ranges of a disk that cannot be restored. ``disk`` None: it is a config, named in ``config``."""

    snapshot: Snapshot
    disk: DiskName | None
    ranges: tuple[Range, ...] = ()
    config: str = ""

    @property
    def lost_bytes(self) -> int:
        return sum(item.length for item in self.ranges)


class DamageMap:
    """Finds what a set of damaged blobs affects. Each distinct tree node is read once, however many snapshots share
    it.
    """

    def __init__(self, repository: Repository, damaged: Iterable[BlobId]) -> None:
        self._repository = repository
        self._damaged = frozenset(damaged)
        self._nodes: dict[BlobId, Leaf | Inner | None] = {}
        self._bad: dict[BlobId, bool] = {}

    def affected(self, snapshots: Sequence[Snapshot]) -> list[AffectedDisk]:
        """What cannot be restored of these snapshots, in their order."""
        found: list[AffectedDisk] = []
        for snapshot in snapshots:
            for disk in snapshot.manifest.disks:
                level = level_of(disk.size_bytes)
                if self._is_bad(disk.root):
                    ranges = self._ranges(disk.root, level, 0, disk.size_bytes)
                    found.append(AffectedDisk(snapshot, disk.name, tuple(merged(ranges))))
            for config in snapshot.manifest.configs:
                if config.id in self._damaged:
                    found.append(AffectedDisk(snapshot, None, config=config.name))
        return found

    def named(self, snapshots: Sequence[Snapshot]) -> Iterator[BlobId]:
        """The ids of all blobs that these snapshots need, as far as nodes can be read; each node's children once."""
        seen: set[BlobId] = set()
        stack = [d.root for s in snapshots for d in s.manifest.disks]
        yield from (c.id for s in snapshots for c in s.manifest.configs)
        while stack:
            node = stack.pop()
            if node == ZERO_ID or node in seen:
                continue
            seen.add(node)
            yield node
            decoded = self._node(node)
            if isinstance(decoded, Inner):
                stack += decoded.children
            elif decoded is not None:
                yield from (extent.id for extent in decoded.extents if not extent.is_zero)
            del self._nodes[node]

    def suspects(self, nodes: Iterable[BlobId]) -> list[BlobId]:
        """Those of ``nodes`` that have something damaged below them, but are not damaged themselves."""
        return [node for node in nodes if node not in self._damaged and self._is_bad(node)]

    def _is_bad(self, node: BlobId) -> bool:
        if node == ZERO_ID:
            return False
        if node not in self._bad:
            self._bad[node] = self._look(node)
        return self._bad[node]

    def _look(self, node: BlobId) -> bool:
        decoded = self._node(node)
        if decoded is None:
            return True
        if isinstance(decoded, Leaf):
            bad = any(extent.id in self._damaged for extent in decoded.extents)
            if not bad:
                del self._nodes[node]  # a sound leaf is not looked at again
            return bad
        self._prefetch(child for child in decoded.children if child not in self._bad)
        below = [self._is_bad(child) for child in decoded.children]  # of all: each is to be known
        return any(below)

    def _ranges(self, node: BlobId, level: int, offset: int, end: int) -> Iterator[Range]:
        if offset >= end or not self._is_bad(node):
            return
        decoded = self._node(node)
        if decoded is None:
            yield Range(offset, min(span_of(level), end - offset))
        elif isinstance(decoded, Inner):
            for number, child in enumerate(decoded.children):
                yield from self._ranges(child, level - 1, offset + number * span_of(level - 1), end)
        else:
            for extent in decoded.extents:
                if extent.id in self._damaged:
                    yield Range(offset, extent.length)
                offset += extent.length

    def _node(self, node: BlobId) -> Leaf | Inner | None:
        """The decoded node, None when it cannot be read."""
        if node not in self._nodes:
            self._prefetch([node])
        return self._nodes[node]

    def _prefetch(self, nodes: Iterable[BlobId]) -> None:
        wanted = [n for n in dict.fromkeys(nodes) if n != ZERO_ID and n not in self._nodes]
        for node, record in self._repository.store.fetch(wanted) if wanted else ():
            try:
                if isinstance(record, DataDamage) or node in self._damaged:
                    raise DataDamage
                self._nodes[node] = decode_node(self._repository.codec.decode(record))
            except DataDamage:
                self._nodes[node] = None


def note_damage(repository: Repository, damaged: Sequence[BlobId], suspects: Sequence[BlobId]) -> None:
    """Mark blobs as damaged (an entry is made if there is none) and nodes above them as suspect. Durable on return."""
    has_key = repository.config.encrypted and not repository.codec.is_blind
    damage = STATE_DAMAGED | STATE_TOLD_BY_KEY if has_key else STATE_DAMAGED
    for state, ids in ((damage, damaged), (STATE_SUSPECT, suspects)):
        for start in range(0, len(ids), INDEX_BATCH_ENTRIES):
            batch = ids[start : start + INDEX_BATCH_ENTRIES]

            def change(txn: Transaction, batch: Sequence[BlobId] = batch, state: int = state) -> None:
                for blob_id in batch:
                    _add_state(repository, txn, blob_id, state)

            repository.index.write(change)


def _add_state(repository: Repository, txn: Transaction, blob_id: BlobId, state: int) -> None:
    value = txn.get(blob_id, db=repository.index.blobs)
    lost = BlobEntry(NO_PACK, 0, 0, 0, 0, 0, 0, BlobKind.CHUNK, 0, 0)
    entry = lost if value is None else decode_entry(value)
    txn.put(blob_id, entry._replace(state=entry.state | state).encode(), db=repository.index.blobs)


def damaged_ids(repository: Repository) -> list[BlobId]:
    """All blobs that the index knows to be damaged."""
    found: list[BlobId] = []
    with repository.index.read() as txn, txn.cursor(db=repository.index.blobs) as cursor:
        for key, value in cursor:
            if value[STATE_OFFSET] & STATE_DAMAGED:
                found.append(BlobId(bytes(key)))
    return found
