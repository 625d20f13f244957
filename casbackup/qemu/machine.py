"""A running VM: its disks, what is known about how it was set up, and how to take a backup of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from casbackup.errors import LiveBackupBusy, LiveUnsupported, QmpCommandFailed
from casbackup.qemu import cleanup, features
from casbackup.qemu.bitmaps import Tracking
from casbackup.qemu.control import LiveControl
from casbackup.qemu.disks import LiveDisk, Selection, find_disks
from casbackup.qemu.modes import AutoSource, why_not_pull
from casbackup.qemu.pull import PullSource
from casbackup.qemu.push import PushSource
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.source import LiveOptions, LiveSource, Mode, Report

COMMAND_LINE = "qemu-command-line"
MACHINE = "qemu-machine"
DEVICES = "qemu-devices.json"
_SAFE_VERSION = 10, 1, 0
"""From here on QEMU itself sees to it that a failed target breaks the backup, not the guest."""


class Machine:
    """The VM behind an open monitor. ``configs``: what QEMU tells of how the VM was set up."""

    def __init__(self, qmp: QmpClient, selection: Selection, options: LiveOptions, mode: Mode) -> None:
        """Asks QEMU. Errors as ``find_disks``.

        :raise LiveUnsupported: when this QEMU cannot do ``mode``.
        :raise LiveBackupBusy: when a backup of ours is running in it.
        """
        if not cleanup.remove_leftovers(qmp):  # which may stand in front of the disks
            raise LiveBackupBusy("QEMU is running a backup already")
        self.qmp = qmp
        self.version = ".".join(map(str, qmp.version))
        self.features = features.detect(qmp)
        self.disks: Sequence[LiveDisk] = find_disks(qmp, selection)
        self._mode = mode
        self._not_pull = "not asked for"
        if mode is not Mode.PUSH:
            self._not_pull = why_not_pull(qmp, self.features, self.disks, options)
        if mode is Mode.PULL and self._not_pull:
            raise LiveUnsupported(f"pull mode is not possible: {self._not_pull}")
        self.configs = dict(_configs(qmp))
        self._options = options

    def source(self, control: LiveControl, report: Report, tracking: Tracking | None) -> LiveSource:
        """For one backup."""
        push = PushSource(self.qmp, self.features, self._options, control, report, tracking)
        pull = PullSource(self.qmp, self.features, self._options, control, report, tracking)
        if self._mode is Mode.AUTO:
            return AutoSource(push, pull, self._not_pull)
        return pull if self._mode is Mode.PULL else push

    def warnings(self) -> Iterator[str]:
        """What is not as safe for the guest as it could be."""
        if self.qmp.version >= _SAFE_VERSION or self.features.on_cbw_error or not self._not_pull:
            return
        exposed = [disk.name for disk in self.disks if disk.device and self._werror(disk) != "stop"]
        if exposed:
            yield (
                f"{', '.join(exposed)}: werror is not `stop`; should casbackup and its sink both be killed, the guest "
                f"would see I/O errors until QEMU has ended the backup"
            )

    def _werror(self, disk: LiveDisk) -> str:
        """What QEMU does when a write fails. A device says ``auto`` where the drive's own option counts."""
        try:
            policy = self.qmp.execute("qom-get", {"path": disk.device, "property": "werror"})
        except QmpCommandFailed:
            return ""
        if policy == "auto":
            return _drive_option(self.configs.get(COMMAND_LINE, b""), disk.drive, "werror")
        return str(policy)


def find_agent(qmp: QmpClient) -> str | None:
    """The socket of the guest's agent, where a character device of QEMU is named like one."""
    try:
        devices = qmp.execute("query-chardev")
    except QmpCommandFailed:
        return None
    for device in devices:
        kind, _, rest = device["filename"].removeprefix("disconnected:").partition(":")
        if "qga" in device["label"] and kind == "unix":
            return str(rest.partition(",")[0])
    return None


def _drive_option(command_line: bytes, drive: str, option: str) -> str:
    """An option of the drive with an id on QEMU's command line; empty when it does not say."""
    arguments = command_line.decode(errors="replace").splitlines()
    for before, argument in itertools.pairwise(arguments):
        if before == "-drive":
            options = dict(item.partition("=")[::2] for item in argument.split(","))
            if drive and options.get("id") == drive:
                return options.get(option, "")
    return ""


def _configs(qmp: QmpClient) -> Iterator[tuple[str, bytes]]:
    command = _command_line(qmp.peer.pid)
    if command:
        yield COMMAND_LINE, command
    machine = _machine_type(qmp)
    if machine:
        yield MACHINE, f"{machine}\n".encode()
    devices = list(_devices(qmp))
    if devices:
        yield DEVICES, json.dumps(devices, indent=1).encode() + b"\n"


def _command_line(pid: int) -> bytes:
    """One argument a line. Empty when the process is not ours to see, or whoever opened the socket is not QEMU."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read().rstrip(b"\0").split(b"\0")
        program = os.path.basename(arguments[0])
        if program.startswith(b"qemu") or program == b"kvm":
            return b"\n".join(arguments) + b"\n"
    return b""


def _machine_type(qmp: QmpClient) -> str:
    """With its version, also where the command line has a name without. Empty if there is no machine."""
    try:
        return str(qmp.execute("qom-get", {"path": "/machine", "property": "type"})).removesuffix("-machine")
    except QmpCommandFailed:
        return ""


def _devices(qmp: QmpClient) -> Iterator[dict[str, Any]]:
    """The devices that were given names: each with its type."""
    with contextlib.suppress(QmpCommandFailed):
        for item in qmp.execute("qom-list", {"path": "/machine/peripheral"}):
            kind = str(item["type"])
            if kind.startswith("child<"):
                yield {"id": item["name"], "type": kind[len("child<") : -1]}
