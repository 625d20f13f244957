"""Makes a device fail on purpose: which call, where, how often, and how."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from casbackup.block.device import BlockDevice, Extent
from casbackup.block.filters.base import Filter
from casbackup.block.filters.operation import Operation
from casbackup.errors import CasbackupError, SourceUnreadable, TargetUnwritable
from casbackup.fs import Buffer


class Fault(Enum):
    """What happens to a call."""

    DELAY = "delay"
    """It only takes longer."""
    FAIL = "fail"
    """It fails and nothing is done."""
    SHORT = "short"
    """Half of the bytes are read or written before it fails; for other calls the same as ``FAIL``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Which calls a fault meets: those of ``operations`` that touch the range, from the ``nth`` on."""

    operations: frozenset[Operation]
    fault: Fault = Fault.FAIL
    offset: int = 0
    length: int | None = None
    """None: to the end. A flush touches every range."""
    nth: int = 1
    """Of the calls that match, counted from 1."""
    times: int | None = None
    """So many of them; None: all from then on."""
    delay_s: float = 0.0
    """Before anything else happens."""
    error: Callable[[str], CasbackupError] | None = None
    """Makes the error from a message; None: what the port says for the operation."""

    def touches(self, operation: Operation, offset: int, length: int) -> bool:
        if operation not in self.operations:
            return False
        end = None if self.length is None else self.offset + self.length
        return not length or (offset + length > self.offset and (end is None or offset < end))

    def strikes(self, count: int) -> bool:
        """Whether it strikes at the ``count``-th call that matches."""
        return self.nth <= count and (self.times is None or count < self.nth + self.times)


class Faults(Filter):
    """Each call is held against all rules in order; every one that strikes delays it, the first other fails it."""

    def __init__(self, device: BlockDevice, *rules: Rule, sleep: Callable[[float], None] = time.sleep) -> None:
        """Takes over ``device``. ``sleep`` takes seconds."""
        super().__init__(device)
        self._sleep = sleep
        self._lock = threading.Lock()
        self.set_rules(*rules)

    def set_rules(self, *rules: Rule) -> None:
        """Replace all rules, at any time and from any thread; counting begins anew."""
        with self._lock:
            self._rules = rules
            self._counts = [0] * len(rules)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        rule = self._struck(Operation.READ, offset, len(buffer))
        if rule is not None:
            if rule.fault is Fault.SHORT and len(buffer) > 1:
                self._below.read_into(offset, buffer[: self._half(len(buffer))])
            raise _failure(rule, Operation.READ, offset)
        self._below.read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        rule = self._struck(Operation.WRITE, offset, len(data))
        if rule is not None:
            if rule.fault is Fault.SHORT and len(data) > 1:
                self._below.write(offset, memoryview(data)[: self._half(len(data))])
            raise _failure(rule, Operation.WRITE, offset)
        self._below.write(offset, data)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        self._strike(Operation.WRITE_ZEROS, offset, length)
        self._below.write_zeros(offset, length, may_trim=may_trim)

    def discard(self, offset: int, length: int) -> None:
        self._strike(Operation.DISCARD, offset, length)
        self._below.discard(offset, length)

    def flush(self) -> None:
        self._strike(Operation.FLUSH, 0, 0)
        self._below.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._strike(Operation.EXTENTS, offset, length)
        return self._below.extents(offset, length)

    def _strike(self, operation: Operation, offset: int, length: int) -> None:
        rule = self._struck(operation, offset, length)
        if rule is not None:
            raise _failure(rule, operation, offset)

    def _struck(self, operation: Operation, offset: int, length: int) -> Rule | None:
        """Delay the call as the rules say; the rule by which it fails, if any."""
        striking = self._counted(operation, offset, length)
        for rule in striking:
            if rule.delay_s:
                self._sleep(rule.delay_s)
        return next((rule for rule in striking if rule.fault is not Fault.DELAY), None)

    def _counted(self, operation: Operation, offset: int, length: int) -> list[Rule]:
        striking = []
        with self._lock:
            for number, rule in enumerate(self._rules):
                if rule.touches(operation, offset, length):
                    self._counts[number] += 1
                    if rule.strikes(self._counts[number]):
                        striking.append(rule)
        return striking

    def _half(self, length: int) -> int:
        """Half of a length in whole blocks, at least one."""
        block = self.capabilities.min_block_bytes
        return max(length // 2 // block, 1) * block if length > block else length


def _failure(rule: Rule, operation: Operation, offset: int) -> CasbackupError:
    reading = operation in (Operation.READ, Operation.EXTENTS)
    error = rule.error or (SourceUnreadable if reading else TargetUnwritable)
    return error(f"{operation.value} at byte {offset} failed on purpose")
