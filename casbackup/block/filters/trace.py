"""Tells of every call: for tests, and to see what a guest or a job does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from casbackup.block.device import BlockDevice, Extent
from casbackup.block.filters.base import Filter
from casbackup.block.filters.operation import Operation
from casbackup.clock import Clock, SystemClock
from casbackup.fs import Buffer

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Record:
    """One call that has ended."""

    operation: Operation
    offset: int
    length: int
    duration_s: float
    error: BaseException | None

    @property
    def end(self) -> int:
        return self.offset + self.length


class Trace(Filter):
    """Hands a record of each call to ``report``, in the thread of the call, after its end.

    ``extents`` counts as ended when it has given its iterator. What ``report`` raises reaches the caller.
    """

    def __init__(self, device: BlockDevice, report: Callable[[Record], None], *, clock: Clock | None = None) -> None:
        """Takes over ``device``."""
        super().__init__(device)
        self._report = report
        self._clock = clock or SystemClock()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._traced(Operation.READ, offset, len(buffer), partial(self._below.read_into, offset, buffer))

    def write(self, offset: int, data: Buffer) -> None:
        self._traced(Operation.WRITE, offset, len(data), partial(self._below.write, offset, data))

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        call = partial(self._below.write_zeros, offset, length, may_trim=may_trim)
        self._traced(Operation.WRITE_ZEROS, offset, length, call)

    def discard(self, offset: int, length: int) -> None:
        self._traced(Operation.DISCARD, offset, length, partial(self._below.discard, offset, length))

    def flush(self) -> None:
        self._traced(Operation.FLUSH, 0, 0, self._below.flush)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self._traced(Operation.EXTENTS, offset, length, partial(self._below.extents, offset, length))

    def _traced(self, operation: Operation, offset: int, length: int, call: Callable[[], _Result]) -> _Result:
        start_s = self._clock.monotonic_s()
        failure: BaseException | None = None
        try:
            return call()
        except BaseException as error:
            failure = error
            raise
        finally:
            duration_s = self._clock.monotonic_s() - start_s
            self._report(Record(operation, offset, length, duration_s, failure))
