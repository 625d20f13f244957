"""Every filter under the conformance suite, alone and in stacks of any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from casbackup.block.align import Aligned
from casbackup.block.device import BlockDevice
from casbackup.block.filters.base import Filter
from casbackup.block.filters.check_write import CheckWrite
from casbackup.block.filters.copy_before_write import CopyBeforeWrite
from casbackup.block.filters.copy_on_read import CopyOnRead
from casbackup.block.filters.faults import Faults
from casbackup.block.filters.overlay import Overlay
from casbackup.block.filters.saving import CallbackSaver, ScratchSaver
from casbackup.block.filters.snapshot_view import SnapshotView
from casbackup.block.filters.throttle import Throttle
from casbackup.block.filters.trace import Trace
from casbackup.block.filters.window import Window
from casbackup.block.guard import Guarded
from casbackup.block.memory import MemoryDevice
from casbackup.block.sparse import SparseMemory, temporary_device
from casbackup.testing.block import BlockDeviceConformance
from casbackup.units import GiB

Put = Callable[[BlockDevice], BlockDevice]


def window(device: BlockDevice) -> BlockDevice:
    """The device between others that must not be seen."""
    around = MemoryDevice(b"\xaa" * 4096 + content_of(device) + b"\xbb" * 4096)
    return Window(around, 4096, device.size_bytes)


def check_write(device: BlockDevice) -> BlockDevice:
    return CheckWrite(device, MemoryDevice(content_of(device)))


def overlay(device: BlockDevice) -> BlockDevice:
    return Overlay(device, SparseMemory(device.size_bytes))


def overlay_in_a_file(device: BlockDevice) -> BlockDevice:
    return Overlay(device, temporary_device(device.size_bytes))


def copy_on_read(device: BlockDevice) -> BlockDevice:
    return CopyOnRead(device, SparseMemory(device.size_bytes))


def copy_before_write_active(device: BlockDevice) -> BlockDevice:
    filter = CopyBeforeWrite(device)
    filter.begin(CallbackSaver(lambda *_: None))
    return filter


FILTERS: dict[str, Put] = {
    "nothing": Filter,
    "window": window,
    "throttle": lambda device: Throttle(device, bytes_per_s=1 * GiB, calls_per_s=1e6),
    "faults": Faults,
    "trace": lambda device: Trace(device, lambda record: None),
    "check-write": check_write,
    "overlay": overlay,
    "overlay in a file": overlay_in_a_file,
    "copy-on-read": copy_on_read,
    "copy-before-write": CopyBeforeWrite,
    "copy-before-write, active": copy_before_write_active,
    "aligned": Aligned,
}


def content_of(device: BlockDevice) -> bytes:
    buffer = bytearray(device.size_bytes)
    if buffer:
        device.read_into(0, memoryview(buffer))
    return bytes(buffer)


def checks() -> list[str]:
    return [name for name, _check in BlockDeviceConformance(MemoryDevice).checks()]


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("name", FILTERS)
def test_filter_conforms(name: str, check: str) -> None:
    suite = BlockDeviceConformance(lambda content: FILTERS[name](MemoryDevice(content)))
    dict(suite.checks())[check]()


@pytest.mark.parametrize("seed", range(6))
def test_stacks_conform(seed: int) -> None:
    """All filters at once; below each a guard sees to it that it makes only calls that are allowed."""

    def stacked(content: bytes) -> BlockDevice:
        device: BlockDevice = MemoryDevice(content)
        if seed % 2:
            device.capabilities = replace(device.capabilities, min_block_bytes=512)  # type: ignore[misc]
        for put in order:
            device = put(Guarded(device))
        return device

    order = [put for name, put in FILTERS.items() if name not in ("window", "check-write", "aligned")]
    random.Random(seed).shuffle(order)
    order.append(Aligned)
    BlockDeviceConformance(stacked).run()


def views(content: bytes) -> BlockDevice:
    """A point in time whose first half has been overwritten since."""
    filter = CopyBeforeWrite(MemoryDevice(content))
    saver = ScratchSaver(SparseMemory(len(content)))
    view = SnapshotView(filter.begin(saver), saver)
    if len(content) > 1:
        filter.write(0, b"\xff" * (len(content) // 2))
    return view


DEVICES: dict[str, tuple[Callable[[bytes], BlockDevice], bool]] = {
    "view": (views, False),
    "sparse memory": (lambda content: filled(SparseMemory(len(content)), content), True),
    "temporary file": (lambda content: filled(temporary_device(len(content)), content), True),
}


def filled(device: BlockDevice, content: bytes) -> BlockDevice:
    if content:
        device.write(0, content)
    return device


def cases() -> Iterator[tuple[str, str]]:
    for name, (_opened, writable) in DEVICES.items():
        for check, _function in BlockDeviceConformance(MemoryDevice, writable=writable).checks():
            yield name, check


@pytest.mark.parametrize(("name", "check"), [*cases()])
def test_device_conforms(name: str, check: str) -> None:
    opened, writable = DEVICES[name]
    suite = BlockDeviceConformance(opened, writable=writable)
    dict(suite.checks())[check]()
