"""Opening and creating a repository; its parts as attributes.

Locks (``docs/architecture.md`` has the table): every user holds ``locks/repository`` shared; a migration and a
rebuild of the index hold it exclusively. ``locks/maintenance`` admits one gc, check or repair at a time; backups
do not take it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType

from casbackup.clock import Clock, SystemClock, format_time
from casbackup.codec.codec import codec_without_key, keyed_codec
from casbackup.codec.master_key import MasterKey
from casbackup.codec.sealing import ManifestSeal
from casbackup.errors import (
    CasbackupError,
    KeyMismatch,
    MigrationNeeded,
    NetworkFileSystem,
    NotARepository,
    RepositoryBusy,
    RepositoryExists,
    RepositoryNotFound,
    RepositoryReadOnly,
    TargetUnsuitable,
)
from casbackup.fs import FileLock, FileSystem, RealFileSystem, translated, write_durably
from casbackup.ids import new_repository_id
from casbackup.repository.catalog import Catalog
from casbackup.repository.layout import Layout
from casbackup.repository.mounts import is_network_file_system
from casbackup.repository.sessions import Sessions
from casbackup.spec.config import ChunkerConfig, RepositoryConfig, decode_config, encode_config
from casbackup.store.blobstore import BlobStore
from casbackup.store.index import Index
from casbackup.store.packstorage import FolderPackStorage, PackStorage

_HALF_MADE = {"packs", "snapshots", "index", "locks", "lost+found"}
"""What a creation that was cut short may have left, besides config.json's copy and temporary files."""


class Repository:
    """An open repository. Use as a context manager, or call ``close``."""

    def __init__(
        self,
        layout: Layout,
        config: RepositoryConfig,
        index: Index,
        storage: PackStorage,
        lock: FileLock | None,
        *,
        fs: FileSystem,
        clock: Clock,
    ) -> None:
        self.layout = layout
        self.config = config
        self.index = index
        self.fs = fs
        self.clock = clock
        self.read_only = index.read_only
        self.codec = codec_without_key(config.key_fingerprint)
        self.store = BlobStore(index, storage, self.codec)
        self.manifest_seal: ManifestSeal | None = None
        """Opens manifests, once ``unlock`` has been called."""
        self.catalog = Catalog(fs, layout, index)
        self.sessions = Sessions(self)
        self._lock = lock
        self._closed = False

    @classmethod
    def create(
        cls,
        path: str,
        *,
        chunker: ChunkerConfig | None = None,
        compression_level: int | None = None,
        key_fingerprint: str = "",
        fs: FileSystem | None = None,
        clock: Clock | None = None,
    ) -> Repository:
        """Make a repository in a new or empty folder. config.json comes last, so a half-made one is not taken for one.

        ``key_fingerprint``: of the master key that encrypts it; empty: it is not encrypted.

        :raise RepositoryExists: when there is one, or any other file.
        :raise RepositoryBusy: when somebody else is making one there at the same time.
        :raise NetworkFileSystem: when the folder is on one.
        """
        fs, clock, layout = fs or RealFileSystem(), clock or SystemClock(), Layout(path)
        require_free(fs, layout)
        config = RepositoryConfig(new_repository_id(), format_time(clock.now_ms()), key_fingerprint=key_fingerprint)
        if chunker is not None:
            config = _with(config, chunker=chunker)
        if compression_level is not None:
            config = _with(config, compression_level=compression_level)
        with translated(f"cannot create a repository in {layout.root}"):
            for folder in (layout.packs, layout.snapshots, layout.index, layout.locks):
                fs.make_folders(folder)
            _refuse_network(layout)
            lock = lock_repository(fs, layout, shared=False)
            try:
                _fill_new(fs, layout, config)
            finally:
                if lock is not None:
                    lock.release()
        return cls.open(path, fs=fs, clock=clock)

    @classmethod
    def open(
        cls, path: str, *, read_only: bool | None = None, fs: FileSystem | None = None, clock: Clock | None = None
    ) -> Repository:
        """Open an existing repository; ``read_only`` None means: as the folder's rights allow.

        :raise RepositoryNotFound: when nothing is there. :raise NotARepository: when something else is.
        :raise UnsupportedFormat, MigrationNeeded, ConfigDamaged: as its config.json says.
        :raise IndexMissing, IndexDamaged: when only ``repair --rebuild-index`` helps.
        """
        fs, clock, layout = fs or RealFileSystem(), clock or SystemClock(), Layout(path)
        read_config(fs, layout)
        if read_only is None:
            read_only = fs.is_read_only(layout.root) or fs.is_read_only(layout.index)
        lock = lock_repository(fs, layout, shared=True, read_only=read_only)
        try:
            config = read_config(fs, layout)  # again: a migration may have ended while there was no lock
            if not read_only:
                _refuse_network(layout)
            index = Index.open(layout.index, config.repository_id, read_only=read_only)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return cls(layout, config, index, FolderPackStorage(fs, layout.packs), lock, fs=fs, clock=clock)

    def unlock(self, key: MasterKey) -> None:
        """From now on, what is sealed is verified with the key, and not by its checksum alone. To be called before
        anything is read.

        :raise KeyMismatch: when the repository has another key, or none.
        """
        if key.fingerprint != self.config.key_fingerprint:
            own = self.config.key_fingerprint or "(none)"
            raise KeyMismatch(f"{self.layout.root} has key {own}, this is key {key.fingerprint}")
        self.codec = keyed_codec(key)
        self.store = BlobStore(self.index, self.store.storage, self.codec)
        self.manifest_seal = ManifestSeal(key)

    def close(self) -> None:
        """Let go of the index, open packs and the lock. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self.store.storage.close()
        self.index.close()
        if self._lock is not None:
            self._lock.release()

    @contextlib.contextmanager
    def maintenance(self) -> Iterator[None]:
        """Be the only gc, check or repair.

        :raise RepositoryBusy: when another one runs.
        """
        self.require_writable()
        with translated(f"cannot lock {self.layout.root}"):
            lock = self.fs.lock(self.layout.maintenance_lock, shared=False)
        if lock is None:
            raise RepositoryBusy(f"another gc, check or repair is working on {self.layout.root}")
        try:
            yield
        finally:
            lock.release()

    def require_writable(self) -> None:
        """:raise RepositoryReadOnly: when it was opened for reading."""
        if self.read_only:
            raise RepositoryReadOnly(f"{self.layout.root} cannot be written to")

    def __enter__(self) -> Repository:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_free(fs: FileSystem, layout: Layout) -> None:
    """:raise RepositoryExists: when there is a repository, or anything else that a new one must not be mixed with.
    :raise TargetUnsuitable: when it is a file.
    """
    if fs.exists(layout.config):
        raise RepositoryExists(f"there is already a repository in {layout.root}")
    found = {entry.name for entry in fs.list(layout.root)} if _is_folder(fs, layout.root) else set()
    if {n for n in found - _HALF_MADE if not n.startswith("config.json.")}:
        raise RepositoryExists(f"{layout.root} is not empty")
    if any(True for _ in FolderPackStorage(fs, layout.packs).list()):
        raise RepositoryExists(f"{layout.root} holds packs of a repository whose config.json is missing")


def read_config(fs: FileSystem, layout: Layout) -> RepositoryConfig:
    """The repository's configuration, checked.

    :raise MigrationNeeded: when a migration was begun and not finished, or is needed.
    """
    config = decode_config(read_config_bytes(fs, layout), layout.config)
    if fs.exists(layout.migration):
        raise MigrationNeeded(f"a migration of {layout.root} was interrupted")
    return config


def read_config_bytes(fs: FileSystem, layout: Layout) -> bytes:
    """:raise RepositoryNotFound: / :raise NotARepository: when there is no config.json."""
    if not fs.exists(layout.root):
        raise RepositoryNotFound(f"there is nothing at {layout.root}")
    try:
        return fs.read(layout.config)
    except (FileNotFoundError, NotADirectoryError):
        raise NotARepository(f"{layout.root} is not a casbackup repository") from None
    except OSError as error:
        raise RepositoryReadOnly(f"cannot read {layout.config}: {error.strerror}") from error


def lock_repository(fs: FileSystem, layout: Layout, *, shared: bool, read_only: bool = False) -> FileLock | None:
    """Take ``locks/repository``; None when a read-only folder has no such file, where nobody could change anything
    anyway.

    :raise RepositoryBusy: when somebody holds it against us.
    """
    try:
        with translated(f"cannot lock {layout.root}"):
            if not read_only:
                fs.make_folders(layout.locks)
            lock = fs.lock(layout.repository_lock, shared=shared)
    except (FileNotFoundError, RepositoryReadOnly):
        if read_only:
            return None
        raise
    if lock is None:
        doing = "a migration or a rebuild of the index is running" if shared else "it is in use"
        raise RepositoryBusy(f"cannot use {layout.root} now: {doing}")
    return lock


def _fill_new(fs: FileSystem, layout: Layout, config: RepositoryConfig) -> None:
    """The index and, last, config.json of a new repository, whose lock the caller holds."""
    if fs.exists(layout.config):
        raise RepositoryExists(f"there is already a repository in {layout.root}")
    for name in ("data.mdb", "lock.mdb"):
        fs.remove(os.path.join(layout.index, name))
    Index.create(layout.index, config.repository_id).close()
    write_durably(fs, layout.config_backup, encode_config(config), replace=True)
    write_durably(fs, layout.config, encode_config(config), replace=True)


def _refuse_network(layout: Layout) -> None:
    kind = is_network_file_system(layout.index)
    if kind is not None:
        raise NetworkFileSystem(f"{layout.index} is on a network file system ({kind})")


def _is_folder(fs: FileSystem, path: str) -> bool:
    if not fs.exists(path):
        return False
    try:
        fs.list(path)
    except NotADirectoryError:
        raise TargetUnsuitable(f"{path} is a file, not a folder") from None
    return True


def _with(config: RepositoryConfig, **changes: object) -> RepositoryConfig:
    from dataclasses import replace  # noqa: PLC0415

    try:
        return replace(config, **changes)  # type: ignore[arg-type]
    except ValueError as error:
        raise CasbackupError(str(error)) from error
