"""Live backup by QEMU's own backup jobs, which push everything to our sink: QEMU 4.2 and later.

A job copies in the background, and what the guest is about to overwrite before that, each cluster once. So a disk is
read once and its data written once more by the guest: no temporary storage. One transaction starts the jobs of all
disks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from casbackup.block.spool import Consumer
from casbackup.errors import BackupJobFailed
from casbackup.qemu import cleanup
from casbackup.qemu.conductor import TRANSACTION_TIMEOUT_S, ConductedSource
from casbackup.qemu.pacing import Pace
from casbackup.qemu.sink_host import reconnect_delay_s
from casbackup.qemu.source import DiskTask, Mode
from casbackup.units import KiB, MiB

_QUICK = {"max-workers": 4, "max-chunk": 512 * KiB}
"""QEMU's defaults are no faster and let a guest's write wait behind 16 MiB. Requests of half the size cost the sink a
quarter more processor time, of twice the size QEMU itself half as much again. A guest's write waits no longer than with
half the size."""
_GENTLE = {"max-workers": 1, "max-chunk": 64 * KiB}
"""397 MB/s; for targets that are slower anyway."""
_SLOW_BYTES_S = 100 * MiB


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


class PushSource(ConductedSource):
    """QEMU moves all of the data."""

    mode = Mode.PUSH

    def _receiver(self, consumer: Consumer) -> Consumer:
        self._counting = _Counting(consumer)
        self._pace = Pace(self._options.memory_bytes)
        self._speed_bytes_s = 0
        self._paused = False
        return self._counting

    # --- starting

    def _prepare(self) -> None:
        # Should the sink die, the guest's writes wait until its stand-in answers, at once.
        delay_s = reconnect_delay_s(self._options.max_guest_stall_s)
        for number, _task in enumerate(self._tasks):
            self._add_target(number, **{"reconnect-delay": delay_s})

    def _take_instant(self) -> None:
        self._qmp.execute(
            "transaction",
            {
                "actions": [self._job(number, task) for number, task in enumerate(self._tasks)],
                "properties": {"completion-mode": "grouped"},
            },
            timeout_s=TRANSACTION_TIMEOUT_S,
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

    def _begun(self) -> None:
        """The jobs copy already."""

    # --- while it runs

    def _advance(self) -> bool:
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

    # --- the end

    def _end(self) -> None:
        cleanup.dismiss_jobs(self._qmp, self._name)
        cleanup.remove_nodes(self._qmp, self._name)

    def _let_go(self) -> None:
        if self._sink.is_lost:
            for number in range(len(self._tasks)):  # a job that pauses does not connect anew
                self._try("job-resume", {"id": self._id(number)})
            self._sink.wait_replaced()


def _differs(speed: int, current: int) -> bool:
    """Whether it is worth telling QEMU; 0 is unlimited."""
    if not speed or not current:
        return speed != current
    return abs(speed - current) > current // 10
