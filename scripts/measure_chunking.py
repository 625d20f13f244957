"""Measures how well disks deduplicate, with the product's own chunker and compression; prints a Markdown table.

    python scripts/measure_chunking.py a1.raw a2.raw b1.raw --cuts 18 40 --levels 1 2 3

Images are taken one after another, as backups into one repository would be. MB are what would be in the
repository after all of them: records of chunks with their headers, leaves, and 150 bytes of index for each blob.
Seconds are of one processor, for what is new. The table of ``docs/decisions/0002-chunker.md`` was made so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from casbackup.block.rawfile import RawFile
from casbackup.chunking.block_sample import BlockSampleChunker
from casbackup.codec.codec import PLAIN
from casbackup.codec.hashing import PUBLIC_KEYS
from casbackup.ids import BlobId
from casbackup.jobs.segments import DeviceSegments
from casbackup.limits import SEGMENT_BYTES
from casbackup.spec.config import ChunkerConfig
from casbackup.spec.node import Extent, zero_extent
from casbackup.spec.record import BlobKind
from casbackup.tree.builder import leaf_bytes

INDEX_BYTES = 150
"""Of the index for each blob, with LMDB's own overhead."""


@dataclass
class Outcome:
    """Of all images with one set of parameters. The lists have an item for each compression level."""

    levels: Sequence[int]
    chunks: int = 0
    nodes: int = 0
    cut_s: float = 0.0
    stored_bytes: list[int] = field(default_factory=list)
    compress_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stored_bytes = [0 for _ in self.levels]
        self.compress_s = [0.0 for _ in self.levels]

    def add(self, kind: BlobKind, identity: BlobId, plain: memoryview | bytes) -> None:
        for number, level in enumerate(self.levels):
            started_s = time.process_time()
            record = PLAIN.encode(kind, identity, plain, level)
            self.compress_s[number] += time.process_time() - started_s
            self.stored_bytes[number] += record.total_bytes + INDEX_BYTES


def segments(image: str) -> Iterator[tuple[bytearray, int]]:
    """A buffer that is used again, and how much of it counts."""
    buffer = bytearray(SEGMENT_BYTES)
    with RawFile.open(image) as device:
        source = DeviceSegments(device)
        while (filled := source.fill(memoryview(buffer))) is not None:
            yield buffer, filled.length


def measure(images: Sequence[str], config: ChunkerConfig, levels: Sequence[int]) -> Outcome:
    """Store all images into one imaginary repository."""
    chunker = BlockSampleChunker(config)
    outcome = Outcome(levels)
    known: set[BlobId] = set()
    for image in images:
        for buffer, length in segments(image):
            _store(chunker, buffer, length, known, outcome)
    return outcome


def _store(chunker: BlockSampleChunker, buffer: bytearray, length: int, known: set[BlobId], outcome: Outcome) -> None:
    started_s = time.process_time()
    spans = chunker.spans(buffer, length)
    outcome.cut_s += time.process_time() - started_s
    view = memoryview(buffer)
    extents: list[Extent] = []
    for span in spans:
        if span.is_zero:
            extents.append(zero_extent(span.length))
            continue
        plain = view[span.offset : span.offset + span.length]
        chunk = BlobId(blake3(plain, key=PUBLIC_KEYS.chunk).digest())
        extents.append(Extent(span.length, 0, chunk))
        if chunk not in known:
            known.add(chunk)
            outcome.chunks += 1
            outcome.add(BlobKind.CHUNK, chunk, plain)
    node = leaf_bytes(extents)
    if node is not None and (leaf := PUBLIC_KEYS.id(BlobKind.NODE, node)) not in known:
        known.add(leaf)
        outcome.nodes += 1
        outcome.add(BlobKind.NODE, leaf, node)


def table(rows: Sequence[tuple[ChunkerConfig, Outcome]], levels: Sequence[int]) -> str:
    titles = ["cuts", "blocks", "chunks", "leaves", "cutting s"]
    titles += [f"zstd-{level} {unit}" for level in levels for unit in ("MB", "s")]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for config, outcome in rows:
        cells = [f"{config.cuts_in_256}/256", f"{config.min_blocks}-{config.max_blocks}"]
        cells += [f"{outcome.chunks:,}", f"{outcome.nodes:,}", f"{outcome.cut_s:.2f}"]
        for stored, seconds in zip(outcome.stored_bytes, outcome.compress_s, strict=True):
            cells += [f"{stored / 1e6:.1f}", f"{seconds:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    default = ChunkerConfig()
    parser = argparse.ArgumentParser(description="How well do these disks deduplicate?")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="raw images, in order of their backups")
    parser.add_argument("--cuts", type=int, nargs="+", default=[default.cuts_in_256], metavar="N")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--min-blocks", type=int, default=default.min_blocks, metavar="N")
    parser.add_argument("--max-blocks", type=int, default=default.max_blocks, metavar="N")
    given = parser.parse_args()
    rows: list[tuple[ChunkerConfig, Outcome]] = []
    for cuts in given.cuts:
        config = ChunkerConfig(cuts_in_256=cuts, min_blocks=given.min_blocks, max_blocks=given.max_blocks)
        rows.append((config, measure(given.images, config, given.levels)))
    print(table(rows, given.levels))


if __name__ == "__main__":
    main()
