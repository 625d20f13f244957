"""What verify and salvage report: one finding for each thing that is wrong or odd, with where it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Severity(Enum):
    """``ERROR``: data is lost or wrong, or a strict reader refuses the archive. ``WARNING``: it is readable, but not
    as its writer should have written it, or something in it is ignored.
    """

    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, as exactly located as can be told; what does not apply is None."""

    severity: Severity
    code: str
    """Stable, for scripts: ``extent-checksum``, ``missing-data`` …; each format documents its own."""
    text: str
    """For people: a sentence without the place, which the other fields have."""
    archive_offset: int | None = None
    """Byte of the (decompressed) archive."""
    disk: str | None = None
    """Name of the disk as the archive has it: make it printable before showing it."""
    device_id: int | None = None
    cluster: int | None = None
    """In the format's own units (VMA: 64 KiB)."""
    disk_offset: int | None = None
    length: int | None = None
    """``length`` bytes from ``disk_offset`` of the disk are concerned; without that, of the archive."""

    @property
    def is_error(self) -> bool:
        return self.severity is Severity.ERROR
