"""Tells of every call: for tests, and to see what a guest or a job does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from casbackup.block.device import BlockDevice, Extent
from casbackup.block.filters.base import Filter
from casbackup.block.filters.operation import Operation
from casbackup.clock import Clock, SystemClock
from casbackup.fs import Buffer


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

    ``extents`` begins and ends with the use of its iterator, however far that goes. What ``report`` raises reaches the
    caller.
    """

    def __init__(self, device: BlockDevice, report: Callable[[Record], None], *, clock: Clock | None = None) -> None:
        """Takes over ``device``."""
        super().__init__(device)
        self._report = report
        self._clock = clock or SystemClock()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self._traced(Operation.READ, offset, len(buffer)):
            self._below.read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        with self._traced(Operation.WRITE, offset, len(data)):
            self._below.write(offset, data)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        with self._traced(Operation.WRITE_ZEROS, offset, length):
            self._below.write_zeros(offset, length, may_trim=may_trim)

    def discard(self, offset: int, length: int) -> None:
        with self._traced(Operation.DISCARD, offset, length):
            self._below.discard(offset, length)

    def flush(self) -> None:
        with self._traced(Operation.FLUSH, 0, 0):
            self._below.flush()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        with self._traced(Operation.EXTENTS, offset, length):
            yield from self._below.extents(offset, length)

    @contextlib.contextmanager
    def _traced(self, operation: Operation, offset: int, length: int) -> Iterator[None]:
        start_s = self._clock.monotonic_s()
        failure: BaseException | None = None
        try:
            yield
        except GeneratorExit:  # nobody wants more extents
            raise
        except BaseException as error:
            failure = error
            raise
        finally:
            duration_s = self._clock.monotonic_s() - start_s
            self._report(Record(operation, offset, length, duration_s, failure))
