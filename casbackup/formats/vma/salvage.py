"""Rescuing what is intact of a damaged VMA archive.

First pass: find all extents, by their headers; learn the archive's uuid and devices. Second pass: read their data.
Extents that can be trusted less come last, and give only what no other one gave: those whose uuid was changed, and
those of whose data some bytes are lost, so that what comes behind is shifted.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat

from casbackup.errors import ArchiveDamaged, ArchiveUnsupported, SourceUnreadable
from casbackup.formats.coverage import Coverage
from casbackup.formats.findings import Finding, Severity
from casbackup.formats.port import ArchiveHead, ByteRange, ByteSource, Data, Event, Zeros
from casbackup.formats.vma.extent import (
    Extent,
    Piece,
    cluster_of,
    device_of,
    event_of,
    parse_extent,
    pieces_of,
    slot_problem,
)
from casbackup.formats.vma.header import Device, Header, examine_header, head_of
from casbackup.formats.vma.mend import mended_extent, mended_header
from casbackup.formats.vma.reader import places_of
from casbackup.formats.vma.walk import SECOND_ARCHIVE, Found, Lost, Opening, Uuids, looks_like_header, opening, walk
from casbackup.formats.vma.window import Window
from casbackup.spec import vma
from casbackup.units import KiB

_MAX_MENDED_BYTES = 64 * KiB
"""Headers up to this size are put right by trying each of their bits; that takes seconds for larger ones."""


class VmaSalvager:
    """Needs a file, because it reads the archive twice."""

    def open(self, source: ByteSource) -> VmaSalvage:
        """See ``ArchiveSalvager``."""
        if not source.seekable:
            raise ArchiveUnsupported(f"{source.name}: salvage reads the archive twice; it needs a file, not a pipe")
        return VmaSalvage(source)


class VmaSalvage:
    def __init__(self, source: ByteSource) -> None:
        self._window = Window(source)
        self._findings: list[Finding] = []
        begin = self._opening()
        self._uuid = self._archive_uuid(begin)
        self._good, self._doubtful = array("Q"), array("Q")
        self._short: dict[int, int] = {}
        self._highest = [-1] * vma.DEVICE_SLOTS
        self._collect(begin)
        if begin.header is None and not self._good:
            raise ArchiveDamaged(f"{source.name}: there is nothing of a VMA archive in it that could be rescued")
        self._head = self._rebuilt_head(begin)
        self._places = places_of(self._head)
        self._coverage = [Coverage(disk.size_bytes) for disk in self._head.disks]

    @property
    def head(self) -> ArchiveHead:
        """The header's, as far as that is sound. Without one the disks are called disk1 … by their ids, and end with
        the last cluster that was found.
        """
        return self._head

    def findings(self) -> Sequence[Finding]:
        """See ``SalvagedArchive``."""
        return self._findings

    def events(self) -> Iterator[Event]:
        """See ``SalvagedArchive``. What is lost is not given, except of a VM's state, where it is given as zeros."""
        state = _State(self._head)
        for offset, is_doubtful in chain(zip(self._good, repeat(False)), zip(self._doubtful, repeat(True))):
            for event in self._events_of(offset, is_shifted=is_doubtful and offset in self._short):
                yield from state.in_order(event)
        yield from state.rest()
        self._note_missing(state)

    # --- the first pass

    def _opening(self) -> Opening:
        begin = opening(self._window)
        if not begin.has_checksum and looks_like_header(begin.data):
            right = self._mended_opening(begin)
            if right is not None:
                return right
        self._findings += [problem.finding for problem in begin.problems]
        return begin

    def _mended_opening(self, begin: Opening) -> Opening | None:
        """With what can be put right in the header put right."""
        size = vma.HEADER.unpack_from(begin.data)[-1] if len(begin.data) >= vma.FIXED_BYTES else 0
        for length in dict.fromkeys((size, begin.extents_at)):
            if vma.FIXED_BYTES < length <= min(_MAX_MENDED_BYTES, len(begin.data)):
                right = mended_header(begin.data[:length])
                if right is not None:
                    text = f"the checksum of the header is wrong: byte {right.place} of it was wrong"
                    self._note("header-checksum", text, right.place)
                    header, problems = examine_header(right.header)
                    return Opening(header, tuple(problems), right.header, length)
        return None

    def _archive_uuid(self, begin: Opening) -> bytes | None:
        """The header's if any extent has it, else that of most extents; None: there is no extent."""
        header_uuid = begin.header.uuid if begin.header is not None else None
        if header_uuid is not None and header_uuid in self._count_uuids(begin, {header_uuid}):
            return header_uuid
        counts = self._count_uuids(begin, None)
        if not counts:
            return header_uuid
        most = counts.most_common(1)[0][0]
        if header_uuid is not None:
            self._note("extent-uuid", f"the extents have another uuid than the header: {most.hex()}", 8)
        return most

    def _count_uuids(self, begin: Opening, uuids: Uuids) -> Counter[bytes]:
        counts = Counter[bytes]()
        for item in walk(self._window, begin.extents_at, uuids, whole=False):
            if isinstance(item, Found):
                counts[item.extent.uuid] += 1
            elif item.code == SECOND_ARCHIVE:
                break
        return counts

    def _collect(self, begin: Opening) -> None:
        """Find all extents, note what is wrong with the archive, and learn how large its devices are at least."""
        changed = list[Found]()
        is_first_archive = True
        for item in walk(self._window, begin.extents_at, {self._uuid} if self._uuid else None, whole=False):
            if isinstance(item, Lost):
                self._note(item.code, f"{item.text} ({item.length} bytes)", item.offset)
                is_first_archive &= item.code != SECOND_ARCHIVE
            elif item.extent.uuid == self._uuid:
                # Extents of another uuid before this one were changed; behind the last one they may be of another
                # archive that was appended, and are left out.
                for found in changed:
                    self._take(found, is_good=False)
                changed = []
                self._take(item, is_good=not item.is_shifted)
            else:
                self._note("extent-uuid", f"an extent has another uuid: {item.extent.uuid.hex()}", item.offset)
                if is_first_archive:
                    changed.append(item)
        if self._window.damage is not None:
            self._note("source-damaged", str(self._window.damage), self._window.end)

    def _take(self, found: Found, *, is_good: bool) -> None:
        extent, offset = found.extent, found.offset
        (self._good if is_good else self._doubtful).append(offset)
        for slot in extent.slots:
            device = device_of(slot)
            self._highest[device] = max(self._highest[device], cluster_of(slot))
        if found.mended_at is not None:
            text = f"the checksum of an extent's header is wrong: byte {found.mended_at} of it was wrong"
            self._note("extent-checksum", text, offset)
        if extent.block_count != extent.mask_blocks:
            self._note("extent-blocks", "an extent has another number of blocks than its clusters", offset)
        if not found.is_whole:
            self._short[offset] = found.data_bytes
            needed = extent.mask_blocks * vma.BLOCK_BYTES
            code = "extent-short" if found.is_shifted else "extent-truncated"
            self._note(code, f"an extent has {found.data_bytes} of its {needed} bytes of data", offset)

    # --- the head

    def _rebuilt_head(self, begin: Opening) -> ArchiveHead:
        header = begin.header
        if header is None:
            header = Header(self._uuid or bytes(16), 0, 0, (), ())
        is_trusted = begin.has_checksum
        devices = [d for known in header.devices if (d := self._plausible(known, is_trusted=is_trusted)) is not None]
        if not is_trusted:
            known_ids = {device.device_id for device in devices}
            devices += [self._unnamed(i) for i in self._seen_devices() if i not in known_ids]
        head = head_of(header, sorted(devices))
        return replace(head, uuid=self._uuid, time_s=head.time_s if begin.header is not None else None)

    def _plausible(self, device: Device, *, is_trusted: bool) -> Device | None:
        """With a size that holds all clusters that were found, if the header's cannot be right."""
        least = self._highest[device.device_id] * vma.CLUSTER_BYTES
        if device.size_bytes <= vma.MAX_DEVICE_BYTES and (is_trusted or least < device.size_bytes):
            return device
        if least < 0:
            return None
        self._note("device-size", f"the size of device {device.device_id} was derived from its last cluster", None)
        return device._replace(size_bytes=least + vma.CLUSTER_BYTES)

    def _seen_devices(self) -> Iterator[int]:
        return (device for device, cluster in enumerate(self._highest) if cluster >= 0)

    def _unnamed(self, device_id: int) -> Device:
        self._note("device-slot", f"device {device_id} is not in the header; its last cluster tells its size", None)
        size = (self._highest[device_id] + 1) * vma.CLUSTER_BYTES
        return Device(device_id, f"disk{device_id}".encode(), size)

    # --- the second pass

    def _events_of(self, offset: int, *, is_shifted: bool) -> Iterator[Event]:
        extent = self._extent_at(offset)
        length = self._short.get(offset, extent.mask_blocks * vma.BLOCK_BYTES)
        for slot in extent.slots:
            problem = slot_problem(slot, self._places.get(device_of(slot)))
            if problem is not None:
                self._note(problem[0], f"{problem[1]} (cluster {cluster_of(slot)})", offset, device_of(slot))
        data = self._window.read(offset + vma.EXTENT_BYTES, length)
        repeated_bytes = 0
        for piece in pieces_of(extent.slots, self._places):
            there = _available(piece, len(data))
            repeated_bytes += there.length
            for part in self._fresh(there):
                repeated_bytes -= part.length
                if is_shifted and part.start is not None:
                    self._note_range("shifted-data", "bytes were lost; this may be shifted", part, offset)
                yield event_of(part, data)
        if repeated_bytes:
            text = f"{repeated_bytes} bytes of disks come a second time; those that came first were taken"
            self._findings.append(Finding(Severity.WARNING, "duplicate-cluster", text, offset))

    def _extent_at(self, offset: int) -> Extent:
        header = self._window.read(offset, vma.EXTENT_BYTES)
        extent = parse_extent(header)
        if isinstance(extent, str) and self._uuid is not None:
            right = mended_extent(bytes(header), self._uuid)
            extent = parse_extent(memoryview(right.header)) if right is not None else extent
        if isinstance(extent, str):
            raise SourceUnreadable(f"the archive changed while it was read: byte {offset}: {extent}")
        return extent

    def _fresh(self, piece: Piece) -> Iterator[Piece]:
        """What of it has not been given before."""
        if piece.length <= 0:
            return
        before = self._coverage[piece.disk].add(piece.offset, piece.length)
        position, end = piece.offset, piece.offset + piece.length
        for known in (*sorted(before), ByteRange(end, 0)):
            if known.offset > position:
                start = piece.start + position - piece.offset if piece.start is not None else None
                yield Piece(piece.disk, position, known.offset - position, start)
            position = max(position, known.end)

    # --- findings

    def _note(self, code: str, text: str, offset: int | None, device_id: int | None = None) -> None:
        self._findings.append(Finding(Severity.ERROR, code, text, offset, None, device_id))

    def _note_range(self, code: str, text: str, piece: Piece, archive_offset: int | None = None) -> None:
        disk = self._head.disks[piece.disk]
        cluster = piece.offset // vma.CLUSTER_BYTES
        self._findings.append(
            Finding(
                Severity.ERROR,
                code,
                text,
                archive_offset,
                disk.name,
                disk.device_id,
                cluster,
                piece.offset,
                piece.length,
            )
        )

    def _note_missing(self, state: _State) -> None:
        for number, coverage in enumerate(self._coverage):
            gaps = state.gaps if number == state.disk else coverage.missing()
            for gap in gaps:
                self._note_range("missing-data", "this range is lost", Piece(number, gap.offset, gap.length, None))


class _State:
    """Keeps the events of a VM's state in order: gaps become zeros, and what comes too late is left out."""

    def __init__(self, head: ArchiveHead) -> None:
        self.disk = next((number for number, disk in enumerate(head.disks) if disk.is_vmstate), None)
        self.gaps: list[ByteRange] = []
        self._size = head.disks[self.disk].size_bytes if self.disk is not None else 0
        self._position = 0

    def in_order(self, event: Event) -> Iterator[Event]:
        if event.disk == self.disk:
            if event.offset < self._position:
                return
            yield from self._zeros_until(event.offset)
            self._position += len(event.data) if isinstance(event, Data) else event.length
        yield event

    def rest(self) -> Iterator[Event]:
        return self._zeros_until(self._size)

    def _zeros_until(self, offset: int) -> Iterator[Event]:
        if self.disk is not None and offset > self._position:
            gap = ByteRange(self._position, offset - self._position)
            self.gaps.append(gap)
            self._position = offset
            yield Zeros(self.disk, *gap)


def _available(piece: Piece, data_bytes: int) -> Piece:
    """Without the blocks whose data is not there."""
    if piece.start is None or piece.start + piece.length <= data_bytes:
        return piece
    whole = max(data_bytes - piece.start, 0) // vma.BLOCK_BYTES * vma.BLOCK_BYTES
    return piece._replace(length=min(piece.length, whole))
