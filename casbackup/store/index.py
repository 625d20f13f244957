"""The LMDB environment: opening, growing, transactions, and what LMDB's errors mean.

LMDB gives one writer at a time across processes, readers that never wait, and a commit that is atomic and durable
(``sync`` is on, ``writemap`` off). The map grows on demand: a transaction that meets a full map is rolled back,
the map doubled, and the transaction's function called again - so that function must have no effect but on the
transaction.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import lmdb

from casbackup.errors import IndexDamaged, IndexFull, IndexMissing, RepositoryBusy, RepositoryFull, RepositoryReadOnly
from casbackup.limits import INITIAL_INDEX_MAP_BYTES, MAX_INDEX_BYTES
from casbackup.spec.indexdb import DATABASES

T = TypeVar("T")
Transaction = lmdb.Transaction

_LMDB_LINE = 0
"""The 0.9 format, readable by every LMDB there is."""

_META_REPOSITORY = b"repository_id"


_open_lock = threading.Lock()
_open_indexes: dict[str, Index] = {}


class Index:
    """One open index. LMDB allows one open environment a process, so ``open`` shares it between its callers."""

    def __init__(self, environment: lmdb.Environment, *, read_only: bool) -> None:
        self._env = environment
        self._path = os.path.realpath(environment.path())
        self._users = 1
        self.read_only = read_only
        self._gate = threading.Condition()
        self._active = 0
        self._resizing = False
        self._max_bytes = MAX_INDEX_BYTES
        self._databases: dict[bytes, Any] = {}
        for name in DATABASES:
            self._databases[name] = environment.open_db(name, create=not read_only)
        self.blobs = self._databases[b"blobs"]
        self.packs = self._databases[b"packs"]
        self.snapshots = self._databases[b"snapshots"]
        self.sessions = self._databases[b"sessions"]
        self.outlines = self._databases[b"outlines"]
        self.meta = self._databases[b"meta"]

    @classmethod
    def create(cls, folder: str, repository_id: str, *, map_bytes: int = INITIAL_INDEX_MAP_BYTES) -> Index:
        """Make an empty index in ``folder``, which must exist."""
        with _open_lock:
            index = cls._opened(folder, read_only=False, map_bytes=map_bytes)

        def initialise(txn: Transaction) -> None:
            txn.put(_META_REPOSITORY, repository_id.encode(), db=index.meta)

        index.write(initialise)
        return index

    @classmethod
    def open(cls, folder: str, repository_id: str, *, read_only: bool) -> Index:
        """Open an existing index.

        :raise IndexMissing: when there is none, or it belongs to another repository.
        :raise IndexDamaged: when LMDB cannot read it.
        """
        if not os.path.isfile(os.path.join(folder, "data.mdb")):
            raise IndexMissing(f"there is no index in {folder}")
        with _open_lock:
            shared = _open_indexes.get(os.path.realpath(folder))
            if shared is not None and (read_only or not shared.read_only):
                shared._users += 1
                index = shared
            else:
                index = cls._opened(folder, read_only=read_only, map_bytes=INITIAL_INDEX_MAP_BYTES)
        with index.read() as txn:
            owner = txn.get(_META_REPOSITORY, db=index.meta)
        if owner != repository_id.encode():
            index.close()
            raise IndexMissing(f"the index in {folder} is that of another repository")
        return index

    @classmethod
    def _opened(cls, folder: str, *, read_only: bool, map_bytes: int) -> Index:
        try:
            environment = lmdb.open(
                folder,
                max_dbs=len(DATABASES),
                map_size=map_bytes,
                readonly=read_only,
                lock=not read_only or os.access(folder, os.W_OK),
                max_readers=1024,
                metasync=True,
                sync=True,
                writemap=False,
                lib_version=_LMDB_LINE,
            )
        except lmdb.Error as error:
            raise _translated(error, folder) from error
        try:
            _require_whole(environment, folder)
            index = cls(environment, read_only=read_only)
        except IndexDamaged:
            environment.close()
            raise
        except lmdb.Error as error:
            environment.close()
            raise _translated(error, folder) from error
        _open_indexes[index._path] = index
        return index

    @contextlib.contextmanager
    def read(self) -> Iterator[Transaction]:
        """A read transaction: one consistent view. Keep it short; never nest a transaction in another of the same
        thread.
        """
        try:
            txn = self._begin(write=False)
            try:
                with txn:
                    yield txn
            finally:
                self._leave()
        except lmdb.Error as error:
            raise _translated(error, self._env.path()) from error

    def write(self, change: Callable[[Transaction], T]) -> T:
        """Run ``change`` in a write transaction and commit it durably. It may be called more than once.

        :raise RepositoryFull: when the disk is full; the index is as before.
        """
        if self.read_only:
            raise RepositoryReadOnly(f"the index {self._env.path()} was opened for reading")
        while True:
            try:
                txn = self._begin(write=True)
                try:
                    with txn:
                        return change(txn)
                finally:
                    self._leave()
            except lmdb.MapFullError:
                self._grow()
            except lmdb.Error as error:
                raise _translated(error, self._env.path()) from error

    def next_number(self, txn: Transaction, name: str) -> int:
        """Count up the counter ``name`` and return its new value; the first is 1. Numbers are never given twice."""
        number = self.number(txn, name) + 1
        txn.put(b"number:" + name.encode(), number.to_bytes(8, "big"), db=self.meta)
        return number

    def number(self, txn: Transaction, name: str) -> int:
        """The last number given by ``next_number``; 0 before the first."""
        value = txn.get(b"number:" + name.encode(), db=self.meta)
        return int.from_bytes(value, "big") if value else 0

    def release_pages(self) -> None:
        """Map the file anew, so that the pages that were read no longer count as memory of this process.

        Whoever walks through all of a large index does that now and then; it waits for this process's transactions.
        """
        self._resize(self._map_bytes)

    def size_bytes(self) -> int:
        """Bytes of the index file that are in use."""
        info = self._env.info()
        return int((info["last_pgno"] + 1) * self._env.stat()["psize"])

    def close(self) -> None:
        """Let go of the environment; it ends with its last user in this process."""
        with _open_lock:
            self._users -= 1
            if self._users == 0:
                _open_indexes.pop(self._path, None)
                self._env.close()

    def _begin(self, *, write: bool) -> Transaction:
        """Begin and count a transaction; the caller must ``_leave``. Follows another process that grew the map."""
        while True:
            with self._gate:
                while self._resizing:
                    self._gate.wait()
                self._active += 1
            try:
                return self._env.begin(write=write, buffers=False)
            except lmdb.MapResizedError:
                self._leave()
                self._resize(lambda: 0)
            except BaseException:
                self._leave()
                raise

    def _leave(self) -> None:
        with self._gate:
            self._active -= 1
            self._gate.notify_all()

    def _grow(self) -> None:
        seen_bytes = self._map_bytes()
        if seen_bytes * 2 > self._max_bytes:
            raise IndexFull(f"the index {self._env.path()} would exceed {self._max_bytes} bytes")
        self._resize(lambda: seen_bytes * 2 if self._map_bytes() == seen_bytes else 0)

    def _resize(self, size_bytes: Callable[[], int]) -> None:
        """Set the map's size (0: what other processes made it) while this process has no transaction."""
        with self._gate:
            while self._resizing:
                self._gate.wait()
            self._resizing = True
            while self._active:
                self._gate.wait()
        try:
            self._env.set_mapsize(size_bytes())
        finally:
            with self._gate:
                self._resizing = False
                self._gate.notify_all()

    def _map_bytes(self) -> int:
        return int(self._env.info()["map_size"])


def _require_whole(environment: lmdb.Environment, folder: str) -> None:
    """LMDB maps its file: to touch a page that was cut off would end the process.

    :raise IndexDamaged: when the file is shorter than it says.
    """
    needed_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size_bytes = os.path.getsize(os.path.join(folder, "data.mdb"))
    if size_bytes < needed_bytes:
        raise IndexDamaged(f"the index {folder} is truncated: {size_bytes} of {needed_bytes} bytes are there")


def _translated(error: lmdb.Error, path: str) -> Exception:
    """What an LMDB error means to a user."""
    text = str(error)
    if "No space left" in text or "Disk quota" in text:
        return RepositoryFull(f"cannot write to the index {path}: no space left")
    if isinstance(error, lmdb.ReadersFullError):
        return RepositoryBusy(f"too many processes read the index {path} at once")
    if isinstance(error, lmdb.ReadonlyError) or "Permission denied" in text or "Read-only file system" in text:
        return RepositoryReadOnly(f"cannot open or write the index {path}: {text}")
    return IndexDamaged(f"LMDB cannot use the index {path}: {text}")
