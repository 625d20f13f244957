"""Reading the disks of a running VM as they are now, through QEMU's own NBD server."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence

from casbackup.block.align import byte_addressable
from casbackup.block.device import BlockDevice
from casbackup.block.guard import Guarded
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.uri import NbdAddress
from casbackup.errors import CasbackupError, LiveUnsupported, QmpCommandFailed
from casbackup.qemu.cleanup import PREFIX
from casbackup.qemu.disks import LiveDisk
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.sink_server import private_folder

_EXPORT = f"{PREFIX}read-"


@contextlib.contextmanager
def readable(qmp: QmpClient, disks: Sequence[LiveDisk]) -> Iterator[list[BlockDevice]]:
    """The disks as devices to read from, in order.

    :raise LiveUnsupported: when QEMU's one NBD server is in use by somebody else.
    """
    folder = private_folder()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if qmp.peer.uid != os.geteuid():
            os.chown(folder, qmp.peer.uid, qmp.peer.gid)
        path = os.path.join(folder, "read.sock")
        _start(qmp, path)
        stack.callback(_quietly, qmp, "nbd-server-stop")
        for number, disk in enumerate(disks):
            name = f"{_EXPORT}{number}"
            qmp.execute("block-export-add", {"type": "nbd", "id": name, "node-name": disk.node, "name": name})
        yield [
            stack.enter_context(_connected(NbdAddress(export=f"{_EXPORT}{number}", socket_path=path)))
            for number in range(len(disks))
        ]


def _start(qmp: QmpClient, path: str) -> None:
    if any(str(export["id"]).startswith(_EXPORT) for export in qmp.execute("query-block-exports")):
        _quietly(qmp, "nbd-server-stop")  # it is of a backup that was killed
    try:
        qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
    except QmpCommandFailed as error:
        raise LiveUnsupported(f"unchanged data cannot be compared: {error.message}") from error


def _connected(address: NbdAddress) -> BlockDevice:
    return Guarded(byte_addressable(NbdClient.connect(address)))


def _quietly(qmp: QmpClient, command: str) -> None:
    with contextlib.suppress(CasbackupError):
        qmp.execute(command)
