"""The writer as a plugin: what its options choose."""

from __future__ import annotations

from collections.abc import Sequence

from casbackup.errors import ArchiveUnsupported
from casbackup.formats.deflate import FASTEST, LEVELS
from casbackup.formats.options import chosen, whole_number
from casbackup.formats.port import ArchiveHead, ArchiveOutput, ByteRange, ByteTarget, Order, WriterCapabilities
from casbackup.formats.qcow2.compressed import CompressedOutput
from casbackup.formats.qcow2.compression import ZSTD_LEVELS, Compress, deflater, zstd_compressor
from casbackup.formats.qcow2.layout import ZLIB, ZSTD
from casbackup.formats.qcow2.writer import CLUSTER_BYTES, StreamedOutput
from casbackup.formats.single import check_single_disk
from casbackup.limits import MAX_QCOW2_DISK_BYTES

_DEFAULT_LEVELS = {"none": 0, "zlib": FASTEST, "zstd": 3}


class Qcow2Writer:
    """``compression``: ``none``, ``zlib`` or ``zstd``. Uncompressed images stream, in the order of the disk;
    compressed ones need a file and take any order.
    """

    def __init__(self, compression: object = "none", level: object = None) -> None:
        """:raise UsageError: for values that there are not."""
        self._compression = chosen("compression", compression, ("none", "zlib", "zstd"))
        levels = ZSTD_LEVELS if self._compression == "zstd" else LEVELS
        default = _DEFAULT_LEVELS[self._compression]
        self._level = default if level is None else whole_number("level", level, levels)
        compressed = self._compression != "none"
        self.capabilities = WriterCapabilities(
            streams=not compressed,
            order=Order.ANY if compressed else Order.ASCENDING,
            needs_map=not compressed,
            unit_bytes=CLUSTER_BYTES,
            max_disks=1,
            configs=False,
        )

    def check(self, head: ArchiveHead) -> None:
        check_single_disk(head, "qcow2", MAX_QCOW2_DISK_BYTES)

    def open(
        self, target: ByteTarget, head: ArchiveHead, maps: Sequence[Sequence[ByteRange]] | None = None
    ) -> ArchiveOutput:
        """:raise ArchiveUnsupported: for a compressed image to a pipe."""
        self.check(head)
        if self._compression != "none":
            if not target.seekable:
                raise ArchiveUnsupported("a compressed qcow2 image is written to a file only, not to a pipe")
            compression, compress = self._codec()
            return CompressedOutput(target, head, compression, compress)
        if maps is None:
            raise ValueError("an uncompressed qcow2 image is written with a map of its disk")
        return StreamedOutput(target, head, maps[0])

    def _codec(self) -> tuple[int, Compress]:
        if self._compression == "zstd":
            return ZSTD, zstd_compressor(self._level)
        return ZLIB, deflater(self._level)
