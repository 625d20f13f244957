"""The folder where a user's key files are: ``<fingerprint>.json`` each, readable by their owner only."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from casbackup.errors import KeyExists, KeyExposed, KeyFileDamaged, KeyMissing, UsageError
from casbackup.fs import RealFile, RealFileSystem, translated, write_durably
from casbackup.limits import MAX_KEY_FILE_BYTES
from casbackup.spec.keyfile import KeyFile, decode_key_file, encode_key_file, is_fingerprint

_SUFFIX = ".json"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class PrivateFiles(RealFileSystem):
    """The file system; what it makes is its owner's only."""

    def create(self, path: str) -> RealFile:
        return RealFile(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))

    def make_folders(self, path: str) -> None:
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        self.make_folders(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        self.sync_folder(parent)


class KeyRing:
    """Key files are added, and replaced by the same key wrapped otherwise. None is ever lost by that: a file is there
    as a whole, as it was or as it is to be, whatever happens."""

    def __init__(self, folder: str) -> None:
        """The folder is made when the first key is added."""
        self.folder = os.path.abspath(folder)
        self._fs = PrivateFiles()

    def path(self, fingerprint: str) -> str:
        return os.path.join(self.folder, fingerprint + _SUFFIX)

    def fingerprints(self) -> list[str]:
        """Of all files that are called like keys, sorted."""
        with translated(f"cannot look into {self.folder}"):
            names = [entry.name for entry in self._fs.list(self.folder) if not entry.is_folder]
        stems = [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]
        return sorted(stem for stem in stems if is_fingerprint(stem))

    def find(self, prefix: str) -> str:
        """The fingerprint that begins so.

        :raise KeyMissing: when there is none. :raise UsageError: when there are several.
        """
        prefix = prefix.lower().replace(" ", "")
        matching = [fingerprint for fingerprint in self.fingerprints() if fingerprint.startswith(prefix)]
        if not matching:
            raise KeyMissing(f"there is no key {prefix} in {self.folder}")
        if len(matching) > 1:
            raise UsageError(f"{len(matching)} keys in {self.folder} begin with {prefix!r}: {', '.join(matching)}")
        return matching[0]

    def only(self) -> str:
        """The fingerprint of the only key.

        :raise KeyMissing: when there is none. :raise UsageError: when there are several.
        """
        found = self.fingerprints()
        if not found:
            raise KeyMissing(f"there is no key in {self.folder}")
        if len(found) > 1:
            raise UsageError(f"there are {len(found)} keys in {self.folder}: say which one is meant")
        return found[0]

    def read(self, fingerprint: str) -> KeyFile:
        """:raise KeyMissing: when it is not there. :raise KeyExposed: when others could read or change it.
        :raise KeyFileDamaged: when it is not understood, or is another key's.
        """
        path = self.path(fingerprint)
        try:
            with translated(f"cannot read {path}"):
                data = self._private_bytes(path)
        except FileNotFoundError:
            raise KeyMissing(f"key {fingerprint} is not in {self.folder}") from None
        key_file = decode_key_file(data, path)
        if key_file.fingerprint != fingerprint:
            raise KeyFileDamaged(f"{path} is called after another key than it has, {key_file.fingerprint}")
        return key_file

    def add(self, key_file: KeyFile) -> str:
        """Keep a new key; returns the file's path. It is durable then.

        :raise KeyExists: when there is such a file, whatever is in it.
        """
        path = self.path(key_file.fingerprint)
        try:
            self._write(path, key_file, replace=False)
        except FileExistsError:
            raise KeyExists(f"there is a key file {path} already") from None
        return path

    def replace(self, key_file: KeyFile) -> str:
        """Put a file in the place of that of the same key.

        :raise KeyMissing, KeyExposed, KeyFileDamaged: when the one that is there is not that.
        """
        self.read(key_file.fingerprint)
        path = self.path(key_file.fingerprint)
        self._write(path, key_file, replace=True)
        return path

    def _write(self, path: str, key_file: KeyFile, *, replace: bool) -> None:
        with translated(f"cannot write {path}"):
            self._fs.make_folders(self.folder)
            self._refuse_exposed(self.folder, os.stat(self.folder).st_mode & _OTHERS_WRITE)
            write_durably(self._fs, path, encode_key_file(key_file), replace=replace)

    def _private_bytes(self, path: str) -> bytes:
        with self._opened(path) as descriptor:
            self._refuse_exposed(path, os.fstat(descriptor).st_mode & _OTHERS)
            self._refuse_exposed(self.folder, os.stat(self.folder).st_mode & _OTHERS_WRITE)
            return os.read(descriptor, MAX_KEY_FILE_BYTES + 1)

    @staticmethod
    @contextlib.contextmanager
    def _opened(path: str) -> Iterator[int]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @staticmethod
    def _refuse_exposed(path: str, rights: int) -> None:
        if rights:
            raise KeyExposed(f"others may read or change {path}: its mode gives them {rights:03o}")
