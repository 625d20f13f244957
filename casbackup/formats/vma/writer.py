"""Writing a VMA archive, front to back.

The bytes depend on nothing but the head and the events. Extents are full (58 clusters, as the reference program
writes) unless data of half a megabyte or more would have to be copied for that: large pieces of data are written
from where they lie, small ones are gathered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import md5
from struct import Struct
from typing import NamedTuple

from casbackup.errors import ArchiveIncomplete, ArchiveLimit, ArchiveUnsupported
from casbackup.formats.port import (
    ArchiveConfig,
    ArchiveDisk,
    ArchiveHead,
    ByteRange,
    ByteTarget,
    Order,
    WriterCapabilities,
)
from casbackup.formats.vma.header import Device, blob_buffer_bytes, encode_header
from casbackup.formats.zeros import ZEROS, nonzero_blocks
from casbackup.fs import Buffer
from casbackup.spec import vma
from casbackup.units import KiB, MiB

_COPY_BYTES = 512 * KiB
"""Less than this is copied so that the extent can be filled."""

_QUEUE_BYTES = MiB
"""Extents without lent data are written when they are this much."""

_STORED_RUN = re.compile(b"\1+")
_BITS = bytes([ord("0"), ord("1")]) + bytes(254)


class VmaWriter:
    """Writes archives as the reference program reads them."""

    @property
    def capabilities(self) -> WriterCapabilities:
        return WriterCapabilities(
            streams=True,
            order=Order.ANY,
            needs_map=False,
            unit_bytes=vma.CLUSTER_BYTES,
            max_disks=vma.MAX_DEVICES,
            configs=True,
            vmstate=True,
        )

    def check(self, head: ArchiveHead) -> None:
        """See ``ArchiveWriter``."""
        if len(head.disks) > vma.MAX_DEVICES:
            raise ArchiveLimit(f"{len(head.disks)} disks; a VMA archive holds {vma.MAX_DEVICES}")
        if len(head.configs) > vma.CONFIGS:
            raise ArchiveLimit(f"{len(head.configs)} configs; a VMA archive holds {vma.CONFIGS}")
        if head.time_s is not None and not -(1 << 63) <= head.time_s < 1 << 63:
            raise ArchiveLimit(f"the time {head.time_s} has more than 64 bits")
        for disk in head.disks:
            _check_disk(disk)
        for config in head.configs:
            _check_config(config)
        _check_distinct("disks", [_device_name(disk) for disk in head.disks])
        _check_distinct("configs", [config.name for config in head.configs])
        _check_header_size(head)

    def open(
        self, target: ByteTarget, head: ArchiveHead, maps: Sequence[Sequence[ByteRange]] | None = None
    ) -> VmaOutput:
        """See ``ArchiveWriter``."""
        self.check(head)
        devices = _assigned_devices(head.disks)
        configs = [(_encoded(config.name), config.content) for config in head.configs]
        time_s = head.time_s or 0
        uuid = head.uuid or _derived_uuid(time_s, devices, configs)
        target.write([encode_header(uuid, time_s, devices, configs)])
        return VmaOutput(target, uuid, [_Disk.of(d, device) for d, device in zip(head.disks, devices, strict=True)])


# --- the head


def _check_disk(disk: ArchiveDisk) -> None:
    _check_name("disk", disk.name)
    if disk.name == vma.STATE_NAME and not disk.is_vmstate:
        raise ArchiveLimit(f"a disk cannot have the name {vma.STATE_NAME}: in a VMA archive that is the VM's state")
    if disk.size_bytes <= 0:
        raise ArchiveLimit(f"disk {disk.name!r} is empty; a VMA archive cannot hold that")
    if disk.size_bytes > vma.MAX_DEVICE_BYTES:
        raise ArchiveLimit(f"disk {disk.name!r} has {disk.size_bytes} bytes, more than {vma.MAX_DEVICE_BYTES}")


def _check_config(config: ArchiveConfig) -> None:
    _check_name("config", config.name)
    if len(config.content) > vma.MAX_BLOB_BYTES:
        raise ArchiveLimit(f"config {config.name!r} has {len(config.content)} bytes, more than {vma.MAX_BLOB_BYTES}")


def _check_name(what: str, name: str) -> None:
    """The reference program makes files of these names."""
    if name in ("", ".", "..") or any(char in name for char in "/\0\n"):
        raise ArchiveLimit(f"a {what} of a VMA archive cannot have the name {name!r}")
    try:
        length = len(_encoded(name))
    except UnicodeEncodeError as error:
        raise ArchiveLimit(f"the name {name!r} of a {what} is not text") from error
    if length >= vma.MAX_BLOB_BYTES:
        raise ArchiveLimit(f"the name of a {what} has {length} bytes; the limit is {vma.MAX_BLOB_BYTES - 1}")


def _check_distinct(what: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ArchiveLimit(f"two {what} have the name {repeated!r}; the reference program would lose one")


def _check_header_size(head: ArchiveHead) -> None:
    lengths = [len(_encoded(_device_name(disk))) + 1 for disk in head.disks]
    for config in head.configs:
        lengths += [len(_encoded(config.name)) + 1, len(config.content)]
    size = vma.FIXED_BYTES + blob_buffer_bytes(lengths)
    if size > vma.MAX_WRITTEN_HEADER_BYTES:
        raise ArchiveLimit(
            f"names and configs make a header of {size} bytes; the limit is {vma.MAX_WRITTEN_HEADER_BYTES}"
        )


def _assigned_devices(disks: Sequence[ArchiveDisk]) -> list[Device]:
    """A device for each disk: with the id that it has if that can be kept, else the lowest free one. Sizes are
    rounded up to sectors: the reference program's restore loses what does not fill one.
    """
    wanted = [disk.device_id or 0 for disk in disks]
    kept = [w if 1 <= w <= vma.MAX_DEVICES and wanted.index(w) == i else 0 for i, w in enumerate(wanted)]
    free = iter(sorted(set(range(1, vma.MAX_DEVICES + 1)) - set(kept)))
    return [
        Device(
            device_id or next(free),
            _encoded(_device_name(disk)),
            -(-disk.size_bytes // vma.SECTOR_BYTES) * vma.SECTOR_BYTES,
        )
        for device_id, disk in zip(kept, disks, strict=True)
    ]


def _device_name(disk: ArchiveDisk) -> str:
    return vma.STATE_NAME if disk.is_vmstate else disk.name


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _derived_uuid(time_s: int, devices: Sequence[Device], configs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """For a head without one: the same head has the same uuid. It has the form of one from a hash (version 8)."""
    digest = bytearray(md5(encode_header(bytes(16), time_s, devices, configs), usedforsecurity=False).digest())
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return bytes(digest)


# --- the data


class _Disk(NamedTuple):
    name: str
    size_bytes: int
    clusters: int
    device_id: int
    is_state: bool

    @classmethod
    def of(cls, disk: ArchiveDisk, device: Device) -> _Disk:
        clusters = -(-disk.size_bytes // vma.CLUSTER_BYTES)
        return cls(disk.name, disk.size_bytes, clusters, device.device_id, disk.is_vmstate)


class VmaOutput:
    """Takes clusters in any order, except that those of a VM's state must ascend: readers insist on that."""

    def __init__(self, target: ByteTarget, uuid: bytes, disks: Sequence[_Disk]) -> None:
        self._target = target
        self._uuid = uuid
        self._disks = disks
        self._given = [0] * len(disks)
        self._slots: list[int] = []
        self._blocks = 0
        self._data: list[Buffer] = []
        self._lent_from = 0
        self._lent_bytes = 0
        self._queue: list[Buffer] = []
        self._queue_bytes = 0
        self._queue_is_lent = False
        self._written_any = False

    def write(self, disk: int, offset: int, data: Buffer) -> None:
        """See ``ArchiveOutput``. Blocks of zeros are left out, except of a VM's state: the reference program's
        ``extract`` would leave them out of the file as well.
        """
        view = memoryview(data).cast("B")
        first, count = self._clusters(disk, offset, len(view))
        blocks = -(-len(view) // vma.BLOCK_BYTES)
        flags = b"\1" * blocks if self._disks[disk].is_state else nonzero_blocks(view)
        masks = _masks(flags, count)
        base = vma.slot(0, self._disks[disk].device_id, first)
        self._append([base + i + (mask << 48) for i, mask in enumerate(masks)], flags, view)
        self._settle()

    def zeros(self, disk: int, offset: int, length: int) -> None:
        """See ``ArchiveOutput``."""
        if self._disks[disk].is_state:
            for start in range(offset, offset + length, len(ZEROS)):
                self.write(disk, start, memoryview(ZEROS)[: min(len(ZEROS), offset + length - start)])
            return
        first, count = self._clusters(disk, offset, length)
        base = vma.slot(0, self._disks[disk].device_id, first)
        done = 0
        while done < count:
            take = min(count - done, vma.WRITTEN_SLOTS - len(self._slots))
            self._slots += range(base + done, base + done + take)
            done += take
            self._close_if_full()
        self._write_queue(_QUEUE_BYTES)

    def finish(self) -> None:
        """See ``ArchiveOutput``. An archive without data gets one empty extent, as the reference program writes it.

        :raise ArchiveIncomplete: when not every cluster was given.
        """
        for disk, given in zip(self._disks, self._given, strict=True):
            if given != disk.clusters:
                raise ArchiveIncomplete(f"{given} of the {disk.clusters} clusters of disk {disk.name!r} were given")
        if self._slots or not self._written_any:
            self._close_extent()
        self._write_queue(0)

    def _clusters(self, disk: int, offset: int, length: int) -> tuple[int, int]:
        """(first cluster, count) of a range; counts them as given."""
        size = self._disks[disk].size_bytes
        end = offset + length
        if offset % vma.CLUSTER_BYTES or not 0 <= offset <= end <= size or (end % vma.CLUSTER_BYTES and end != size):
            raise ValueError(f"{length} bytes from {offset} are not clusters of a disk of {size} bytes")
        first, count = offset // vma.CLUSTER_BYTES, -(-length // vma.CLUSTER_BYTES)
        if self._disks[disk].is_state and first != self._given[disk]:
            raise ArchiveUnsupported("a VMA archive takes the VM's state only from its beginning to its end")
        self._given[disk] += count
        return first, count

    def _append(self, slots: list[int], flags: bytes, view: memoryview) -> None:
        """Add clusters to the open extent and those after it. ``flags``: which blocks of ``view`` are stored."""
        done = 0
        while done < len(slots):
            take = min(len(slots) - done, vma.WRITTEN_SLOTS - len(self._slots))
            self._slots += slots[done : done + take]
            start, end = done * vma.CLUSTER_BLOCKS, (done + take) * vma.CLUSTER_BLOCKS
            for match in _STORED_RUN.finditer(flags, start, end):
                self._lend(view, *match.span())
            done += take
            self._close_if_full()

    def _lend(self, view: memoryview, start: int, end: int) -> None:
        """Add the blocks [start, end) of ``view`` to the open extent; the end of a disk is padded."""
        part = view[start * vma.BLOCK_BYTES : end * vma.BLOCK_BYTES]
        self._data.append(part)
        padding = (end - start) * vma.BLOCK_BYTES - len(part)
        if padding:
            self._data.append(ZEROS[:padding])
        self._blocks += end - start
        self._lent_bytes += len(part)

    def _settle(self) -> None:
        """Keep nothing that was lent: write it, or copy the little that an open extent has."""
        if self._lent_bytes >= _COPY_BYTES:
            self._close_extent()
        elif self._lent_bytes:
            self._data[self._lent_from :] = [b"".join(self._data[self._lent_from :])]
            self._lent_from = len(self._data)
            self._lent_bytes = 0
        self._write_queue(0 if self._queue_is_lent else _QUEUE_BYTES)

    def _close_if_full(self) -> None:
        if len(self._slots) == vma.WRITTEN_SLOTS:
            self._close_extent()

    def _close_extent(self) -> None:
        """Move the open extent into the queue."""
        header = bytearray(vma.EXTENT_BYTES)
        vma.EXTENT.pack_into(header, 0, vma.EXTENT_MAGIC, 0, self._blocks, self._uuid, bytes(vma.MD5_BYTES))
        unused = (0,) * (vma.SLOTS - len(self._slots))
        vma.SLOT_TABLE.pack_into(header, vma.EXTENT.size, *self._slots, *unused)
        checksum = md5(header, usedforsecurity=False).digest()
        header[vma.EXTENT_MD5_OFFSET : vma.EXTENT_MD5_OFFSET + vma.MD5_BYTES] = checksum
        self._queue += (header, *self._data)
        self._queue_bytes += vma.EXTENT_BYTES + self._blocks * vma.BLOCK_BYTES
        self._queue_is_lent |= self._lent_bytes > 0
        self._slots, self._data = [], []
        self._blocks = self._lent_from = self._lent_bytes = 0
        self._written_any = True

    def _write_queue(self, least_bytes: int) -> None:
        if self._queue and self._queue_bytes >= least_bytes:
            self._target.write(self._queue)
            self._queue, self._queue_bytes, self._queue_is_lent = [], 0, False


def _masks(flags: bytes, clusters: int) -> Sequence[int]:
    """The mask of each cluster from a byte for each block, 0 or 1."""
    if 0 not in flags and len(flags) == clusters * vma.CLUSTER_BLOCKS:
        return [vma.FULL_MASK] * clusters
    bits = int(flags.translate(_BITS)[::-1], 2)
    return Struct(f"<{clusters}H").unpack(bits.to_bytes(clusters * 2, "little"))
