"""A file that is written under a temporary name and appears under its own only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from casbackup.errors import TargetExists, TargetUnsuitable, TargetUnwritable
from casbackup.fs import RealFileSystem

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""How file systems without hard links (FAT, some network ones) answer to a link."""


class PendingFile:
    """``.NAME.xxxxxxxx.partial`` next to where NAME will be.

    Who dies before ``publish`` leaves that file behind, and NAME as it was; it may be deleted at any time.
    The file is readable by its owner only, since a disk holds all that its VM knows; a file that is replaced
    passes its owner and mode on.
    """

    def __init__(self, path: str, *, replace: bool) -> None:
        """Create it, empty. A symbolic link at ``path`` is followed.

        :raise TargetExists: when ``path`` exists and is not to be replaced.
        :raise TargetUnsuitable: when it is no regular file, or its folder does not exist.
        :raise TargetUnwritable: when nothing can be created there.
        """
        self._path = os.path.realpath(path)
        self._replace = replace
        self._replaced = existing_file(path)
        if self._replaced is not None and stat.S_ISBLK(self._replaced.st_mode):
            raise TargetUnsuitable(f"{path} is a block device; a file cannot take its place")
        if self._replaced is not None and not replace:
            raise TargetExists(f"{path} exists")
        folder, name = os.path.split(self._path)
        self.temporary = os.path.join(folder, f".{name[:60]}.{os.urandom(4).hex()}.partial")
        with translated(path):
            os.close(os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def publish(self, *, sync: bool) -> None:
        """Give the file its name: the commit point. Its content must have been flushed by then.

        :raise TargetExists: when a file of that name has appeared meanwhile and is not to be replaced.
        :raise TargetUnwritable: when it cannot be renamed.
        """
        if self._replaced is not None:
            _pass_on(self._replaced, self.temporary)
        with translated(self._path):
            if self._replace:
                os.rename(self.temporary, self._path)
            else:
                self._rename_new()
            if sync:
                RealFileSystem().sync_folder(os.path.dirname(self._path))

    def discard(self) -> None:
        """Remove it. Harmless when it is gone."""
        with contextlib.suppress(OSError):
            os.unlink(self.temporary)

    def _rename_new(self) -> None:
        try:
            RealFileSystem().rename_new(self.temporary, self._path)
        except FileExistsError as error:
            raise TargetExists(f"{self._path} has appeared meanwhile") from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(self._path):
                raise TargetExists(f"{self._path} has appeared meanwhile") from error
            os.rename(self.temporary, self._path)


def existing_file(path: str) -> os.stat_result | None:
    """The status of the file or block device at ``path``, links followed; None when there is nothing.

    :raise TargetUnsuitable: for a folder, a pipe, a terminal, …
    :raise TargetUnwritable: when it cannot be looked at.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TargetUnwritable(f"{path}: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        raise TargetUnsuitable(f"{path} is a folder")
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise TargetUnsuitable(f"{path} is neither a file nor a block device")
    return status


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn what the system says about a target into errors of ours.

    :raise TargetUnsuitable: when its folder does not exist.
    :raise TargetUnwritable: for everything else.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TargetUnsuitable(f"{path}: the folder to put it in does not exist") from error
    except OSError as error:
        raise TargetUnwritable(f"{path}: {error.strerror}") from error


def _pass_on(replaced: os.stat_result, path: str) -> None:
    """Give the new file the owner and mode of the one it will replace, as far as we may."""
    with contextlib.suppress(OSError):
        os.chown(path, replaced.st_uid, replaced.st_gid)
    with contextlib.suppress(OSError):
        os.chmod(path, stat.S_IMODE(replaced.st_mode))
