"""Reading a device from front to back with several threads, for somebody who takes the bytes in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType

from casbackup.block.device import BlockDevice
from casbackup.limits import SEGMENT_BYTES
from casbackup.workers import worker_count

_AHEAD = 2
"""Segments that are read or wait to be taken, for each thread."""


class ReadAhead:
    """Iterates over ``length`` bytes from ``offset``, in pieces that end where segments do. Enter it
    before, leave it after.

    At most ``_AHEAD`` segments a thread are in memory. An error of the device is raised where its bytes
    would have come.
    """

    def __init__(self, device: BlockDevice, offset: int, length: int, *, threads: int | None = None) -> None:
        self._device = device
        self._pieces = list(_pieces(offset, offset + length))
        self._threads = [
            threading.Thread(target=self._work, name=f"read-ahead-{number}", daemon=True)
            for number in range(threads or worker_count())
        ]
        self._changed = threading.Condition()
        self._ready: dict[int, bytearray | BaseException] = {}
        self._next_to_read = self._next_to_give = 0
        self._stopped = False

    def __enter__(self) -> ReadAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __iter__(self) -> Iterator[bytearray]:
        for number in range(len(self._pieces)):
            with self._changed:
                while number not in self._ready:
                    self._changed.wait()
                data = self._ready.pop(number)
                self._next_to_give = number + 1
                self._changed.notify_all()
            if isinstance(data, BaseException):
                raise data
            yield data

    def _work(self) -> None:
        while (number := self._take()) is not None:
            start, end = self._pieces[number]
            data: bytearray | BaseException = bytearray(end - start)
            try:
                self._device.read_into(start, memoryview(data))  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001  raised where the bytes are taken
                data = error
            with self._changed:
                self._ready[number] = data
                self._changed.notify_all()

    def _take(self) -> int | None:
        """The next piece to read, once there is room for it; None when there is nothing more to do."""
        with self._changed:
            while True:
                number = self._next_to_read
                if self._stopped or number == len(self._pieces):
                    return None
                if number < self._next_to_give + _AHEAD * len(self._threads):
                    self._next_to_read = number + 1
                    return number
                self._changed.wait()


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = min(end, (start // SEGMENT_BYTES + 1) * SEGMENT_BYTES)
        yield start, stop
        start = stop
