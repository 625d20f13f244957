"""A folder for a socket that nobody else is to reach."""

from __future__ import annotations

import contextlib
import os
import tempfile

from casbackup.block.nbd.uri import MAX_SOCKET_PATH_BYTES
from casbackup.errors import TargetUnsuitable


def private_folder(socket_name: str) -> str:
    """A new folder of mode 0700, near enough to the root for the path of a socket of that name in it.

    :raise TargetUnsuitable: when there is no place for one.
    """
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        with contextlib.suppress(OSError):
            folder = tempfile.mkdtemp(prefix="casbackup-", dir=parent)
            if len(os.fsencode(os.path.join(folder, socket_name))) <= MAX_SOCKET_PATH_BYTES:
                return folder
            os.rmdir(folder)
    raise TargetUnsuitable("there is no place for a socket: the paths are too long, or nothing can be made in /tmp")
