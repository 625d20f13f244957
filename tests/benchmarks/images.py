"""Disk images for benchmarks: real files with holes, their content from a seed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from random import Random

from casbackup.limits import BLOCK_BYTES, SEGMENT_BYTES
from casbackup.units import MiB


def write_image(path: Path, size_bytes: int, places: Iterable[int], seed: int = 1) -> Path:
    """An image with a MiB of data at each of ``places``; equal seeds give equal data, wherever it is put."""
    random = Random(seed)
    with open(path, "wb") as file:
        file.truncate(size_bytes)
        for place in places:
            _write_all(file.fileno(), random.randbytes(MiB), place)
    return path


def scattered(size_bytes: int, pieces: int, seed: int = 2) -> list[int]:
    """So many different segments of a disk, by their first bytes, in order."""
    return sorted(n * SEGMENT_BYTES for n in Random(seed).sample(range(size_bytes // SEGMENT_BYTES), pieces))


def change_image(path: Path, part: float, seed: int) -> None:
    """Overwrite the first block of that part of the segments of an image, neighbouring ones."""
    random = Random(f"change {seed}")
    segments = path.stat().st_size // SEGMENT_BYTES
    count = max(1, round(segments * part))
    first = random.randrange(segments - count + 1)
    with open(path, "r+b") as file:
        for segment in range(first, first + count):
            _write_all(file.fileno(), random.randbytes(BLOCK_BYTES), segment * SEGMENT_BYTES)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
