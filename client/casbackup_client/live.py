"""``backup --qmp``: a running VM as the source."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from casbackup.errors import UsageError

if TYPE_CHECKING:
    from casbackup.jobs.live import LiveReport
    from casbackup.qemu.control import LiveControl
    from casbackup.qemu.qmp import QmpClient
    from casbackup.qemu.source import LiveOptions
    from casbackup_client.app import App

F = TypeVar("F", bound=Callable[..., Any])


class LiveFlags(NamedTuple):
    """The options of the command line that are about running VMs, as given."""

    qmp: str | None
    only: tuple[str, ...]
    exclude: tuple[str, ...]
    mode: str | None
    freeze: str | None
    agent: str | None
    max_guest_stall: str | None
    memory: str | None
    spool: str | None
    spool_limit: str | None
    speed: str | None
    full: bool
    no_bitmap: bool
    verify_unchanged: str | None
    with_vmstate: str | None

    def check(self) -> None:
        """:raise UsageError: when one is given that means nothing without ``--qmp``, or two contradict each other."""
        if self.qmp is None and any(self[1:]):
            raise UsageError("options for a running VM were given, but not --qmp, the socket to reach it by")
        if self.with_vmstate and self.freeze == "require":
            raise UsageError(
                "--with-vmstate and --freeze require contradict each other: file systems that are frozen in the saved "
                "memory would stay so; nor is it needed, for memory and disks belong together"
            )


def live_options(function: F) -> F:
    """The options of ``LiveFlags``."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


_OPTIONS = (
    click.option("--qmp", metavar="SOCKET", help="Back up a running VM, through QEMU's QMP socket."),
    click.option(
        "--disk",
        "only",
        metavar="NAME[=NODE]",
        multiple=True,
        help="With --qmp: back up only this disk, or a block node under a name. Repeatable.",
    ),
    click.option(
        "--exclude-disk",
        "exclude",
        metavar="NAME",
        multiple=True,
        help="With --qmp: leave this disk out. Repeatable.",
    ),
    click.option(
        "--mode",
        metavar="auto|push|pull",
        type=click.Choice(["auto", "push", "pull"]),
        help="With --qmp: who moves the data; default: auto.",
    ),
    click.option(
        "--freeze",
        metavar="auto|require|never",
        type=click.Choice(["auto", "require", "never"]),
        help="With --qmp: whether the guest's agent freezes its file systems for the instant; default: auto.",
    ),
    click.option(
        "--guest-agent",
        "agent",
        metavar="SOCKET",
        help="With --qmp: the agent's socket, if it is not one that QEMU calls qga.",
    ),
    click.option(
        "--max-guest-stall",
        metavar="DURATION",
        help="With --qmp: how long a write of the guest may wait before the backup is given up; default: 2s.",
    ),
    click.option(
        "--memory",
        metavar="SIZE",
        help="With --qmp: for data that the guest need not wait for any more; default: 64MiB.",
    ),
    click.option(
        "--spool",
        metavar="FOLDER",
        type=click.Path(),
        help="With --qmp: for a temporary file with what --memory has no room for; default: none.",
    ),
    click.option(
        "--spool-limit",
        metavar="SIZE",
        help="With --spool: so large the file may become; default: 1GiB.",
    ),
    click.option("--speed", metavar="SIZE", help="With --qmp: copy at most so much a second in the background."),
    click.option("--full", is_flag=True, help="With --qmp: read everything, whatever dirty bitmaps say."),
    click.option("--no-bitmap", is_flag=True, help="With --qmp: leave no dirty bitmap for the next backup."),
    click.option(
        "--verify-unchanged",
        metavar="PERCENT",
        help="With --qmp: compare so much of what a dirty bitmap calls unchanged with what is stored.",
    ),
    click.option(
        "--with-vmstate",
        metavar="background|paused|auto",
        is_flag=False,
        flag_value="background",
        type=click.Choice(["background", "paused", "auto"]),
        help="With --qmp: back up the VM's memory, too, so that it can go on from there; without a value in the "
        "background. paused: the guest stands still meanwhile; auto: only if it does not go in the background.",
    ),
)


def live_backup(app: App, flags: LiveFlags, **request: Any) -> LiveReport:
    """Back up the VM behind ``flags.qmp``. ``request``: for ``LiveRequest``. Warnings go to stderr."""
    from casbackup.jobs import live as job
    from casbackup.qemu.control import LiveControl
    from casbackup.qemu.disks import Selection
    from casbackup.qemu.machine import Machine
    from casbackup.qemu.qmp import QmpClient
    from casbackup.qemu.source import Mode
    from casbackup.units import parse_percentage, parse_size
    from casbackup_client.control import ControlServer
    from casbackup_client.signals import leave_soon

    assert flags.qmp is not None
    share = parse_percentage(flags.verify_unchanged) / 100 if flags.verify_unchanged else 0.0
    wanted = job.LiveRequest(**request, full=flags.full, track=not flags.no_bitmap, verify_share=share)
    control = LiveControl(speed_limit_bytes_s=parse_size(flags.speed) if flags.speed else 0, give_up=leave_soon)
    with app.peer() as peer, QmpClient.connect(flags.qmp) as qmp:
        machine = Machine(qmp, Selection(flags.only, flags.exclude), _options(flags, qmp), Mode(flags.mode or "auto"))
        for warning in machine.warnings():
            app.output.complain(warning)
        if flags.with_vmstate and (flags.only or flags.exclude):
            app.output.complain(
                "the VM's memory is that of all its disks: one that is left out must be as it is now when the VM is to "
                "go on from the snapshot"
            )
        with ControlServer(control, wanted.namespace, wanted.vm), _signals(control), app.progress() as progress:
            report = job.live_backup(
                peer, machine, wanted, control=control, report=app.output.complain, progress=progress
            )
    _tell(app, report)
    return report


def _tell(app: App, report: LiveReport) -> None:
    """Plainly, why a disk was read as a whole, unless nothing else was to be expected, and why QEMU moved the data."""
    for disk in report.disks:
        if disk.lost:
            app.output.complain(f"{disk.name} was read as a whole: {disk.reason}")
    state = report.instant.state
    if state is not None:
        reason = f", because {state.note}" if state.note else ""
        app.output.complain(f"the guest stood still for {state.pause_s:.3f} s ({state.way}{reason})")
    if report.instant.mode_note:
        app.output.complain(f"QEMU pushed the data: {report.instant.mode_note}")
    if report.instant.note and not report.instant.frozen and app.verbose:
        app.output.complain(f"the guest was not frozen: {report.instant.note}")


def _options(flags: LiveFlags, qmp: QmpClient) -> LiveOptions:
    from casbackup.limits import SINK_MEMORY_BYTES
    from casbackup.qemu.machine import find_agent
    from casbackup.qemu.source import FreezePolicy, LiveOptions
    from casbackup.qemu.vmstate import StateWay
    from casbackup.units import MiB, parse_duration, parse_size

    memory_bytes = parse_size(flags.memory) if flags.memory else SINK_MEMORY_BYTES
    stall_s = parse_duration(flags.max_guest_stall) if flags.max_guest_stall else 2.0
    if memory_bytes < 4 * MiB:
        raise UsageError("--memory must be at least 4MiB")
    if not 0 < stall_s <= 60:
        raise UsageError("--max-guest-stall must be above 0 and at most 60 seconds")
    return LiveOptions(
        freeze=FreezePolicy.NEVER if flags.with_vmstate else FreezePolicy(flags.freeze or "auto"),
        vmstate=StateWay(flags.with_vmstate) if flags.with_vmstate else None,
        agent_path=flags.agent or find_agent(qmp),
        max_guest_stall_s=stall_s,
        memory_bytes=memory_bytes,
        spool_bytes=_spool_bytes(flags),
        spool_folder=flags.spool,
    )


def _spool_bytes(flags: LiveFlags) -> int:
    from casbackup.limits import SINK_SPOOL_BYTES
    from casbackup.units import MiB, parse_size

    if flags.spool is None:
        if flags.spool_limit is not None:
            raise UsageError("--spool-limit was given, but not --spool, the folder for the file")
        return 0
    spool_bytes = parse_size(flags.spool_limit) if flags.spool_limit else SINK_SPOOL_BYTES
    if spool_bytes < 1 * MiB:
        raise UsageError("--spool-limit must be at least 1MiB")
    return spool_bytes


@contextlib.contextmanager
def _signals(control: LiveControl) -> Iterator[None]:
    """SIGUSR1 pauses, SIGUSR2 resumes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pause(_number: int, _frame: FrameType | None) -> None:
        control.pause()

    def resume(_number: int, _frame: FrameType | None) -> None:
        control.resume()

    before = signal.signal(signal.SIGUSR1, pause), signal.signal(signal.SIGUSR2, resume)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGUSR2, before[1])
