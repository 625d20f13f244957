"""Marking: everything that snapshots and sessions need, found by visiting each distinct tree node once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from casbackup.errors import DataDamage
from casbackup.fs import Buffer
from casbackup.ids import ZERO_ID, BlobId
from casbackup.repository.catalog import Snapshot
from casbackup.repository.indextable import Prefixes
from casbackup.spec.node import EXTENT_BYTES, INNER, LEAF, NODE_HEADER_BYTES, Inner, decode_node
from casbackup.spec.outline import HEADER_BYTES, decode_children, decode_head
from casbackup.store.blobstore import BlobStore

_BATCH = 1024
_COMPACT_AT = 4_000_000


@dataclass(slots=True)
class Marks:
    """``prefixes``: sorted first 8 bytes of the ids of all marked blobs. ``unreadable``: nodes that could not be
    visited.
    """

    prefixes: Prefixes
    nodes: int = 0
    unreadable: dict[BlobId, DataDamage] = field(default_factory=dict)


def roots_of(snapshots: Iterable[Snapshot]) -> list[BlobId]:
    """The roots of all disks, each once."""
    return list(dict.fromkeys(d.root for s in snapshots for d in s.manifest.disks if d.root != ZERO_ID))


def configs_of(snapshots: Iterable[Snapshot]) -> list[BlobId]:
    return list(dict.fromkeys(c.id for s in snapshots for c in s.manifest.configs))


def mark(
    store: BlobStore,
    roots: Iterable[BlobId],
    others: Iterable[BlobId] = (),
    visited: Callable[[int], None] | None = None,
) -> Marks:
    """Mark ``roots`` (tree nodes) with all below them, and ``others`` by themselves.

    A node's bytes are verified. One that cannot be read is listed; what is below it is marked as its
    outline says, if the index has one: the node may come back, from a copy or a later backup, and then all below it
    must be there.
    ``visited`` hears how many nodes each step visited.
    """
    collected = _Prefixes()
    collected.add_ids(list(others))
    result = Marks(np.empty(0, np.uint64))
    seen: set[BlobId] = set()
    frontier = [root for root in dict.fromkeys(roots) if root != ZERO_ID]
    while frontier:
        # Deepest first: the frontier stays small.
        batch, frontier = frontier[-_BATCH:], frontier[:-_BATCH]
        batch = [node for node in dict.fromkeys(batch) if node not in seen]
        seen.update(batch)
        collected.add_ids(batch)
        for node, record in store.fetch(batch) if batch else ():
            try:
                if isinstance(record, DataDamage):
                    raise record
                frontier += _visit(store.codec.decode(record), collected)
            except DataDamage as damage:
                result.unreadable[node] = damage
                frontier += _below_lost(store, node, collected)
        store.index.release_pages()
        if visited is not None:
            visited(len(batch))
    result.nodes = len(seen)
    result.prefixes = collected.sorted()
    return result


def _visit(plain: Buffer, collected: _Prefixes) -> list[BlobId]:
    """Mark what a node names; returns the nodes among it. Leaves stay in numpy."""
    if plain[0] == LEAF and (len(plain) - NODE_HEADER_BYTES) % EXTENT_BYTES == 0:
        # An extent is 40 bytes: length and skip in the first 8, the id's first 8 bytes in the next.
        # Copied, because a view would keep all of the node in memory.
        collected.add(np.frombuffer(plain, "<u8", offset=NODE_HEADER_BYTES).reshape(-1, 5)[:, 1].copy())
        return []
    node = decode_node(plain)
    assert isinstance(node, Inner) and plain[0] == INNER
    return [child for child in dict.fromkeys(node.children) if child != ZERO_ID]


def _below_lost(store: BlobStore, node: BlobId, collected: _Prefixes) -> list[BlobId]:
    with store.index.read() as txn:
        outline = txn.get(node, db=store.index.outlines)
    if outline is None:
        return []
    outline = bytes(outline)
    kind, _ = decode_head(outline)
    if kind == INNER:
        return decode_children(outline)
    # 16 bytes for each chunk: the first 8 of its id, then its sizes.
    collected.add(np.frombuffer(outline, "<u8", offset=HEADER_BYTES).reshape(-1, 2)[:, 0])
    return []


class _Prefixes:
    """A set of 64-bit numbers, kept as arrays."""

    def __init__(self) -> None:
        self._parts: list[Prefixes] = []
        self._count = 0

    def add_ids(self, ids: Sequence[BlobId]) -> None:
        if ids:
            self.add(np.frombuffer(b"".join([i[:8] for i in ids]), "<u8"))

    def add(self, numbers: Prefixes) -> None:
        self._parts.append(numbers)
        self._count += len(numbers)
        if self._count > _COMPACT_AT:
            self._parts = [self.sorted()]
            self._count = len(self._parts[0]) // 2  # what is distinct counts half, so compacting stays rare

    def sorted(self) -> Prefixes:
        """By sorting: ``np.unique`` alone hashes, which takes ten times as long."""
        if not self._parts:
            return np.empty(0, np.uint64)
        numbers = np.concatenate(self._parts)
        self._parts = []
        numbers.sort()
        return numbers[np.concatenate(([True], numbers[1:] != numbers[:-1]))]
