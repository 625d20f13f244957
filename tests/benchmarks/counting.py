"""Counts what a repository does. Numbers of steps show how costs grow on any machine, however busy it is."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from casbackup.fs import FolderEntry, RealFile, RealFileSystem
from casbackup.ids import BlobId, PackId
from casbackup.repository.repository import Repository
from casbackup.store.blobstore import Fetched
from casbackup.store.index import Transaction

T = TypeVar("T")


class Counts(Counter[str]):
    """``gets``, ``puts`` and ``scans`` of the index, ``reads`` and ``writes``: its transactions; ``fetched`` blobs;
    ``pack reads``; ``files`` opened or read whole; ``folders`` listed.
    """

    def during(self, action: Callable[[], object]) -> Counts:
        """What an action alone does."""
        before = Counts(self)
        action()
        after = Counts(self)
        after.subtract(before)
        return after


@contextlib.contextmanager
def counted(path: str) -> Iterator[tuple[Repository, Counts]]:
    """Open a repository whose work is counted."""
    counts = Counts()
    with Repository.open(path, fs=_CountingFileSystem(counts)) as repository:
        _count_index(repository, counts)
        _count_store(repository, counts)
        yield repository, counts


class _CountingFileSystem(RealFileSystem):
    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def open(self, path: str) -> RealFile:
        self._counts["files"] += 1
        return super().open(path)

    def read(self, path: str) -> bytes:
        self._counts["files"] += 1
        return super().read(path)

    def list(self, folder: str) -> list[FolderEntry]:
        self._counts["folders"] += 1
        return super().list(folder)


class _CountingTransaction:
    def __init__(self, txn: Transaction, counts: Counts) -> None:
        self._txn = txn
        self._counts = counts

    def get(self, *args: Any, **kwargs: Any) -> Any:
        self._counts["gets"] += 1
        return self._txn.get(*args, **kwargs)

    def put(self, *args: Any, **kwargs: Any) -> Any:
        self._counts["puts"] += 1
        return self._txn.put(*args, **kwargs)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        self._counts["scans"] += 1
        return self._txn.cursor(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._txn, name)


def _count_index(repository: Repository, counts: Counts) -> None:
    index = repository.index
    read, write = index.read, index.write

    @contextlib.contextmanager
    def counted_read() -> Iterator[Any]:
        counts["reads"] += 1
        with read() as txn:
            yield _CountingTransaction(txn, counts)

    def counted_write(change: Callable[[Any], T]) -> T:
        counts["writes"] += 1
        return write(lambda txn: change(_CountingTransaction(txn, counts)))

    index.read, index.write = counted_read, counted_write  # type: ignore[method-assign]


def _count_store(repository: Repository, counts: Counts) -> None:
    store, storage = repository.store, repository.store.storage
    fetch, read = store.fetch, storage.read

    def counted_fetch(ids: Sequence[BlobId]) -> Iterator[Fetched]:
        counts["fetched"] += len(ids)
        return fetch(ids)

    def counted_read(pack: PackId, offset: int, length: int) -> bytes:
        counts["pack reads"] += 1
        return read(pack, offset, length)

    store.fetch, storage.read = counted_fetch, counted_read  # type: ignore[method-assign]
