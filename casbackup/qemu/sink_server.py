"""The NBD server that QEMU writes a backup to: an export for each disk, on a socket that two processes can serve.

The listening socket is made by the backup and inherited by its sink. While either lives, a connection to it is never
refused: should the sink die, QEMU connects anew at once (``reconnect-delay``), and finds the backup in its place.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
from collections.abc import Sequence
from typing import NamedTuple

from casbackup.block.backlog import Backlog
from casbackup.block.buffers import BufferPool
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.server import NbdServer
from casbackup.block.private_folder import private_folder
from casbackup.block.sink import SinkDevice
from casbackup.errors import CasbackupError, TargetUnsuitable
from casbackup.units import MiB

_BACKLOG = 64
_SOCKET = "sink.sock"


class SinkExport(NamedTuple):
    """A disk to take. The export is named by the disk's number."""

    number: int
    size_bytes: int

    @property
    def name(self) -> str:
        return str(self.number)


class SharedListener:
    """A unix socket in a folder of its own, which its owner and QEMU's user can enter."""

    def __init__(self, *, uid: int, gid: int) -> None:
        """``uid``, ``gid``: QEMU's.

        :raise TargetUnsuitable: when there is no place for a socket, or QEMU cannot be let in.
        """
        self._folder = private_folder(_SOCKET)
        self.path = os.path.join(self._folder, _SOCKET)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(self.socket.fileno(), 0o600)
            self.socket.bind(self.path)
            self.socket.listen(_BACKLOG)
            if uid != os.geteuid():
                for path in (self.path, self._folder):
                    os.chown(path, uid, gid)
        except OSError as error:
            self.close()
            raise TargetUnsuitable(
                f"{self.path}: no socket that QEMU (user {uid}) can use: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Whoever still holds the inherited socket keeps its connections, but gets no new ones."""
        self.socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class _Target(SinkDevice):
    """Knows whether QEMU has sent it anything."""

    heard = False

    def room(self, length: int) -> memoryview:
        self.heard = True
        return super().room(length)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self.heard = True
        super().write_zeros(offset, length, may_trim=may_trim)


class SinkServer(NbdServer):
    """Takes any number of disks, and knows of which it has heard."""

    def __init__(self, backlog: Backlog, exports: Sequence[SinkExport], *, max_guest_stall_s: float) -> None:
        devices = {
            item.number: _Target(backlog, item.name, item.size_bytes, max_guest_stall_s=max_guest_stall_s)
            for item in exports
        }
        super().__init__(
            [Export.of(item.name, devices[item.number], receiver=devices[item.number]) for item in exports],
            stall_timeout_s=math.inf,
        )
        self._devices = devices

    @property
    def heard(self) -> int:
        """Disks of which QEMU has sent something."""
        return sum(1 for device in self._devices.values() if device.heard)


class StandIn:
    """Serves in the place of a sink that is gone: acknowledges and drops, so that the guest goes on."""

    def __init__(self, exports: Sequence[SinkExport], reason: CasbackupError) -> None:
        backlog = Backlog(BufferPool(2 * MiB))
        backlog.fail(reason)
        self._server = SinkServer(backlog, exports, max_guest_stall_s=0)

    @property
    def heard(self) -> int:
        """Disks of which QEMU has sent something: it is done with connecting anew."""
        return self._server.heard

    def serve(self, listener: socket.socket) -> None:
        self._server.serve(listener)
