"""The guard: what it refuses, and what it does not let through from below."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from casbackup.block.device import Capabilities, Extent, merged
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice

SIZE = 64 * 1024


class Telling(MemoryDevice):
    """Reports the extents that a test wants, and counts calls."""

    told: tuple[Extent, ...] = ()
    calls = 0

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return iter(self.told)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.calls += 1

    def discard(self, offset: int, length: int) -> None:
        self.calls += 1

    def flush(self) -> None:
        self.calls += 1


@pytest.mark.parametrize(
    "told",
    [
        (),
        (Extent(0, SIZE - 1, True),),
        (Extent(1, SIZE - 1, True),),
        (Extent(0, SIZE + 1, True),),
        (Extent(0, 4096, True), Extent(8192, SIZE - 8192, False)),
        (Extent(0, 4096, True), Extent(0, SIZE, False)),
        (Extent(0, 4096, True), Extent(4096, SIZE - 4096, True)),
        (Extent(0, 0, False), Extent(0, SIZE, True)),
        (Extent(0, SIZE, False), Extent(SIZE, 1, True)),
    ],
    ids=["none", "short", "late", "long", "gap", "overlap", "not merged", "empty", "beyond"],
)
def test_extents_that_would_lose_data_stop(told: tuple[Extent, ...]) -> None:
    device = Telling(SIZE)
    device.told = told
    with pytest.raises(AssertionError, match="Telling gave"):
        list(Guarded(device).extents(0, SIZE))


def test_extents_of_a_device_closed_meanwhile() -> None:
    device = Guarded(MemoryDevice(b"x" * 4096 + bytes(4096)))
    extents = device.extents(0, 8192)
    next(extents)
    device.close()
    with pytest.raises(ValueError, match="closed"):
        next(extents)


def test_buffers_that_cannot_be_used() -> None:
    device = Guarded(MemoryDevice(SIZE))
    with pytest.raises(ValueError, match="not writable"):
        device.read_into(0, memoryview(b"1234"))
    with pytest.raises(ValueError, match="not contiguous"):
        device.read_into(0, memoryview(bytearray(8))[::2])
    with pytest.raises(ValueError, match="not contiguous"):
        device.write(0, memoryview(bytes(8))[::2])


def test_calls_of_nothing_do_not_get_through() -> None:
    inner = Telling(SIZE)
    device = Guarded(inner)
    device.read_into(SIZE, memoryview(bytearray()))
    device.discard(0, 0)
    assert list(device.extents(5, 0)) == []
    assert inner.calls == 0


def test_what_a_device_cannot_do_does_not_reach_it() -> None:
    inner = Telling(SIZE)
    inner.capabilities = Capabilities(writable=True)
    Guarded(inner).discard(0, 4096)
    inner.capabilities = Capabilities()
    Guarded(inner).flush()
    assert inner.calls == 0


def test_alignment_is_asked_except_at_the_end() -> None:
    inner = Telling(10_000)
    inner.capabilities = Capabilities(min_block_bytes=4096)
    device = Guarded(inner)
    device.read_into(8192, memoryview(bytearray(10_000 - 8192)))
    for offset, length in ((0, 4095), (1, 4095), (4096, 10)):
        with pytest.raises(ValueError, match="not aligned to blocks of 4096 bytes"):
            device.read_into(offset, memoryview(bytearray(length)))


def test_merged() -> None:
    parts = [
        Extent(0, 1, True),
        Extent(1, 2, True),
        Extent(3, 4, False),
        Extent(7, 1, False),
        Extent(8, 1, True),
    ]
    assert list(merged(parts)) == [Extent(0, 3, True), Extent(3, 5, False), Extent(8, 1, True)]
    assert list(merged([])) == []
