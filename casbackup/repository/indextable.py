"""The whole blob index as numpy arrays: 64 bytes a blob, so a repository of a million chunks is looked at in a second
or two.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from casbackup.ids import ID_BYTES, BlobId
from casbackup.spec.indexdb import BLOB_VALUE
from casbackup.spec.record import HEADER_BYTES
from casbackup.store.index import Index

_BATCH = 65536
VALUE = np.dtype(
    [(name, "<u4") for name in ("pack", "offset", "stored", "plain", "session", "verified", "epoch")]
    + [(name, "u1") for name in ("kind", "flags", "state", "reserved")]
)
Bools = npt.NDArray[np.bool_]
Prefixes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class IndexTable:
    """Row i: ``ids[i]`` (32 bytes) and ``values[i]`` (fields of VALUE). In order of id."""

    ids: npt.NDArray[np.uint8]
    values: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def prefixes(self) -> Prefixes:
        """The first 8 bytes of every id as a number. Equal prefixes of different ids only ever make gc keep more."""
        return self.ids[:, :8].copy().view("<u8").ravel()

    def records_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of each blob's record in its pack."""
        return self.values["stored"].astype(np.int64) + HEADER_BYTES

    def ids_where(self, rows: Bools) -> list[BlobId]:
        raw = self.ids[rows].tobytes()
        return [BlobId(raw[i : i + ID_BYTES]) for i in range(0, len(raw), ID_BYTES)]

    def id(self, row: int) -> BlobId:
        return BlobId(self.ids[row].tobytes())


def read_index(index: Index) -> IndexTable:
    """Copy the index, a batch a read transaction, so that writers are not held up by an old view of it."""
    with index.read() as txn:
        room = txn.stat(index.blobs)["entries"]
    ids = np.empty((room, ID_BYTES), np.uint8)
    values = np.empty(room, VALUE)
    count, after = 0, b""
    while True:
        keys, data = _batch(index, after)
        if not keys:
            break
        after = keys[-1]
        if count + len(keys) > len(values):
            room = count + len(keys) + _BATCH
            ids = np.resize(ids, (room, ID_BYTES))
            values = np.resize(values, room)
        ids[count : count + len(keys)] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, ID_BYTES)
        values[count : count + len(keys)] = np.frombuffer(b"".join(data), VALUE)
        count += len(keys)
    return IndexTable(ids[:count], values[:count])


def _batch(index: Index, after: bytes) -> tuple[list[bytes], list[bytes]]:
    with index.read() as txn, txn.cursor(db=index.blobs) as cursor:
        found = cursor.set_range(after + b"\0" if after else b"")
        pairs = list(islice(cursor.iternext(), _BATCH)) if found else []
    return [bytes(key) for key, _ in pairs], [bytes(value) for _, value in pairs]


def contains(haystack: Prefixes, needles: Prefixes) -> Bools:
    """Which of ``needles`` are in the sorted ``haystack``."""
    if not len(haystack):
        return np.zeros(len(needles), np.bool_)
    places = np.minimum(np.searchsorted(haystack, needles), len(haystack) - 1)
    return np.asarray(haystack[places] == needles)


assert VALUE.itemsize == BLOB_VALUE.size
