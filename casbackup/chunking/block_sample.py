"""Content-defined chunking at file-system-block granularity.

A guest's file system moves data in 4 KiB blocks, so a block's content is a good place to cut and a rolling hash
over every byte is wasted work. Each block's fingerprint is the XOR of 16 of its bytes, at fixed places spread over
the block; a pseudo-random subset of the 256 values ends a chunk. Taking byte ``k`` of every block is one slice
with a step, and XOR and OR of the slices are big-integer operations, so a 4 MiB segment costs some 50 C calls and
no numpy, whose import alone would take as long as finding nothing new on a gigabyte (figures:
``docs/decisions/0002-chunker.md``).

In an encrypted repository anybody who holds it sees how long chunks are, and that must tell nothing about the bytes:
there the 16 bytes go through AES under a secret key, and the fingerprint is a byte of the result.

Runs of all-zero blocks become zero spans; the OR of the same samples finds candidates, a memcmp confirms them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from blake3 import blake3

from casbackup.buffers import ByteBuffer
from casbackup.fs import Buffer
from casbackup.limits import BLOCK_BYTES, SEGMENT_BYTES
from casbackup.spec.config import ChunkerConfig

_SAMPLES = 16
_STRIDE = BLOCK_BYTES // _SAMPLES
_SAMPLE_OFFSETS = tuple(i * _STRIDE + (i * 37 + 11) % _STRIDE for i in range(_SAMPLES))
_ZEROS = bytes(SEGMENT_BYTES)


class Span(NamedTuple):
    """``length`` bytes from ``offset`` of a segment: one chunk, or zeros."""

    offset: int
    length: int
    is_zero: bool


class BlockSampleChunker:
    """Immutable after construction, so any number of threads may share it."""

    def __init__(self, config: ChunkerConfig, scramble: Callable[[Buffer], bytes] | None = None) -> None:
        """``scramble`` encrypts each 16 bytes by themselves; it must be safe from several threads."""
        self._scramble = scramble
        self._min = config.min_blocks
        self._max = config.max_blocks
        self._zero_run = re.compile(b"\\0{%d,}" % config.zero_run_blocks)
        self._zero_run_blocks = config.zero_run_blocks
        self._cut_table = _cut_table(config.cuts_in_256)

    def spans(self, segment: ByteBuffer, length: int) -> list[Span]:
        """Cut the first ``length`` bytes of ``segment`` into chunks and zero spans, in order, without gaps.

        ``segment`` must hold zeros from ``length`` to the end of its last block. The result depends on nothing but
        the bytes.
        """
        blocks = -(-length // BLOCK_BYTES)
        data: ByteBuffer | bytes = segment if len(segment) == blocks * BLOCK_BYTES else segment[: blocks * BLOCK_BYTES]
        cuts, may_be_zero = self._fingerprints(data, blocks)
        spans: list[Span] = []
        position = 0
        for start, end in self._zero_runs(data, may_be_zero):
            self._cut(cuts, position, start, spans)
            spans.append(Span(start * BLOCK_BYTES, (end - start) * BLOCK_BYTES, True))
            position = end
        self._cut(cuts, position, blocks, spans)
        last = spans[-1]
        spans[-1] = last._replace(length=length - last.offset)
        return spans

    def _fingerprints(self, data: ByteBuffer | bytes, blocks: int) -> tuple[bytes, bytes]:
        """Per block: 1 where a chunk may end; 0 where the block may be all zero."""
        planes = [data[offset::BLOCK_BYTES] for offset in _SAMPLE_OFFSETS]
        mixed = union = 0
        for plane in planes:
            number = int.from_bytes(plane, "little")
            mixed ^= number
            union |= number
        marks = mixed.to_bytes(blocks, "little") if self._scramble is None else _scrambled(planes, self._scramble)
        return marks.translate(self._cut_table), union.to_bytes(blocks, "little")

    def _zero_runs(self, data: ByteBuffer | bytes, may_be_zero: bytes) -> list[tuple[int, int]]:
        """Runs of at least ``zero_run_blocks`` blocks that really are zero, as block numbers [start, end)."""
        runs: list[tuple[int, int]] = []
        for match in self._zero_run.finditer(may_be_zero):
            start, end = match.span()
            if data[start * BLOCK_BYTES : end * BLOCK_BYTES] == _ZEROS[: (end - start) * BLOCK_BYTES]:
                runs.append((start, end))
            else:
                runs.extend(self._confirmed(data, start, end))
        return runs

    def _confirmed(self, data: ByteBuffer | bytes, start: int, end: int) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        zero_block = _ZEROS[:BLOCK_BYTES]
        first = start
        for block in range(start, end + 1):
            if block < end and data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] == zero_block:
                continue
            if block - first >= self._zero_run_blocks:
                runs.append((first, block))
            first = block + 1
        return runs

    def _cut(self, cuts: bytes, start: int, end: int, spans: list[Span]) -> None:
        """Cut the blocks [start, end): after one that ends a chunk, not before ``min``, at the latest at ``max``."""
        while start < end:
            latest = min(start + self._max, end)
            found = cuts.find(b"\1", start + self._min - 1, latest)
            stop = latest if found < 0 else found + 1
            spans.append(Span(start * BLOCK_BYTES, (stop - start) * BLOCK_BYTES, False))
            start = stop


def _scrambled(planes: Sequence[ByteBuffer | bytes], scramble: Callable[[Buffer], bytes]) -> bytes:
    """One byte a block, which depends on all 16 of its samples and the key."""
    samples = bytearray(len(planes[0]) * _SAMPLES)
    for number, plane in enumerate(planes):
        samples[number::_SAMPLES] = plane
    return scramble(samples)[::_SAMPLES]


def _cut_table(cuts_in_256: int) -> bytes:
    """A 256-byte table with ``cuts_in_256`` ones at places that look random and never change."""
    order = sorted(range(256), key=lambda value: blake3(b"casbackup cut %d" % value).digest())
    chosen = set(order[:cuts_in_256])
    return bytes(value in chosen for value in range(256))
