"""The port of live sources: all disks of a running VM at one instant, in whatever order their data comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from casbackup.block.spool import Consumer
from casbackup.limits import SINK_MEMORY_BYTES
from casbackup.qemu.disks import LiveDisk
from casbackup.qemu.vmstate import SavedState, StateWay


class FreezePolicy(StrEnum):
    """Whether the guest's file systems are frozen while the point in time is taken."""

    AUTO = "auto"
    """Frozen if the agent does it in time."""
    REQUIRE = "require"
    """Otherwise there is no backup."""
    NEVER = "never"


class Mode(StrEnum):
    """Who moves the data: QEMU pushes all of it, or we pull what the guest does not overwrite."""

    AUTO = "auto"
    PUSH = "push"
    PULL = "pull"


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """How to treat the guest. ``agent_path``: the socket of its agent, if it has one.

    Data that the guest need not wait for any more is in ``memory_bytes`` of memory, and when there is no room left in a
    file of up to ``spool_bytes`` in ``spool_folder``, or where temporary files go.
    """

    freeze: FreezePolicy = FreezePolicy.AUTO
    agent_path: str | None = None
    max_guest_stall_s: float = 2.0
    memory_bytes: int = SINK_MEMORY_BYTES
    spool_bytes: int = 0
    spool_folder: str | None = None
    vmstate: StateWay | None = None
    """How to save the VM's memory, too."""


class DiskTask(NamedTuple):
    """A disk to back up. ``bitmap``: only what it has as dirty is wanted; None: everything."""

    disk: LiveDisk
    bitmap: str | None


class Instant(NamedTuple):
    """What is known about the point in time. ``frozen``: file systems of the guest; ``note``: why not.

    ``state``: the VM's memory was saved, too. ``mode``: who moved the data; ``mode_note``: why QEMU, if that was left
    open.
    """

    frozen: bool
    note: str = ""
    state: SavedState | None = None
    mode: Mode = Mode.PUSH
    mode_note: str = ""


Report = Callable[[str], None]
"""Told what a user should know."""


class LiveSource(Protocol):
    """One live backup of some disks. Used by one thread; ``run`` once."""

    @property
    def token(self) -> str:
        """In the names of the dirty bitmaps that ``run`` leaves in QEMU when it succeeds; empty: it leaves none."""

    def run(self, tasks: Sequence[DiskTask], consumer: Consumer) -> Instant:
        """Hand every wanted range of every disk to ``consumer``, each once, and return when QEMU is done with it.

        ``consumer`` is called by one thread at a time, with the place of the disk in ``tasks`` as its name. The VM's
        memory, if it is wanted, comes as the data of one disk more. However this ends, neither jobs nor nodes
        of ours are left in QEMU, and the guest has noticed nothing.

        :raise LiveBackupError: when it did not succeed; what the consumer has must be thrown away then. Its own errors
            come out, too.
        """
