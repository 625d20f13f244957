"""qcow2, the image format of QEMU (``docs/spec/qcow2.md``)."""

from __future__ import annotations

from casbackup.formats.port import ArchiveFormat
from casbackup.formats.qcow2.layout import MAGIC
from casbackup.formats.qcow2.options import Qcow2Writer
from casbackup.formats.qcow2.reader import Qcow2Reader
from casbackup.formats.tolerant import TolerantSalvager, TolerantVerifier

FORMAT = ArchiveFormat(
    name="qcow2",
    summary="an image of QEMU, one disk",
    suffixes=(".qcow2",),
    recognises=lambda beginning: beginning.startswith(MAGIC),
    reader=Qcow2Reader,
    writer=Qcow2Writer,
    verifier=lambda: TolerantVerifier(Qcow2Reader().open),
    salvager=lambda: TolerantSalvager(Qcow2Reader().open),
    options=(
        ("compression", "none (default), zlib or zstd; compressed images cannot be written to a pipe"),
        ("level", "of the compression: 1 (default, fast) to 9 for zlib, 1 to 19 for zstd (default 3)"),
    ),
)
