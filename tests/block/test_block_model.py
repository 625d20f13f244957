"""Random reads, writes and zeros on each kind of device do what they do to a bytearray."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casbackup.block.align import Aligned
from casbackup.block.device import BlockDevice, read_bytes
from casbackup.block.filters.check_write import CheckWrite
from casbackup.block.filters.copy_on_read import CopyOnRead
from casbackup.block.filters.overlay import Overlay
from casbackup.block.filters.window import Window
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.block.nbd.client import NbdClient
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.server import NbdServer
from casbackup.block.nbd.uri import NbdAddress
from casbackup.block.rawfile import RawFile
from casbackup.block.sparse import SparseMemory, temporary_device
from casbackup.testing.block import check_extents

SIZE = 300_001


class Step(NamedTuple):
    action: str
    offset: int
    length: int


positions = st.integers(0, SIZE) | st.integers(0, SIZE // 4096).map(lambda block: block * 4096)
steps = st.builds(
    lambda action, one, other: Step(action, min(one, other), abs(one - other)),
    st.sampled_from(["read", "write", "zero", "zero-allocated", "flush", "extents"]),
    positions,
    positions,
)


FILTERS: dict[str, Callable[[], BlockDevice]] = {
    "overlay": lambda: Overlay(MemoryDevice(b"\xaa" * SIZE, writable=False), SparseMemory(SIZE)),
    "overlay in a file": lambda: Overlay(MemoryDevice(b"\xaa" * SIZE, writable=False), temporary_device(SIZE)),
    "copy-on-read": lambda: CopyOnRead(MemoryDevice(b"\xaa" * SIZE), SparseMemory(SIZE)),
    "check-write": lambda: CheckWrite(Overlay(MemoryDevice(SIZE), SparseMemory(SIZE)), MemoryDevice(SIZE)),
    "window": lambda: Window(MemoryDevice(SIZE + 20_000), 4096, SIZE),
}


@pytest.fixture(params=["memory", "blocks", *FILTERS, "raw file", "server", "nbdkit", "nbdkit without extras"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[[], contextlib.AbstractContextManager[BlockDevice]]]:
    if request.param == "memory":
        yield lambda: MemoryDevice(SIZE)
    elif request.param == "blocks":
        yield blocks
    elif request.param in FILTERS:
        yield FILTERS[request.param]
    elif request.param == "server":
        with NbdServer([Export("", lambda: Guarded(MemoryDevice(SIZE)))]) as server:
            address = server.listen(NbdAddress(socket_path=str(tmp_path / "nbd.sock")))
            yield lambda: NbdClient.connect(address)
    elif request.param == "raw file":
        path = tmp_path / "disk.raw"
        path.touch()
        os.truncate(path, SIZE)
        yield lambda: RawFile.open(str(path), writable=True)
    else:
        extras = ("--no-sr", "--filter=nozero") if "without" in request.param else ()
        nbdkit: Any = request.getfixturevalue("nbdkit")
        with nbdkit(*extras, "memory", f"size={SIZE}") as uri:
            yield lambda: NbdClient.connect(uri)


def blocks() -> BlockDevice:
    device = MemoryDevice(SIZE)
    device.capabilities = replace(device.capabilities, min_block_bytes=4096)
    return Aligned(Guarded(device))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(steps, max_size=25))
def test_device_is_a_bytearray(opened: Any, plan: list[Step]) -> None:
    model = bytearray(SIZE)
    with opened() as inner:
        device = Guarded(inner)
        device.write_zeros(0, SIZE)  # of the example before
        for number, step in enumerate(plan):
            apply(device, model, step, number)
        assert read_bytes(device, 0, SIZE) == model


def apply(device: BlockDevice, model: bytearray, step: Step, number: int) -> None:
    offset, length = step.offset, step.length
    if step.action == "read":
        assert read_bytes(device, offset, length) == model[offset : offset + length]
    elif step.action == "write":
        model[offset : offset + length] = random.Random(number).randbytes(length)
        device.write(offset, model[offset : offset + length])
    elif step.action.startswith("zero"):
        model[offset : offset + length] = bytes(length)
        device.write_zeros(offset, length, may_trim=step.action == "zero")
    elif step.action == "flush":
        device.flush()
    else:
        check_extents(list(device.extents(offset, length)), offset, length, bytes(model))
