"""Verifying an archive of any format: by the format's own verifier, else by reading all of it."""

from __future__ import annotations

from collections.abc import Iterator

from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats.coverage import ArchiveCoverage
from casbackup.formats.findings import Finding, Severity
from casbackup.formats.port import ArchiveFormat, ArchiveHead, ByteSource


def verify(archive_format: ArchiveFormat, source: ByteSource, *, quick: bool = False) -> Iterator[Finding]:
    """All that is wrong with the archive; nothing if it is sound. See ``ArchiveVerifier``.

    A format without a verifier is read as for an import, so the first contradiction is the last finding; ``quick``
    then reads no more than the head.

    :raise SourceError: when reading fails. :raise ArchiveUnsupported: when the format can only be written.
    """
    if archive_format.verifier is not None:
        return archive_format.verifier().findings(source, quick=quick)
    if archive_format.reader is None:
        raise ArchiveUnsupported(f"archives of format {archive_format.name} can only be written")
    return _by_reading(archive_format, source, quick=quick)


def _by_reading(archive_format: ArchiveFormat, source: ByteSource, *, quick: bool) -> Iterator[Finding]:
    assert archive_format.reader is not None
    try:
        archive = archive_format.reader().open(source)
        coverage = ArchiveCoverage(archive.head)
        if quick:
            return
        for event in archive.events():
            coverage.add(event)
    except ArchiveDamaged as error:
        yield Finding(Severity.ERROR, error.code, str(error), source.tell())
        return
    yield from missing_data(archive.head, coverage)


def missing_data(head: ArchiveHead, coverage: ArchiveCoverage) -> Iterator[Finding]:
    """A finding for each range that has not come."""
    for number, gap in coverage.missing():
        disk = head.disks[number]
        yield Finding(
            Severity.ERROR,
            "missing-data",
            "this range is nowhere in the archive",
            disk=disk.name,
            device_id=disk.device_id,
            disk_offset=gap.offset,
            length=gap.length,
        )
