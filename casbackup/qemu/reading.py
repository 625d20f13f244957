"""Reading disks of a running VM through QEMU's own NBD server, of which there is one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from casbackup.block.align import byte_addressable
from casbackup.block.device import BlockDevice
from casbackup.block.guard import Guarded
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.private_folder import private_folder
from casbackup.errors import CasbackupError, LiveUnsupported, QmpCommandFailed
from casbackup.qemu.disks import LiveDisk
from casbackup.qemu.names import PREFIX
from casbackup.qemu.qmp import QmpClient

_EXPORT = f"{PREFIX}read-"
_SOCKET = "read.sock"
_FLUSH_TIMEOUT_S = 2.0
"""Of a request; a flush may take ten times that."""
_FLUSHES = 2
"""What is written during the first is flushed by the second."""


@contextlib.contextmanager
def readable(qmp: QmpClient, disks: Sequence[LiveDisk]) -> Iterator[list[BlockDevice]]:
    """The disks as they are now as devices to read from, in order.

    :raise LiveUnsupported: when QEMU's one NBD server is in use by somebody else.
    """
    with _folder_for(qmp) as folder, nbd_server(qmp, folder) as path, contextlib.ExitStack() as stack:
        addresses = [export(qmp, path, f"{_EXPORT}{number}", disk.node) for number, disk in enumerate(disks)]
        yield [stack.enter_context(opened(address)) for address in addresses]


@contextlib.contextmanager
def nbd_server(qmp: QmpClient, folder: str) -> Iterator[str]:
    """While entered QEMU's NBD server listens on a socket in a folder that QEMU can enter. Gives its path.

    :raise LiveUnsupported: when it is in use by somebody else.
    """
    path = os.path.join(folder, _SOCKET)
    try:
        qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
    except QmpCommandFailed as error:
        raise LiveUnsupported(f"QEMU's NBD server, which is needed for reading: {error.message}") from error
    try:
        yield path
    finally:
        with contextlib.suppress(CasbackupError):
            qmp.execute("nbd-server-stop")


def check_nbd_server(qmp: QmpClient) -> None:
    """:raise LiveUnsupported: as ``nbd_server`` would now."""
    with _folder_for(qmp) as folder, nbd_server(qmp, folder):
        pass


def export(
    qmp: QmpClient, path: str, name: str, node: str, *, writable: bool = False, bitmap: dict[str, str] | None = None
) -> NbdAddress:
    """Let the server on ``path`` offer a node. ``bitmap``: the node and name of a dirty bitmap to offer with it.

    Errors as ``QmpClient.execute``.
    """
    options: dict[str, Any] = {"type": "nbd", "id": name, "node-name": node, "name": name, "writable": writable}
    if bitmap is not None:
        options["bitmaps"] = [bitmap]
    qmp.execute("block-export-add", options)
    return NbdAddress(export=name, socket_path=path)


def flush(qmp: QmpClient, nodes: Sequence[str]) -> None:
    """Have the host write out what was written to these nodes, while the guest goes on writing. As far as possible."""
    if not nodes:
        return
    with contextlib.suppress(CasbackupError), _folder_for(qmp) as folder, nbd_server(qmp, folder) as path:
        for node in nodes:
            with NbdClient.connect(export(qmp, path, f"{node}-flush", node), timeout_s=_FLUSH_TIMEOUT_S) as device:
                for _ in range(_FLUSHES):
                    device.flush()


def opened(address: NbdAddress) -> BlockDevice:
    """An export as a device. Errors as ``NbdClient.connect``."""
    return Guarded(byte_addressable(NbdClient.connect(address, whole_reads=True)))


@contextlib.contextmanager
def _folder_for(qmp: QmpClient) -> Iterator[str]:
    """A folder for a while that QEMU can enter, too."""
    folder = private_folder(_SOCKET)
    try:
        if qmp.peer.uid != os.geteuid():
            os.chown(folder, qmp.peer.uid, qmp.peer.gid)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
