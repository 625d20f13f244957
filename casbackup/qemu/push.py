"""Live backup by QEMU's own backup jobs, which push everything to our sink: QEMU 4.2 and later.

A job copies in the background, and what the guest is about to overwrite before that, each cluster once. So a disk is
read once and its data written once more by the guest: no temporary storage.

Two threads. The *conductor* talks to QEMU: it starts the jobs of all disks in one transaction, watches them, sets
their pace, and cleans up, whatever happens. The caller's thread takes the data; it may be interrupted at any time.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

from casbackup.block.spool import Consumer
from casbackup.errors import (
    BackupBroken,
    BackupJobFailed,
    CasbackupError,
    Interrupted,
    LiveBackupBusy,
    QmpCommandFailed,
)
from casbackup.qemu import cleanup
from casbackup.qemu.bitmaps import add_action, bitmap_name
from casbackup.qemu.control import LiveControl
from casbackup.qemu.features import Features
from casbackup.qemu.freezing import frozen_guest
from casbackup.qemu.pacing import Pace
from casbackup.qemu.qmp import QmpClient
from casbackup.qemu.sink_host import SinkHost, SinkSpace, reconnect_delay_s
from casbackup.qemu.sink_process import SinkSettings
from casbackup.qemu.sink_server import SinkExport
from casbackup.qemu.source import DiskTask, Instant, LiveOptions, Report
from casbackup.units import KiB, MiB

_LOOK_S = 0.1
_PATIENCE_S = 60.0
"""For the conductor to clean up; it has timeouts of its own, this is a last one."""
_TRANSACTION_TIMEOUT_S = 60.0
"""It drains the guest's requests: a storage that hangs must not be given up at once."""
_QUICK = {"max-workers": 4, "max-chunk": 256 * KiB}
"""1,066 MB/s; QEMU's defaults are no faster and let a guest's write wait behind 16 MiB."""
_GENTLE = {"max-workers": 1, "max-chunk": 64 * KiB}
"""397 MB/s; for targets that are slower anyway."""
_SLOW_BYTES_S = 100 * MiB


class Tracking:
    """New dirty bitmaps for the next backup: added before the point in time, so they record a little too much."""

    def __init__(self, target: str, token: str) -> None:
        self.token = token
        self.name = bitmap_name(target, token)


class PushSource:
    """Implements ``LiveSource``. The caller removes the bitmaps of ``tracking``, unless ``run`` failed."""

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

    @property
    def token(self) -> str:
        return "" if self._tracking is None else self._tracking.token

    def run(self, tasks: Sequence[DiskTask], consumer: Consumer) -> Instant:
        """See ``LiveSource``.

        :raise LiveBackupBusy: when a backup of ours is running in this QEMU.
        """
        if not cleanup.remove_leftovers(self._qmp):
            raise LiveBackupBusy("QEMU is running a backup already")
        name = f"{cleanup.PREFIX}{secrets.token_hex(4)}"
        peer = self._qmp.peer
        space = SinkSpace(self._options.memory_bytes, self._options.spool_bytes, self._options.spool_folder)
        with SinkHost(self._settings(name, tasks), space, uid=peer.uid, gid=peer.gid) as sink:
            conductor = _Conductor(self._qmp, self._features, self._options, self._control, self._report, sink)
            return conductor.run(name, tasks, self._tracking, consumer)

    def _settings(self, name: str, tasks: Sequence[DiskTask]) -> SinkSettings:
        return SinkSettings(
            exports=[SinkExport(number, task.disk.size_bytes) for number, task in enumerate(tasks)],
            max_guest_stall_s=self._options.max_guest_stall_s,
            qmp_path=self._qmp.path,
            backup_name=name,
            bitmap_token=self.token or None,
        )


class _Counting:
    """Passes data on and counts it."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self.taken_bytes = 0

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        self._consumer.write(disk, offset, data)
        self.taken_bytes += len(data)

    def zero(self, disk: str, offset: int, length: int) -> None:
        self._consumer.zero(disk, offset, length)


class _Conductor:
    def __init__(
        self,
        qmp: QmpClient,
        features: Features,
        options: LiveOptions,
        control: LiveControl,
        report: Report,
        sink: SinkHost,
    ) -> None:
        self._qmp = qmp
        self._features = features
        self._options = options
        self._control = control
        self._report = report
        self._sink = sink
        self._pace = Pace(options.memory_bytes)
        self._abort: str | None = None
        self._failure: BaseException | None = None
        self._instant = Instant(False)
        self._speed_bytes_s = 0
        self._paused = False

    def run(self, name: str, tasks: Sequence[DiskTask], tracking: Tracking | None, consumer: Consumer) -> Instant:
        self._name = name
        self._tasks = tasks
        self._tracking = tracking
        self._counting = _Counting(consumer)
        thread = threading.Thread(target=self._guarded, name="conductor", daemon=True)
        thread.start()
        complete = False
        try:
            complete = self._sink.receive_into(self._counting)
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
        self._add_targets()
        with frozen_guest(
            self._options.freeze, self._options.agent_path, self._sink.frozen, self._report
        ) as self._instant:
            self._start()
        self._control.update(phase="copying")
        while not self._look():
            self._qmp.wait_event(_LOOK_S)
        self._control.update(phase="storing")
        cleanup.dismiss_jobs(self._qmp, self._name)
        cleanup.remove_nodes(self._qmp, self._name)
        self._sink.finish()

    # --- starting

    def _add_targets(self) -> None:
        for number, _task in enumerate(self._tasks):
            self._check()
            self._qmp.execute(
                "blockdev-add",
                {
                    "driver": "nbd",
                    "node-name": self._id(number),
                    "export": str(number),
                    "server": {"type": "unix", "path": self._sink.path},
                    # Should the sink die, the guest's writes wait until its stand-in answers, at once.
                    "reconnect-delay": reconnect_delay_s(self._options.max_guest_stall_s),
                },
            )

    def _start(self) -> None:
        """Begin to record, then the point in time. Two transactions: QEMU adds no bitmap in a grouped one."""
        self._check()
        if self._tracking is not None:
            name = self._tracking.name
            actions = [add_action(task.disk, name) for task in self._tasks]
            self._qmp.execute("transaction", {"actions": actions}, timeout_s=_TRANSACTION_TIMEOUT_S)
        self._qmp.execute(
            "transaction",
            {
                "actions": [self._job(number, task) for number, task in enumerate(self._tasks)],
                "properties": {"completion-mode": "grouped"},
            },
            timeout_s=_TRANSACTION_TIMEOUT_S,
        )

    def _job(self, number: int, task: DiskTask) -> dict[str, Any]:
        data: dict[str, Any] = {
            "job-id": self._id(number),
            "device": task.disk.node,
            "target": self._id(number),
            "sync": "full",
            "auto-dismiss": False,
        }
        if task.bitmap is not None:
            data |= {"sync": "bitmap", "bitmap": task.bitmap, "bitmap-mode": "never"}
        if self._features.backup_perf:
            limit = self._control.status.speed_limit_bytes_s
            data["x-perf"] = _GENTLE if 0 < limit < _SLOW_BYTES_S else _QUICK
        if self._features.on_cbw_error:
            data["on-cbw-error"] = "break-snapshot"
        return {"type": "blockdev-backup", "data": data}

    def _id(self, number: int) -> str:
        return f"{self._name}-{number}"

    # --- while it runs

    def _look(self) -> bool:
        """Look after everything once; True when all jobs have succeeded.

        :raise LiveBackupError: when the backup is not going to succeed.
        """
        self._check()
        jobs = cleanup.jobs_of(self._qmp, self._name)
        for job in jobs:
            if job.get("error"):
                raise BackupJobFailed(f"{self._disk_of(job)}: the backup job in QEMU failed: {job['error']}")
        if len(jobs) < len(self._tasks):
            raise BackupJobFailed("a backup job has vanished from QEMU")
        self._control.update(
            total_bytes=sum(job["total-progress"] for job in jobs),
            done_bytes=sum(job["current-progress"] for job in jobs),
            waiting_bytes=self._sink.waiting_bytes,
            spooled_bytes=self._sink.overflown_bytes,
            taken_bytes_s=int(self._pace.taken_bytes_s),
        )
        running = [job["id"] for job in jobs if job["status"] != "concluded"]
        self._steer(running)
        return not running

    def _check(self) -> None:
        """:raise LiveBackupError: when there is a reason to end."""
        if self._control.cancelled is not None:
            raise Interrupted(self._control.cancelled)
        if self._sink.failure is not None:
            raise self._sink.failure
        if self._abort is not None:
            raise BackupBroken(self._abort)

    def _disk_of(self, job: dict[str, Any]) -> str:
        return self._tasks[int(str(job["id"]).rpartition("-")[2])].disk.name

    def _steer(self, running: Sequence[str]) -> None:
        """Pass on what the pace and the user want. A job may end at any moment: then there is nothing to steer."""
        status = self._control.status
        speed = self._pace.look(time.monotonic(), self._counting.taken_bytes, self._sink.waiting_bytes)
        if status.speed_limit_bytes_s:
            speed = min(speed or status.speed_limit_bytes_s, status.speed_limit_bytes_s)
        if running and _differs(speed, self._speed_bytes_s):
            self._speed_bytes_s = speed
            for job in running:
                self._try("block-job-set-speed", {"device": job, "speed": speed // len(running)})
        if status.paused != self._paused:
            self._paused = status.paused
            for job in running:
                self._try("job-pause" if status.paused else "job-resume", {"id": job})

    def _try(self, command: str, arguments: dict[str, Any]) -> None:
        try:
            self._qmp.execute(command, arguments)
        except QmpCommandFailed:
            return

    # --- the end

    def _clean_up(self) -> None:
        token = None if self._tracking is None else self._tracking.token
        try:
            if self._sink.is_lost:
                for number in range(len(self._tasks)):  # a job that pauses does not connect anew
                    self._try("job-resume", {"id": self._id(number)})
                self._sink.wait_replaced()
            cleanup.remove_backup(self._qmp, self._name, bitmap_token=token)
        except CasbackupError as error:
            if not self._qmp.is_lost:
                self._report(f"QEMU may still have a job or node named {self._name}: {error.message}")


def _differs(speed: int, current: int) -> bool:
    """Whether it is worth telling QEMU; 0 is unlimited."""
    if not speed or not current:
        return speed != current
    return abs(speed - current) > current // 10
