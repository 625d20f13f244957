"""What is told of calls that fail, and how often."""

from __future__ import annotations

from casbackup.block.filters.operation import Operation
from casbackup.block.filters.trace import Record
from casbackup.errors import TargetFull, TargetUnwritable
from casbackup.testing.clock import FakeClock
from casbackup_client.failedcalls import FailedCalls


def failed(error: BaseException | None, offset: int = 0) -> Record:
    return Record(Operation.WRITE, offset, 4096, 0.1, error)


def test_each_reason_is_told_once_a_minute() -> None:
    told: list[str] = []
    clock = FakeClock()
    calls = FailedCalls(told.append, clock)
    full = TargetFull("/tmp: no space left")
    for offset in (0, 4096):
        calls.note("scsi0", failed(full, offset))
    assert told == ["scsi0: write of 4096 bytes at 0 failed: /tmp: no space left"]
    calls.note("scsi1", failed(full))
    calls.note("scsi0", failed(TargetUnwritable("an I/O error")))
    assert len(told) == 3
    clock.pass_time(61)
    calls.note("scsi0", failed(full, 8192))
    assert len(told) == 4 and "at 8192" in told[-1]


def test_success_and_other_exceptions_are_not() -> None:
    told: list[str] = []
    calls = FailedCalls(told.append, FakeClock())
    for error in (None, ValueError("a fault of the program"), KeyboardInterrupt()):
        calls.note("scsi0", failed(error))
    assert told == []
