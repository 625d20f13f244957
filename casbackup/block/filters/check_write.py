"""Compares a device with a second one that is known to be right."""

from __future__ import annotations

from casbackup.block.device import BlockDevice, read_bytes
from casbackup.block.filters.base import Filter
from casbackup.block.filters.ranges import RangeLocks
from casbackup.fs import Buffer
from casbackup.units import MiB

_STEP_BYTES = 1 * MiB


class CheckWrite(Filter):
    """Writes go to both devices; what is read from the one below is compared with the oracle.

    Calls that overlap take turns, for otherwise both devices could settle them differently and be right. What
    a discard leaves is undefined: it is read from the device once and holds from then on.

    :raise AssertionError: from reading, when the two differ. Like a wrong call that is a fault of the program.
    """

    def __init__(self, device: BlockDevice, oracle: BlockDevice) -> None:
        """Takes over both, which hold the same bytes.

        :raise ValueError: when they differ in size, or the oracle cannot follow. Nothing is taken over then.
        """
        if oracle.size_bytes != device.size_bytes:
            raise ValueError(f"the oracle has {oracle.size_bytes} bytes, the device {device.size_bytes}")
        if device.capabilities.writable and not oracle.capabilities.writable:
            raise ValueError("the oracle is not writable, the device is")
        if device.capabilities.min_block_bytes % oracle.capabilities.min_block_bytes:
            raise ValueError("the oracle asks for larger blocks than the device")
        super().__init__(device)
        self._oracle = oracle
        self._turns = RangeLocks()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self._turns.hold(offset, offset + len(buffer)):
            self._below.read_into(offset, buffer)
            expected = read_bytes(self._oracle, offset, len(buffer))
        if expected != buffer.tobytes():
            wrong = next(n for n, (one, other) in enumerate(zip(buffer, expected, strict=True)) if one != other)
            raise AssertionError(f"byte {offset + wrong} is {buffer[wrong]:#04x} instead of {expected[wrong]:#04x}")

    def write(self, offset: int, data: Buffer) -> None:
        with self._turns.hold(offset, offset + len(data)):
            self._below.write(offset, data)
            self._oracle.write(offset, data)

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        with self._turns.hold(offset, offset + length):
            self._below.write_zeros(offset, length, may_trim=may_trim)
            self._oracle.write_zeros(offset, length, may_trim=may_trim)

    def discard(self, offset: int, length: int) -> None:
        with self._turns.hold(offset, offset + length):
            self._below.discard(offset, length)
            for start in range(offset, offset + length, _STEP_BYTES):
                step = min(_STEP_BYTES, offset + length - start)
                self._oracle.write(start, read_bytes(self._below, start, step))

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._oracle.close()
