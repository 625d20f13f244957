"""What an isolated token may be told about: blobs of its VM's snapshots, and what its session has sent.

Everything else is missing to it: it must send the content, which proves that it has it, and is deduplicated on
arrival. Nor may its tree nodes name anything else, or a guessed id would be a way to read somebody else's data.
Blobs are told by the first 8 bytes of their ids, so that a VM of 1 TiB costs 130 MB at most.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np

from casbackup.codec.codec import Codec
from casbackup.errors import ClosureViolation
from casbackup.ids import ZERO_ID, BlobId
from casbackup.repository.catalog import Snapshot
from casbackup.repository.indextable import Prefixes, contains
from casbackup.repository.mark import configs_of, mark, roots_of
from casbackup.repository.repository import Repository
from casbackup.spec.manifest import Manifest
from casbackup.spec.node import Inner, decode_node
from casbackup.spec.record import BlobKind, Record

_RECENT = 50_000


class OwnBlobs:
    """A set of blobs that grows. Safe from several threads."""

    def __init__(self, prefixes: Prefixes, codec: Codec) -> None:
        """``prefixes``: sorted. ``codec``: how the repository's blobs are read."""
        self._codec = codec
        self._sorted = prefixes
        self._recent: set[bytes] = set()
        self._lock = threading.Lock()

    def add(self, ids: Iterable[BlobId]) -> None:
        with self._lock:
            self._recent.update(blob_id[:8] for blob_id in ids)
            if len(self._recent) > _RECENT:
                added = np.frombuffer(b"".join(self._recent), "<u8")
                self._sorted = np.union1d(self._sorted, added)
                self._recent = set()

    def strangers(self, ids: Sequence[BlobId]) -> set[BlobId]:
        """Those of ``ids`` that are not in the set."""
        if not ids:
            return set()
        asked = np.frombuffer(b"".join([blob_id[:8] for blob_id in ids]), "<u8")
        with self._lock:
            inside = contains(self._sorted, asked)
            recent = self._recent
            return {i for i, known in zip(ids, inside, strict=True) if not known and i[:8] not in recent}

    def check_nodes(self, records: Sequence[Record]) -> None:
        """:raise ClosureViolation: when a node names something that is neither in the set nor before it."""
        before: set[BlobId] = set()
        for record in records:
            if record.kind == BlobKind.NODE:
                self._require([child for child in self._children(record) if child not in before])
            before.add(record.id)

    def check_manifest(self, draft: Manifest) -> None:
        """:raise ClosureViolation: when it names something that is not in the set."""
        roots = [disk.root for disk in draft.disks if disk.root != ZERO_ID]
        self._require([*roots, *(config.id for config in draft.configs)])

    def _require(self, ids: Sequence[BlobId]) -> None:
        for blob_id in self.strangers(ids):
            raise ClosureViolation(f"blob {blob_id.hex()[:16]} is not stored")

    def _children(self, record: Record) -> list[BlobId]:
        """:raise DataDamage: when it is no node."""
        node = decode_node(self._codec.decode(record))
        ids = node.children if isinstance(node, Inner) else [extent.id for extent in node.extents]
        return [blob_id for blob_id in dict.fromkeys(ids) if blob_id != ZERO_ID]


def own_blobs(repository: Repository, snapshots: Sequence[Snapshot]) -> OwnBlobs:
    """All blobs of these snapshots."""
    return OwnBlobs(mark(repository.store, roots_of(snapshots), configs_of(snapshots)).prefixes, repository.codec)
