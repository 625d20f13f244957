"""The archives that Proxmox VE writes and restores: ``vzdump``, ``qmrestore`` (``docs/spec/vma.md``)."""

from __future__ import annotations

from casbackup.formats.port import ArchiveFormat
from casbackup.formats.vma.reader import VmaReader
from casbackup.formats.vma.salvage import VmaSalvager
from casbackup.formats.vma.verify import VmaVerifier
from casbackup.formats.vma.writer import VmaWriter
from casbackup.spec.vma import MAGIC

FORMAT = ArchiveFormat(
    name="vma",
    summary="Proxmox VE backup (vzdump)",
    suffixes=(".vma",),
    verifier=VmaVerifier,
    salvager=VmaSalvager,
    recognises=lambda first_bytes: first_bytes.startswith(MAGIC),
    reader=VmaReader,
    writer=VmaWriter,
)
