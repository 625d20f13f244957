"""Who moves the data of a live backup, where that is left to us: we do (pull) wherever it is possible."""

from __future__ import annotations

from collections.abc import Sequence

from casbackup.block.spool import Consumer
from casbackup.errors import LiveUnsupported
from casbackup.qemu import graph, reading
from casbackup.qemu.disks import LiveDisk
from casbackup.qemu.features import Features
from casbackup.qemu.pull import PullSource
from casbackup.qemu.push import PushSource
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import DiskTask, Instant, LiveOptions
from casbackup.qemu.vmstate import StateWay

_SOUND_VERSION = 8, 0, 0
"""Before, reading several clusters of ``snapshot-access`` could give the guest's new data."""


def why_not_pull(qmp: QmpClient, features: Features, disks: Sequence[LiveDisk], options: LiveOptions) -> str:
    """Why pull mode is not possible, or not safe; empty when it is. Errors as ``QmpClient.execute``."""
    if qmp.version < _SOUND_VERSION:
        return f"QEMU {'.'.join(map(str, qmp.version))} may read new data in place of old, which 8.0 does not"
    if not features.pull:
        return "this QEMU lacks something that it takes"
    if options.vmstate not in (None, StateWay.BACKGROUND):
        return "the VM's memory may have to be saved while it is paused, which does not go with filters"
    fixed = [disk.name for disk in disks if not graph.can_point(qmp, disk)]
    if fixed:
        return f"{', '.join(fixed)}: no device that could be given a filter"
    try:
        reading.check_nbd_server(qmp)
    except LiveUnsupported as error:
        return error.message
    return ""


class AutoSource:
    """Implements ``LiveSource``: pull, or push where QEMU turns out to refuse that before anything has begun."""

    def __init__(self, push: PushSource, pull: PullSource, not_pull: str) -> None:
        """``not_pull``: why pull is not possible, if that is known already."""
        self._push = push
        self._pull = pull
        self._not_pull = not_pull

    @property
    def token(self) -> str:
        return self._push.token

    def run(self, tasks: Sequence[DiskTask], consumer: Consumer) -> Instant:
        """See ``LiveSource``."""
        reason = self._not_pull
        if not reason:
            try:
                return self._pull.run(tasks, consumer)
            except LiveUnsupported as error:
                reason = error.message
        return self._push.run(tasks, consumer)._replace(mode_note=reason)
