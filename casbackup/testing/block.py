"""Conformance suite of the BlockDevice port: every implementation passes every check.

    suite = BlockDeviceConformance(opened)
    for name, check in suite.checks():
        check()

``opened(content)`` returns a context manager that gives a device of exactly that content. No test framework
is needed: a check returns, or raises ``AssertionError``.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache

from casbackup.block.device import BlockDevice, Extent, read_bytes
from casbackup.block.guard import Guarded
from casbackup.units import KiB, MiB

Opened = Callable[[bytes], AbstractContextManager[BlockDevice]]

_LARGE_BYTES = 5 * MiB + 8 * KiB
"""More than an implementation that works in pieces has under way at once."""


class BlockDeviceConformance:
    """All the checks of one implementation."""

    def __init__(self, opened: Opened, *, writable: bool = True, size_multiple: int = 1) -> None:
        """``writable``: the devices are; if not, the checks of writing are left out.

        ``size_multiple``: the implementation can only have sizes that are multiples of this many bytes.
        """
        self._opened = opened
        self._writable = writable
        self._size_multiple = size_multiple

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name and function of each check that applies."""
        skipped = "check_readonly_" if self._writable else "check_writing_"
        for name in sorted(dir(self)):
            if name.startswith("check_") and not name.startswith(skipped):
                yield name.removeprefix("check_"), getattr(self, name)

    def run(self) -> None:
        """All checks, one after the other."""
        for _name, check in self.checks():
            check()

    # --- reading

    def check_size_is_that_of_the_content(self) -> None:
        for length in (self._size(64 * KiB), self._size(70_001), self._size(1)):
            with self._opened(_pattern(length)) as device:
                assert device.size_bytes == length, f"{device.size_bytes} instead of {length}"
                assert device.changed_size() is None

    def check_empty_device(self) -> None:
        if self._size_multiple == 1:
            with self._open(b"") as device:
                device.read_into(0, memoryview(bytearray()))
                assert not list(device.extents(0, 0))

    def check_reads_any_range(self) -> None:
        content = _pattern(self._size(200_001))
        with self._open(content) as device:
            for offset, length in _ranges(device, seed=1):
                assert read_bytes(device, offset, length) == content[offset : offset + length]

    def check_large_reads(self) -> None:
        content = _pattern(self._size(_LARGE_BYTES))
        with self._open(content) as device:
            assert read_bytes(device, 0, len(content)) == content

    def check_reads_fill_only_the_buffer(self) -> None:
        content = _pattern(self._size(64 * KiB))
        with self._open(content) as device:
            around = bytearray(b"\xee" * 12 * KiB)
            device.read_into(8 * KiB, memoryview(around)[4 * KiB : 8 * KiB])
            assert around[4 * KiB : 8 * KiB] == content[8 * KiB : 12 * KiB]
            assert around[: 4 * KiB] == around[8 * KiB :] == b"\xee" * 4 * KiB

    def check_threads_read_at_once(self) -> None:
        content = _pattern(self._size(2 * MiB))
        with self._open(content) as device:

            def reader(seed: int) -> None:
                for offset, length in _ranges(device, seed):
                    assert read_bytes(device, offset, length) == content[offset : offset + length]

            _in_threads(reader)

    # --- extents

    def check_extents_cover_without_gaps(self) -> None:
        content = self._sparse()
        with self._open(content) as device:
            for offset, length in [(0, len(content)), *_ranges(device, seed=2)]:
                check_extents(list(device.extents(offset, length)), offset, length, content)

    def check_extents_of_all_zeros_and_all_data(self) -> None:
        for content in (bytes(self._size(1 * MiB)), _pattern(self._size(1 * MiB))):
            with self._open(content) as device:
                check_extents(list(device.extents(0, len(content))), 0, len(content), content)

    def check_extents_may_be_left_early(self) -> None:
        with self._open(self._sparse()) as device:
            for _extent in device.extents(0, device.size_bytes):
                break
            read_bytes(device, 0, 64 * KiB)

    def check_extents_may_be_read_as_they_come(self) -> None:
        content = self._sparse()
        with self._open(content) as device:
            for extent in device.extents(0, device.size_bytes):
                assert read_bytes(device, extent.offset, extent.length) == content[extent.offset : extent.end]

    # --- calls that are not allowed

    def check_calls_outside_are_refused(self) -> None:
        with self._open(_pattern(self._size(64 * KiB))) as device:
            size = device.size_bytes
            for offset, length in ((size, 4096), (size - 4096, 8192), (-4096, 4096), (1 << 62, 4096)):
                _refused(device.read_into, offset, memoryview(bytearray(length)))
                _refused(device.write, offset, bytes(length))
                for call in (device.extents, device.write_zeros, device.discard):
                    _refused(call, offset, length)
            _refused(device.write_zeros, 0, -4096)

    def check_unaligned_calls_are_refused(self) -> None:
        with self._open(_pattern(self._size(64 * KiB))) as device:
            if device.capabilities.min_block_bytes > 1:
                _refused(device.read_into, 1, memoryview(bytearray(512)))
                _refused(device.read_into, 0, memoryview(bytearray(1)))

    def check_closed_device_refuses_calls(self) -> None:
        with self._open(_pattern(self._size(64 * KiB))) as device:
            device.close()
            _refused(device.read_into, 0, memoryview(bytearray(4096)))
            _refused(device.write, 0, bytes(4096))
            _refused(device.extents, 0, 4096)
            _refused(device.flush)
            _refused(device.changed_size)
            device.close()

    def check_readonly_device_refuses_writes(self) -> None:
        content = _pattern(self._size(64 * KiB))
        with self._open(content) as device:
            _refused(device.write, 0, bytes(4096))
            _refused(device.write_zeros, 0, 4096)
            _refused(device.discard, 0, 4096)
            device.flush()
            assert read_bytes(device, 0, len(content)) == content

    # --- writing

    def check_writing_is_read_back(self) -> None:
        model = bytearray(_pattern(self._size(200_001)))
        with self._open(bytes(model)) as device:
            for offset, length in _ranges(device, seed=3):
                data = random.Random(offset).randbytes(length)
                device.write(offset, data)
                model[offset : offset + length] = data
            _check_content(device, model)
            device.flush()
            _check_content(device, model)

    def check_writing_large_pieces(self) -> None:
        content = _pattern(self._size(_LARGE_BYTES))
        with self._open(bytes(len(content))) as device:
            device.write(0, content)
            _check_content(device, content)

    def check_writing_any_buffer(self) -> None:
        data = _pattern(8 * KiB)
        with self._open(bytes(self._size(64 * KiB))) as device:
            for buffer in (data, bytearray(data), memoryview(data), memoryview(data).cast("Q")):
                device.write_zeros(4 * KiB, 8 * KiB)
                device.write(4 * KiB, buffer)
                assert read_bytes(device, 4 * KiB, 8 * KiB) == data

    def check_writing_zeros(self) -> None:
        model = bytearray(_pattern(self._size(1 * MiB + 12_345)))
        with self._open(bytes(model)) as device:
            for number, (offset, length) in enumerate(_ranges(device, seed=4)):
                device.write_zeros(offset, length, may_trim=bool(number % 2))
                model[offset : offset + length] = bytes(length)
            _check_content(device, model)
            check_extents(list(device.extents(0, len(model))), 0, len(model), bytes(model))

    def check_writing_data_after_zeros(self) -> None:
        content = _pattern(self._size(256 * KiB))
        with self._open(content) as device:
            device.write_zeros(0, device.size_bytes)
            device.write(64 * KiB, content[64 * KiB : 128 * KiB])
            expected = bytearray(len(content))
            expected[64 * KiB : 128 * KiB] = content[64 * KiB : 128 * KiB]
            _check_content(device, expected)
            check_extents(list(device.extents(0, len(expected))), 0, len(expected), bytes(expected))

    def check_writing_discard_touches_nothing_else(self) -> None:
        content = _pattern(self._size(256 * KiB))
        with self._open(content) as device:
            device.discard(64 * KiB, 64 * KiB)
            assert read_bytes(device, 0, 64 * KiB) == content[: 64 * KiB]
            rest = read_bytes(device, 128 * KiB, len(content) - 128 * KiB)
            assert rest == content[128 * KiB :]

    def check_writing_by_several_threads(self) -> None:
        threads, span = 4, 512 * KiB
        content = _pattern(threads * span)
        with self._open(bytes(self._size(threads * span))) as device:

            def writer(number: int) -> None:
                for offset in range(number * span, (number + 1) * span, 64 * KiB):
                    device.write(offset, content[offset : offset + 64 * KiB])
                    assert read_bytes(device, offset, 64 * KiB) == content[offset : offset + 64 * KiB]

            _in_threads(writer, threads)
            assert read_bytes(device, 0, len(content)) == content

    # --- helpers

    def _size(self, length: int) -> int:
        """The next size that the implementation can have."""
        return -(-length // self._size_multiple) * self._size_multiple

    def _sparse(self) -> bytes:
        """1 MiB of data, zeros and odd bytes in between, and an end that is zero."""
        content = bytearray(self._size(1 * MiB + 1))
        for offset, length in ((0, 4096), (128 * KiB, 64 * KiB), (300_000, 1), (512 * KiB, 200 * KiB)):
            content[offset : offset + length] = _pattern(length)
        return bytes(content)

    @contextmanager
    def _open(self, content: bytes) -> Iterator[BlockDevice]:
        """A device of the implementation, guarded."""
        with self._opened(content) as device:
            assert device.capabilities.writable is self._writable
            yield Guarded(device)


@lru_cache(maxsize=16)
def _pattern(length: int) -> bytes:
    """Bytes without a zero block."""
    return random.Random(length).randbytes(length)


def _ranges(device: BlockDevice, seed: int, count: int = 25) -> Iterator[tuple[int, int]]:
    """(offset, length) at random that the device allows; the first touches the end."""
    block = device.capabilities.min_block_bytes
    chance = random.Random(seed)
    for number in range(count):
        offset = chance.randrange(device.size_bytes) // block * block
        length = chance.choice((block, 4096, 70_000, device.size_bytes)) // block * block or block
        room = device.size_bytes - offset
        yield offset, room if number == 0 else min(length, room)


def _check_content(device: BlockDevice, expected: bytes | bytearray) -> None:
    assert read_bytes(device, 0, device.size_bytes) == expected


def check_extents(extents: list[Extent], offset: int, length: int, content: bytes) -> None:
    """They cover the range as the port says, and what is called zero is."""
    position, before = offset, None
    for extent in extents:
        assert extent.offset == position and extent.length > 0, f"{extent} after byte {position}"
        assert extent.zero is not before, f"{extent} is not merged with the one before"
        zeros_only = not content[extent.offset : extent.end].strip(b"\0")
        assert zeros_only or not extent.zero, f"{extent} holds data"
        position, before = extent.end, extent.zero
    assert position == offset + length, f"the extents end at {position}"


def _refused(call: Callable[..., object], *arguments: object) -> None:
    try:
        call(*arguments)
    except ValueError:
        return
    raise AssertionError("a call that is not allowed was not refused")


def _in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Run ``work(0)``, ``work(1)`` … at once and raise what the first that failed raised."""
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread of the check
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
