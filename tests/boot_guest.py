"""A VM of one boot sector that writes numbered blocks to two disks in turn, and what the disks hold then.

Write n goes to disk n % 2; with h = n * 0x9E3779B1 it puts h, h + 1 … into the block h >> 18 of 4 KiB. The guest tells
every 64 writes how many there were, and "E0" after an error.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from casbackup.units import MiB

BOOT_DISK = (Path(__file__).parent / "qemu" / "fixtures" / "writer.bin").read_bytes().ljust(1 * MiB, b"\0")
DISK_BYTES = 64 * MiB
_STEP = 0x9E3779B1
_INVERSE = pow(_STEP, -1, 2**32)
_BLOCK_WORDS = 1024


class BootGuest:
    """Runs from its making to ``kill``."""

    def __init__(self, folder: Path, disks: Sequence[str]) -> None:
        """``disks``: QEMU's options for them, the one that is booted from first. QMP is at ``qmp_path``."""
        if shutil.which("qemu-system-x86_64") is None:
            pytest.skip("qemu-system-x86_64 is not installed")
        self._serial = folder / "serial"
        self.qmp_path = folder / "qmp"
        command = ["qemu-system-x86_64", "-M", "pc", "-m", "16", "-accel", "tcg", "-display", "none", "-nodefaults"]
        command += ["-serial", f"file:{self._serial}", "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        self.process = subprocess.Popen([*command, *disks], stderr=subprocess.DEVNULL)

    def written(self) -> int:
        """How many writes it has told of."""
        numbers = [line for line in self._text().split() if len(line) == 8]
        return int(numbers[-1], 16) if numbers else 0

    def wait_written(self, more: int) -> None:
        """Until it has written so many blocks more than now."""
        count, deadline = self.written() + more, time.monotonic() + 60
        while self.written() < count:
            assert self.process.poll() is None and time.monotonic() < deadline, f"only {self.written()} writes"
            time.sleep(0.02)

    def saw_errors(self) -> bool:
        return "E0" in self._text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _text(self) -> str:
        return self._serial.read_text(errors="replace") if self._serial.exists() else ""


def check_prefix(first: bytes, second: bytes, before: tuple[bytes, bytes] | None = None) -> int:
    """Both disks hold exactly the first N writes, over what was there ``before``, or zeros. Returns N."""
    expected = [_blocks(content).copy() for content in before or (bytes(DISK_BYTES), bytes(DISK_BYTES))]
    found = [_blocks(first), _blocks(second)]
    heads = [now[(now != old).any(axis=1), 0] for now, old in zip(found, expected, strict=True)]
    numbers = np.concatenate(heads).astype(np.uint64) * np.uint64(_INVERSE) % np.uint64(2**32)
    count = int(numbers.max(initial=0)) + 1
    for number in range(count):
        start = np.uint32(number * _STEP % 2**32)
        expected[number & 1][int(start) >> 18] = np.arange(_BLOCK_WORDS, dtype=np.uint32) + start
    wrong = [np.flatnonzero((now != want).any(axis=1)).tolist() for now, want in zip(found, expected, strict=True)]
    assert wrong == [[], []], f"blocks that are not as the first {count} writes left them"
    return count


def _blocks(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint32).reshape(-1, _BLOCK_WORDS)
