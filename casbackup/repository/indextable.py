"""The whole blob index as numpy arrays: 64 bytes a blob, so a repository of a million chunks is looked at in a second
or two.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from casbackup.ids import ID_BYTES, BlobId
from casbackup.spec.indexdb import BLOB_VALUE
from casbackup.spec.record import HEADER_BYTES
from casbackup.store.index import Index

_BATCH = 16384
_RELEASE_EVERY = 8
"""Batches after which the pages that were read are given back: some 20 MB of them."""
VALUE = np.dtype(
    [(name, "<u4") for name in ("pack", "offset", "stored", "plain", "session", "verified", "epoch")]
    + [(name, "u1") for name in ("kind", "flags", "state", "reserved")]
)
_ROW = np.dtype([("id", np.uint8, ID_BYTES), ("value", VALUE)])
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

    def where(self, rows: Bools) -> IndexTable:
        """A table of these rows alone, with memory of its own."""
        return IndexTable(self.ids[rows], self.values[rows])

    def id(self, row: int) -> BlobId:
        return BlobId(self.ids[row].tobytes())


def read_index(index: Index) -> IndexTable:
    """Copy the index, a batch a read transaction, so that writers are not held up by an old view of it."""
    with index.read() as txn:
        room = txn.stat(index.blobs)["entries"]
    rows = np.empty((room, _ROW.itemsize), np.uint8)
    filled, after = 0, b""
    for number in count(1):
        batch = _batch(index, after)
        if number % _RELEASE_EVERY == 0 or not len(batch):
            index.release_pages()
        if not len(batch):
            break
        if filled + len(batch) > len(rows):
            rows = np.resize(rows, (filled + len(batch) + _BATCH, _ROW.itemsize))
        rows[filled : filled + len(batch)] = batch
        filled += len(batch)
        after = batch[-1, :ID_BYTES].tobytes()
    table = rows[:filled].view(_ROW).ravel()
    return IndexTable(table["id"], table["value"])


def _batch(index: Index, after: bytes) -> npt.NDArray[np.uint8]:
    """The next rows as bytes. Keys and values are joined without a look at each, in half the time of a loop."""
    with index.read() as txn, txn.cursor(db=index.blobs) as cursor:
        found = cursor.set_range(after + b"\0" if after else b"")
        pairs = islice(cursor.iternext(), _BATCH) if found else ()
        return np.frombuffer(b"".join(chain.from_iterable(pairs)), np.uint8).reshape(-1, _ROW.itemsize)


def contains(haystack: Prefixes, needles: Prefixes) -> Bools:
    """Which of ``needles`` are in the sorted ``haystack``."""
    if not len(haystack):
        return np.zeros(len(needles), np.bool_)
    places = np.minimum(np.searchsorted(haystack, needles), len(haystack) - 1)
    return np.asarray(haystack[places] == needles)


assert VALUE.itemsize == BLOB_VALUE.size
