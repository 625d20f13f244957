"""The few files of a repository that every format has, and what a migration does with them."""

from __future__ import annotations

import json
import os
from typing import Any

from casbackup.errors import NotARepository, RepositoryBusy, RepositoryNotFound, RepositoryReadOnly
from casbackup.fs import FileLock, FileSystem, translated, write_durably
from casbackup.spec.config import format_of
from casbackup_migrations.state import MigrationState, decode_state, encode_state
from casbackup_migrations.steps.step import Step

_CONFIG = "config.json"
_CONFIG_BACKUP = "config.json.backup"
_STATE = "migration.json"
_LOCK = ("locks", "repository")


class RepositoryFolder:
    """A repository as far as a migration knows it. Every write is durable on return."""

    def __init__(self, path: str, fs: FileSystem) -> None:
        self.root = os.path.abspath(path)
        self._fs = fs
        self._config = os.path.join(self.root, _CONFIG)
        self._config_backup = os.path.join(self.root, _CONFIG_BACKUP)
        self._state = os.path.join(self.root, _STATE)

    def lock(self) -> FileLock:
        """Be the only one who uses the repository, until the lock is released.

        :raise RepositoryBusy: when somebody uses it.
        :raise RepositoryReadOnly: when it cannot be written to.
        """
        path = os.path.join(self.root, *_LOCK)
        with translated(f"cannot lock {self.root}"):
            self._fs.make_folders(os.path.dirname(path))
            lock = self._fs.lock(path, shared=False)
        if lock is None:
            raise RepositoryBusy(f"cannot migrate {self.root} now: it is in use")
        return lock

    def format(self) -> int:
        """The number in config.json.

        :raise RepositoryNotFound: / :raise NotARepository: / :raise ConfigDamaged: when there is none.
        """
        return format_of(self._read_config(), self._config)

    def state(self) -> MigrationState | None:
        """The state of an unfinished migration.

        :raise ConfigDamaged: / :raise UnsupportedFormat: when it is not understood.
        """
        try:
            with translated(f"cannot read {self._state}"):
                data = self._fs.read(self._state)
        except FileNotFoundError:
            return None
        return decode_state(data, self._state)

    def write_state(self, state: MigrationState) -> None:
        self._write(self._state, encode_state(state))

    def remove_state(self) -> None:
        with translated(f"cannot remove {self._state}"):
            self._fs.remove(self._state)
            self._fs.sync_folder(self.root)

    def commit(self, step: Step) -> None:
        """Give config.json the content and the number of the step's new format."""
        content: dict[str, Any] = json.loads(self._read_config())
        identity = content["casbackup"], content["repository_id"]
        changed = {**step.new_config(content), "format": step.to_format}
        if (changed["casbackup"], changed["repository_id"]) != identity:
            raise ValueError(f"the step {step.title!r} makes another repository of {self.root}")
        self._write(self._config, json.dumps(changed, indent=2).encode() + b"\n")

    def copy_config(self) -> None:
        """Make config.json.backup the same as config.json."""
        self._write(self._config_backup, self._read_config())

    def remove_leftovers(self) -> None:
        """What a crash left of files that were about to replace one of these."""
        with translated(f"cannot write to {self.root}"):
            for entry in self._fs.list(self.root):
                if entry.name.endswith(".tmp") and entry.name.startswith((_CONFIG + ".", _STATE + ".")):
                    self._fs.remove(os.path.join(self.root, entry.name))

    def _read_config(self) -> bytes:
        if not self._fs.exists(self.root):
            raise RepositoryNotFound(f"there is nothing at {self.root}")
        try:
            return self._fs.read(self._config)
        except (FileNotFoundError, NotADirectoryError):
            raise NotARepository(f"{self.root} is not a casbackup repository") from None
        except OSError as error:
            raise RepositoryReadOnly(f"cannot read {self._config}: {error.strerror}") from error

    def _write(self, path: str, data: bytes) -> None:
        with translated(f"cannot write {path}"):
            write_durably(self._fs, path, data, replace=True)
