"""Reading on behind damage: verify and salvage for formats whose readers can tell what was hit and go on.

Such a reader takes a function that it calls with each damage. For an import that function raises; here it collects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats.findings import Finding, Severity
from casbackup.formats.port import Archive, ArchiveHead, ByteRange, ByteSource, Event

OnDamage = Callable[[ArchiveDamaged, int, ByteRange | None], None]
"""Called with what is wrong, at which byte of the archive, and, if that is known, which range of the only disk is lost
by it.
"""

_MAX_PENDING = 10_000
"""Findings that are held; of an image that is full of damage, the rest is not listed."""


class TolerantArchive(Archive, Protocol):
    """What it has told of damage, it does not give as an event. It may still raise when it cannot go on."""

    def check_structures(self) -> None:
        """Look at everything but the data."""


OpenTolerant = Callable[[ByteSource, OnDamage], TolerantArchive]


def raise_damage(error: ArchiveDamaged, at: int, _lost: ByteRange | None) -> None:
    """For who wants all or nothing."""
    raise ArchiveDamaged(f"{error} (at byte {at})") from error


class _Collector:
    """Findings in the order in which they come. Losses that touch are one, with what was said of the first."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self.disk: str | None = None
        self.pending: list[Finding] = []

    def take(self, error: ArchiveDamaged, at: int, lost: ByteRange | None) -> None:
        text = str(error).removeprefix(f"{self._source.name}: ")
        found = Finding(Severity.ERROR, error.code, text, at)
        if lost is not None:
            found = replace(found, disk=self.disk, disk_offset=lost.offset, length=lost.length)
            last = self._last_loss()
            if last is not None and last.end == lost.offset:
                self.pending[-1] = replace(self.pending[-1], length=last.length + lost.length)
                return
        if len(self.pending) == _MAX_PENDING:
            found = Finding(Severity.ERROR, error.code, "there is more damage than is listed", at)
        if len(self.pending) <= _MAX_PENDING:
            self.pending.append(found)

    def take_last(self, error: ArchiveDamaged) -> None:
        """What ended the reading."""
        self.take(error, self._source.tell(), None)

    def _last_loss(self) -> ByteRange | None:
        last = self.pending[-1] if self.pending else None
        if last is None or last.disk_offset is None or last.length is None:
            return None
        return ByteRange(last.disk_offset, last.length)


class TolerantVerifier:
    """``ArchiveVerifier`` by reading on."""

    def __init__(self, open_tolerant: OpenTolerant) -> None:
        self._open = open_tolerant

    def findings(self, source: ByteSource, *, quick: bool = False) -> Iterator[Finding]:
        collector = _Collector(source)
        try:
            archive = self._open(source, collector.take)
            collector.disk = archive.head.disks[0].name
            if quick:
                archive.check_structures()
            else:
                for _event in archive.events():
                    yield from collector.pending[:-1]
                    del collector.pending[:-1]
        except ArchiveDamaged as error:
            collector.take_last(error)
        yield from collector.pending


class TolerantSalvager:
    """``ArchiveSalvager`` by reading on."""

    def __init__(self, open_tolerant: OpenTolerant) -> None:
        self._open = open_tolerant

    def open(self, source: ByteSource) -> TolerantSalvage:
        """:raise ArchiveUnsupported: for a pipe. :raise ArchiveDamaged: when the head is gone."""
        if not source.seekable:
            raise ArchiveUnsupported(f"{source.name}: what is damaged is rescued from a file, not from a pipe")
        collector = _Collector(source)
        archive = self._open(source, collector.take)
        collector.disk = archive.head.disks[0].name
        return TolerantSalvage(archive, collector)


class TolerantSalvage:
    """``SalvagedArchive``."""

    def __init__(self, archive: TolerantArchive, collector: _Collector) -> None:
        self._archive = archive
        self._collector = collector

    @property
    def head(self) -> ArchiveHead:
        return self._archive.head

    def events(self) -> Iterator[Event]:
        try:
            yield from self._archive.events()
        except ArchiveDamaged as error:
            self._collector.take_last(error)

    def findings(self) -> Sequence[Finding]:
        return tuple(self._collector.pending)
