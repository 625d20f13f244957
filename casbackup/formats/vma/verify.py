"""Looking for all that is wrong with a VMA archive.

Errors are what the reference program's ``extract`` refuses, and more; warnings are oddities that it overlooks. The
codes are listed in ``docs/spec/vma.md``. Data has no checksum in this format, so a flipped bit in it is not found.
"""

from __future__ import annotations

from collections.abc import Iterator

from casbackup.formats.coverage import Coverage
from casbackup.formats.findings import Finding, Severity
from casbackup.formats.port import ByteSource
from casbackup.formats.vma.extent import (
    Extent,
    Piece,
    Place,
    cluster_of,
    device_of,
    mask_of,
    pieces_of,
    slot_problem,
)
from casbackup.formats.vma.header import head_of, listed_devices
from casbackup.formats.vma.reader import places_of
from casbackup.formats.vma.walk import SECOND_ARCHIVE, Found, Opening, opening, walk
from casbackup.formats.vma.window import Window
from casbackup.formats.zeros import is_zero, nonzero_blocks
from casbackup.spec import vma

_DEVICE_AND_CLUSTER = (1 << 40) - 1


class VmaVerifier:
    """``quick`` reads headers only, and seeks over the data of a file."""

    def findings(self, source: ByteSource, *, quick: bool = False) -> Iterator[Finding]:
        """See ``ArchiveVerifier``."""
        return _Verification(source, quick=quick).run()


class _Verification:
    def __init__(self, source: ByteSource, *, quick: bool) -> None:
        self._window = Window(source)
        self._quick = quick
        self._names: dict[int, str] = {}
        self._places: dict[int, Place] = {}
        self._knows_devices = False
        self._coverage: dict[int, Coverage] = {}
        self._foreign = set[bytes]()
        self._next_state_cluster = 0

    def run(self) -> Iterator[Finding]:
        begin = opening(self._window)
        yield from self._opening(begin)
        for item in walk(self._window, begin.extents_at, begin.uuids, whole=not self._quick):
            if isinstance(item, Found):
                yield from self._extent(item, begin)
                continue
            if item.code == SECOND_ARCHIVE:
                yield _error(item.code, f"{item.text}; it was not looked at", item.offset)
                break
            yield _error(item.code, f"{item.text} ({item.length} bytes)", item.offset)
        if self._window.damage is not None:
            yield _error("source-damaged", str(self._window.damage), self._window.end)
        yield from self._missing()

    def _opening(self, begin: Opening) -> Iterator[Finding]:
        yield from (problem.finding for problem in begin.problems)
        if begin.header is None:
            return
        self._knows_devices = True
        head = head_of(begin.header, listed_devices(begin.header))
        self._places = places_of(head)
        self._names = {disk.device_id: disk.name for disk in head.disks if disk.device_id is not None}

    # --- extents

    def _extent(self, found: Found, begin: Opening) -> Iterator[Finding]:
        extent, offset = found.extent, found.offset
        if found.mended_at is not None:
            text = f"the checksum of an extent's header is wrong: byte {found.mended_at} of it is wrong"
            yield _error("extent-checksum", text, offset)
        if begin.header is not None and extent.uuid != begin.header.uuid:
            yield from self._foreign_extent(extent, offset)
            return
        if extent.block_count != extent.mask_blocks:
            text = f"an extent says it has {extent.block_count} blocks; its clusters have {extent.mask_blocks}"
            yield _error("extent-blocks", text, offset)
        if not found.is_whole:
            yield from self._short_extent(found)
        yield from self._slots(found)
        if not self._quick:
            yield from self._data(found)

    def _foreign_extent(self, extent: Extent, offset: int) -> Iterator[Finding]:
        """Told once for each archive that it may belong to: there may be thousands."""
        if extent.uuid not in self._foreign:
            self._foreign.add(extent.uuid)
            yield _error("extent-uuid", f"an extent of another archive, {extent.uuid.hex()}, is here", offset)

    def _short_extent(self, found: Found) -> Iterator[Finding]:
        needed = found.extent.mask_blocks * vma.BLOCK_BYTES
        text = f"an extent has {found.data_bytes} of its {needed} bytes of data"
        if found.is_shifted:
            yield _error("extent-short", f"{text}: bytes were lost, and those behind them are shifted", found.offset)
        else:
            yield _error("extent-truncated", text, found.offset)

    def _slots(self, found: Found) -> Iterator[Finding]:
        """Where the clusters lie. Those whose data is not all there, or shifted, do not count as being there."""
        position = 0
        sound_bytes = 0 if found.is_shifted else found.data_bytes
        sound = list[int]()
        for slot in found.extent.slots:
            position += (slot >> 48).bit_count() * vma.BLOCK_BYTES
            place = self._places.get(slot >> 32 & 0xFF)
            if slot >> 40 & 0xFF:
                yield self._at("slot-reserved", "a reserved byte of a cluster is set", found, slot, Severity.WARNING)
            problem = slot_problem(slot, place) if self._knows_devices else None
            if problem is not None:
                yield self._at(*problem, found, slot)
            elif place is not None and place.is_state:
                yield from self._state_slot(found, slot)
            elif position <= sound_bytes or mask_of(slot) == 0:
                sound.append(slot & _DEVICE_AND_CLUSTER)
        yield from self._count(found, sound)

    def _count(self, found: Found, clusters: list[int]) -> Iterator[Finding]:
        """Enter clusters, given as slots without mask, into the coverage, those that follow each other at once."""
        start = 0
        for end in range(1, len(clusters) + 1):
            if end < len(clusters) and clusters[end] == clusters[end - 1] + 1:
                continue
            coverage = self._coverage_of(device_of(clusters[start]))
            offset = cluster_of(clusters[start]) * vma.CLUSTER_BYTES
            for known in coverage.add(offset, (end - start) * vma.CLUSTER_BYTES):
                for cluster in range(known.offset // vma.CLUSTER_BYTES, -(-known.end // vma.CLUSTER_BYTES)):
                    slot = vma.slot(0, device_of(clusters[start]), cluster)
                    yield self._at("duplicate-cluster", "a cluster comes a second time", found, slot)
            start = end

    def _coverage_of(self, device: int) -> Coverage:
        """In whole clusters: the last one of a device counts with what is beyond its end."""
        coverage = self._coverage.get(device)
        if coverage is None:
            place = self._places.get(device)
            size = place.size_bytes if place is not None else vma.MAX_DEVICE_BYTES
            coverage = self._coverage[device] = Coverage(-(-size // vma.CLUSTER_BYTES) * vma.CLUSTER_BYTES)
        return coverage

    def _state_slot(self, found: Found, slot: int) -> Iterator[Finding]:
        cluster = cluster_of(slot)
        if cluster != self._next_state_cluster:
            text = f"a cluster of the VM's state comes where {self._next_state_cluster} should"
            yield self._at("state-order", text, found, slot)
        self._next_state_cluster = cluster + 1

    # --- data

    def _data(self, found: Found) -> Iterator[Finding]:
        data = self._window.read(found.offset + vma.EXTENT_BYTES, found.data_bytes)
        yield from self._slack(found, data)
        flags = nonzero_blocks(data)
        if 0 not in flags:
            return
        device_ids = {place.disk: device for device, place in self._places.items() if not place.is_state}
        for piece in pieces_of(found.extent.slots, self._places):
            if piece.start is not None and piece.disk in device_ids:
                yield from self._stored_zeros(found, piece, flags, device_ids[piece.disk])

    def _stored_zeros(self, found: Found, piece: Piece, flags: bytes, device: int) -> Iterator[Finding]:
        """Writers leave zero blocks out, so one that is stored may be data that storage has lost."""
        assert piece.start is not None
        first = piece.start // vma.BLOCK_BYTES
        blocks = flags[first : first - (-piece.length // vma.BLOCK_BYTES)]
        count = blocks.count(0)
        if count == 0:
            return
        place = piece.offset + blocks.index(0) * vma.BLOCK_BYTES
        yield Finding(
            Severity.WARNING,
            "stored-zeros",
            f"{count} blocks from here on are stored although they are zero: they may have been lost",
            found.offset + vma.EXTENT_BYTES + piece.start,
            self._names.get(device),
            device,
            place // vma.CLUSTER_BYTES,
            place,
            piece.offset + piece.length - place,
        )

    def _slack(self, found: Found, data: memoryview) -> Iterator[Finding]:
        """What is stored of a device's last cluster beyond the device's end must be zero."""
        position = 0
        for slot in found.extent.slots:
            place, mask = self._places.get(device_of(slot)), mask_of(slot)
            end = position + mask.bit_count() * vma.BLOCK_BYTES
            if place is not None and not place.is_state:
                cluster, used_bytes = divmod(place.size_bytes, vma.CLUSTER_BYTES)
                if used_bytes and cluster == cluster_of(slot):
                    start = position + _stored_bytes(mask, used_bytes)
                    if not is_zero(data[start:end]):
                        text = "there is data beyond the end of the device"
                        yield self._at("slack", text, found, slot, Severity.WARNING)
            position = end

    # --- the end

    def _missing(self) -> Iterator[Finding]:
        for device, place in self._places.items():
            if place.is_state:
                yield from self._state_length(device, place)
                continue
            for gap in self._coverage_of(device).missing():
                yield Finding(
                    Severity.ERROR,
                    "missing-data",
                    "this range is in no sound extent of the archive",
                    None,
                    self._names[device],
                    device,
                    gap.offset // vma.CLUSTER_BYTES,
                    gap.offset,
                    min(gap.end, place.size_bytes) - gap.offset,
                )

    def _state_length(self, device: int, place: Place) -> Iterator[Finding]:
        clusters = -(-place.size_bytes // vma.CLUSTER_BYTES)
        if self._next_state_cluster != clusters:
            text = f"the VM's state has {self._next_state_cluster} clusters; by its size it should have {clusters}"
            yield Finding(Severity.WARNING, "state-length", text, None, self._names[device], device)

    def _at(self, code: str, text: str, found: Found, slot: int, severity: Severity = Severity.ERROR) -> Finding:
        """A finding about one cluster."""
        device, cluster = device_of(slot), cluster_of(slot)
        offset = cluster * vma.CLUSTER_BYTES
        name = self._names.get(device)
        return Finding(severity, code, text, found.offset, name, device, cluster, offset, vma.CLUSTER_BYTES)


def _error(code: str, text: str, offset: int | None) -> Finding:
    return Finding(Severity.ERROR, code, text, offset)


def _stored_bytes(mask: int, length: int) -> int:
    """How many of the first ``length`` bytes of a cluster are stored."""
    block, rest = divmod(length, vma.BLOCK_BYTES)
    whole = (mask & ((1 << block) - 1)).bit_count() * vma.BLOCK_BYTES
    return whole + (rest if mask >> block & 1 else 0)
