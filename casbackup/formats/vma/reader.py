"""Reading a VMA archive in one pass, from a file or a pipe.

As strict as the reference program's ``extract``, and stricter in this: clusters beyond the end of a device are an
error even if they are zero. Clusters that come twice or never are the consumer's to find, as for every format.
"""

from __future__ import annotations

from collections.abc import Iterator

from casbackup.buffers import aligned_buffer
from casbackup.errors import ArchiveDamaged
from casbackup.formats.port import ArchiveHead, ByteSource, Event, Order, ReaderCapabilities, Zeros
from casbackup.formats.vma.extent import (
    Extent,
    Place,
    cluster_of,
    device_of,
    event_of,
    parse_extent,
    pieces_of,
    slot_problem,
)
from casbackup.formats.vma.header import Header, head_of, listed_devices, read_header
from casbackup.spec import vma


class VmaReader:
    """Reads archives of version 1."""

    @property
    def capabilities(self) -> ReaderCapabilities:
        return ReaderCapabilities(streams=True, order=Order.ANY)

    def open(self, source: ByteSource) -> VmaArchive:
        """See ``ArchiveReader``. The source must be at the archive's beginning."""
        return VmaArchive(source, read_header(source))


class VmaArchive:
    def __init__(self, source: ByteSource, header: Header) -> None:
        self._source = source
        self._head = head_of(header, listed_devices(header))
        self._uuid = header.uuid
        self._offset = header.header_bytes
        self._places = places_of(self._head)
        self._state_cluster = 0

    @property
    def head(self) -> ArchiveHead:
        return self._head

    def events(self) -> Iterator[Event]:
        """See ``Archive``. What lies next to each other in an extent is one event of up to 59 clusters."""
        header = memoryview(bytearray(vma.EXTENT_BYTES))
        buffer = memoryview(aligned_buffer(vma.MAX_EXTENT_BLOCKS * vma.BLOCK_BYTES))
        while (got := self._source.read_into(header)) > 0:
            if got < vma.EXTENT_BYTES:
                raise self._damaged(f"the archive ends within an extent's header, after {got} bytes")
            extent = self._checked(header)
            length = extent.block_count * vma.BLOCK_BYTES
            got = self._source.read_into(buffer[:length])
            if got < length:
                raise self._damaged(f"the archive ends within an extent, after {got} of {length} bytes of data")
            for piece in pieces_of(extent.slots, self._places):
                yield event_of(piece, buffer)
            self._offset += vma.EXTENT_BYTES + length
        yield from self._rest_of_state()

    def _checked(self, header: memoryview) -> Extent:
        extent = parse_extent(header)
        if isinstance(extent, str):
            raise self._damaged(extent)
        if extent.uuid != self._uuid:
            raise self._damaged(f"an extent of another archive, {extent.uuid.hex()}, is here")
        stored = extent.mask_blocks
        if extent.block_count != stored:
            raise self._damaged(f"an extent has {extent.block_count} blocks, its clusters {stored}")
        for slot in extent.slots:
            place = self._places.get(device_of(slot))
            problem = slot_problem(slot, place)
            if problem is not None:
                raise self._damaged(f"{problem[1]} (device {device_of(slot)}, cluster {cluster_of(slot)})")
            if place is not None and place.is_state:
                self._count_state(cluster_of(slot))
        return extent

    def _count_state(self, cluster: int) -> None:
        if cluster != self._state_cluster:
            raise self._damaged(f"cluster {cluster} of the VM's state comes where {self._state_cluster} should")
        self._state_cluster += 1

    def _rest_of_state(self) -> Iterator[Event]:
        """A state may be shorter than its size says; then its end is zero."""
        for place in self._places.values():
            done = self._state_cluster * vma.CLUSTER_BYTES
            if place.is_state and done < place.size_bytes:
                yield Zeros(place.disk, done, place.size_bytes - done)

    def _damaged(self, text: str) -> ArchiveDamaged:
        return ArchiveDamaged(f"{self._source.name}: byte {self._offset}: {text}")


def places_of(head: ArchiveHead) -> dict[int, Place]:
    """By device id, which every disk of the head has."""
    return {
        disk.device_id: Place(number, disk.size_bytes, disk.is_vmstate)
        for number, disk in enumerate(head.disks)
        if disk.device_id is not None
    }
