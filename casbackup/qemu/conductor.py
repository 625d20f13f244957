"""What live backups have in common, whoever moves the data: the sink, the instant, watching, and cleaning up.

Two threads. The *conductor* talks to QEMU: it begins with all disks at one instant, watches, sets the pace, and cleans
up, whatever happens. The caller's thread takes the data of the sink; it may be interrupted at any time.
"""

from __future__ import annotations

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from casbackup.block.spool import Consumer
from casbackup.errors import BackupBroken, CasbackupError, Interrupted, LiveBackupBusy, QmpCommandFailed
from casbackup.qemu import cleanup
from casbackup.qemu.bitmaps import Tracking, add_action
from casbackup.qemu.control import LiveControl
from casbackup.qemu.features import Features
from casbackup.qemu.freezing import frozen_guest
from casbackup.qemu.names import PREFIX
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.sink_host import SinkHost, SinkSpace
from casbackup.qemu.sink_process import SinkSettings
from casbackup.qemu.sink_server import SinkExport
from casbackup.qemu.source import DiskTask, Instant, LiveOptions, Mode, Report
from casbackup.qemu.vmstate import state_saver

TRANSACTION_TIMEOUT_S = 60.0
"""It drains the guest's requests: a storage that hangs must not be given up at once."""
_LOOK_S = 0.1
_PATIENCE_S = 60.0
"""For the conductor to clean up; it has timeouts of its own, this is a last one."""


class ConductedSource(ABC):
    """Implements ``LiveSource`` but for how the data moves.

    The caller removes the bitmaps of ``tracking``, unless ``run`` failed.
    """

    mode: Mode

    def __init__(
        self,
        qmp: QmpClient,
        features: Features,
        options: LiveOptions,
        control: LiveControl,
        report: Report,
        tracking: Tracking | None = None,
    ) -> None:
        self._qmp = qmp
        self._features = features
        self._options = options
        self._control = control
        self._report = report
        self._tracking = tracking
        self._name = f"{PREFIX}{secrets.token_hex(4)}"
        self._tasks: Sequence[DiskTask] = ()
        self._abort: str | None = None
        self._failure: BaseException | None = None
        self._instant = Instant(False)

    @property
    def token(self) -> str:
        return "" if self._tracking is None else self._tracking.token

    def run(self, tasks: Sequence[DiskTask], consumer: Consumer) -> Instant:
        """See ``LiveSource``.

        :raise LiveBackupBusy: when a backup of ours is running in this QEMU.
        """
        if not cleanup.remove_leftovers(self._qmp):
            raise LiveBackupBusy("QEMU is running a backup already")
        self._tasks = tasks
        options, peer = self._options, self._qmp.peer
        space = SinkSpace(options.memory_bytes, options.spool_bytes, options.spool_folder)
        saves_state = options.vmstate is not None
        with SinkHost(self._settings(), space, uid=peer.uid, gid=peer.gid, saves_state=saves_state) as self._sink:
            self._saver = state_saver(
                self._qmp,
                self._sink,
                options.vmstate,
                can_activate=self._features.set_active,
                max_pause_s=options.max_guest_stall_s,
            )
            return self._run(self._receiver(consumer))

    def _settings(self) -> SinkSettings:
        return SinkSettings(
            exports=[SinkExport(number, task.disk.size_bytes) for number, task in enumerate(self._tasks)],
            max_guest_stall_s=self._options.max_guest_stall_s,
            qmp_path=self._qmp.path,
            backup_name=self._name,
            bitmap_token=self.token or None,
        )

    def _run(self, receiver: Consumer) -> Instant:
        thread = threading.Thread(target=self._guarded, name="conductor", daemon=True)
        thread.start()
        complete = False
        try:
            complete = self._sink.receive_into(receiver)
        except CasbackupError as error:
            if isinstance(self._failure, BackupBroken):  # for the guest's sake, before the target said why
                raise BackupBroken(f"{self._failure.message} ({error.message})") from error
            raise
        finally:
            if not complete:
                self._abort = "the backup failed" if self._sink.failure is None else str(self._sink.failure)
            thread.join(_PATIENCE_S)
        if self._failure is not None:
            raise self._failure
        if not complete or thread.is_alive():
            raise self._sink.failure or BackupBroken("not all data has come")
        return self._instant

    def _guarded(self) -> None:
        """The conductor's thread."""
        try:
            self._conduct()
        except BaseException as error:  # noqa: BLE001  handed to the other thread
            self._failure = error
            self._sink.drop(str(error))  # first: from now on the guest does not wait for anything
            self._control.give_up()
            self._clean_up()

    def _conduct(self) -> None:
        self._prepare()
        self._saver.prepare()
        with frozen_guest(
            self._options.freeze, self._options.agent_path, self._sink.frozen, self._report
        ) as self._instant:
            self._saver.save(self._begin, self._check)
        self._instant = self._instant._replace(mode=self.mode, state=self._saver.saved)
        self._control.update(phase="copying")
        self._begun()
        while not (self._look() and self._saver.is_done):
            self._qmp.wait_event(_LOOK_S)
        self._control.update(phase="storing")
        self._end()
        self._saver.finish()
        self._sink.finish()

    def _begin(self) -> None:
        """Begin to record, then the point in time. Two steps: QEMU adds no bitmap in a grouped transaction."""
        self._check()
        if self._tracking is not None:
            actions = [add_action(task.disk, self._tracking.name) for task in self._tasks]
            self._qmp.execute("transaction", {"actions": actions}, timeout_s=TRANSACTION_TIMEOUT_S)
        self._take_instant()

    def _look(self) -> bool:
        """Look after everything once; True when all data has been read.

        :raise LiveBackupError: when the backup is not going to succeed.
        """
        self._check()
        done = self._advance()
        self._saver.look()
        return done

    def _check(self) -> None:
        """:raise LiveBackupError: when there is a reason to end."""
        if self._control.cancelled is not None:
            raise Interrupted(self._control.cancelled)
        if self._sink.failure is not None:
            raise self._sink.failure
        if self._abort is not None:
            raise BackupBroken(self._abort)

    def _clean_up(self) -> None:
        try:
            self._let_go()
            cleanup.remove_backup(self._qmp, self._name, bitmap_token=self.token or None)
        except CasbackupError as error:
            if not self._qmp.is_lost:
                self._report(f"QEMU may still have a job or node named {self._name}: {error.message}")
        self._abandon_state()  # last: QEMU may have to save all of the memory to its end

    def _abandon_state(self) -> None:
        try:
            self._saver.abandon()
        except CasbackupError as error:
            if not self._qmp.is_lost:
                self._report(f"the guest may still be paused, or its memory be saved: {error.message}")

    # --- what the modes need

    def _id(self, number: int) -> str:
        """Of a disk's target and job in QEMU."""
        return f"{self._name}-{number}"

    def _add_target(self, number: int, **options: Any) -> None:
        """Let QEMU connect to the sink."""
        self._check()
        self._qmp.execute(
            "blockdev-add",
            {
                "driver": "nbd",
                "node-name": self._id(number),
                "export": str(number),
                "server": {"type": "unix", "path": self._sink.path},
                **options,
            },
        )

    def _try(self, command: str, arguments: dict[str, Any]) -> None:
        try:
            self._qmp.execute(command, arguments)
        except QmpCommandFailed:
            return

    # --- what they differ in

    @abstractmethod
    def _receiver(self, consumer: Consumer) -> Consumer:
        """What gets the data of the sink, and passes it on to ``consumer``."""

    @abstractmethod
    def _prepare(self) -> None:
        """Whatever can be done before the point in time."""

    @abstractmethod
    def _take_instant(self) -> None:
        """The point in time of all disks."""

    @abstractmethod
    def _begun(self) -> None:
        """The point in time is past, and the guest is thawed: begin to copy, if that has not begun by itself."""

    @abstractmethod
    def _advance(self) -> bool:
        """Look after what runs, steer it, tell the progress; True when all data has been read. Errors as ``_look``."""

    @abstractmethod
    def _end(self) -> None:
        """All data has been read: leave QEMU as it was. What it wrote to the sink has arrived then."""

    @abstractmethod
    def _let_go(self) -> None:
        """The backup is lost: what must happen before jobs and nodes are removed."""
