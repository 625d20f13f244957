"""Writing: manifest, configs, then a member for each disk, with its map before its data. Never seeks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from casbackup.errors import ArchiveLimit, TargetUnwritable
from casbackup.formats.mappedstream import MappedStream, rounded
from casbackup.formats.port import ArchiveHead, ByteRange, ByteTarget, Order, WriterCapabilities
from casbackup.formats.tar.headers import BLOCK_BYTES, RECORD_BYTES, encode_member, padded, padding
from casbackup.formats.tar.manifest import MEMBER, Manifest, encode_manifest, manifest_of
from casbackup.formats.tar.sparse import encode_map, entry_count
from casbackup.fs import Buffer
from casbackup.limits import MAX_CONFIG_BYTES, MAX_CONFIGS, MAX_DISK_BYTES, MAX_DISKS, MAX_TAR_RANGES

_MAX_NAME_BYTES = 255
"""Of a file, on Linux."""


class TarWriter:
    capabilities = WriterCapabilities(
        streams=True,
        order=Order.ASCENDING,
        needs_map=True,
        unit_bytes=BLOCK_BYTES,
        max_disks=MAX_DISKS,
        configs=True,
        vmstate=True,
    )

    def check(self, head: ArchiveHead) -> None:
        if len(head.disks) > MAX_DISKS or len(head.configs) > MAX_CONFIGS:
            raise ArchiveLimit(f"tar takes up to {MAX_DISKS} disks and {MAX_CONFIGS} configs")
        for disk in head.disks:
            if disk.size_bytes > MAX_DISK_BYTES:
                raise ArchiveLimit(f"disk {disk.name} is larger than {MAX_DISK_BYTES} bytes")
        for config in head.configs:
            if len(config.content) > MAX_CONFIG_BYTES:
                raise ArchiveLimit(f"config {config.name} is larger than {MAX_CONFIG_BYTES} bytes")
        manifest = manifest_of(head)
        _check_members([c.member for c in manifest.configs] + [d.member for d in manifest.disks])

    def open(
        self, target: ByteTarget, head: ArchiveHead, maps: Sequence[Sequence[ByteRange]] | None = None
    ) -> TarOutput:
        self.check(head)
        if maps is None or len(maps) != len(head.disks):
            raise ValueError("a tar archive is written with a map of each disk")
        for disk, ranges in zip(head.disks, maps, strict=True):
            if len(ranges) > MAX_TAR_RANGES:
                raise ArchiveLimit(
                    f"disk {disk.name} has {len(ranges)} ranges with data; tar takes up to {MAX_TAR_RANGES}"
                )
        return TarOutput(target, head, maps)


class TarOutput:
    def __init__(self, target: ByteTarget, head: ArchiveHead, maps: Sequence[Sequence[ByteRange]]) -> None:
        self._manifest = manifest_of(head)
        self._target = _Counting(target)
        self._maps = maps
        self._time_s = head.time_s or 0
        self._current = -1
        self._stream = MappedStream(target, ())
        self._write_head(head, self._manifest)
        self._go_to(0)

    def write(self, disk: int, offset: int, data: Buffer) -> None:
        """:raise ValueError: when it comes out of order or lies outside the map."""
        self._go_to(disk)
        self._stream.write(offset, data)

    def zeros(self, disk: int, offset: int, length: int) -> None:
        """:raise ValueError: when they come out of order."""
        self._go_to(disk)
        self._stream.zeros(offset, length)

    def finish(self) -> None:
        self._go_to(len(self._maps))
        self._target.write([bytes(2 * BLOCK_BYTES)])
        self._target.write([bytes(-self._target.written_bytes % RECORD_BYTES)])

    def _write_head(self, head: ArchiveHead, manifest: Manifest) -> None:
        self._write_small(MEMBER, encode_manifest(manifest))
        for entry, config in zip(manifest.configs, head.configs, strict=True):
            self._write_small(entry.member, config.content)

    def _write_small(self, member: str, content: bytes) -> None:
        self._target.write([encode_member(member, len(content), self._time_s, {}), padded(content)])

    def _go_to(self, disk: int) -> None:
        """End the members before that of ``disk``, and begin it."""
        if disk < self._current:
            raise ValueError(f"data of disk {disk} comes after that of disk {self._current}")
        while self._current < disk:
            self._stream.finish()
            self._target.write([bytes(padding(self._target.written_bytes))])
            self._current += 1
            if self._current < len(self._maps):
                self._begin_member()

    def _begin_member(self) -> None:
        entry = self._manifest.disks[self._current]
        size_bytes = entry.disk.size_bytes
        ranges = self._maps[self._current]
        data_bytes = sum(piece.length for piece in rounded(ranges, 1))
        if data_bytes == size_bytes:
            self._target.write([encode_member(entry.member, size_bytes, self._time_s, {})])
        else:
            self._begin_sparse(entry.member, size_bytes, ranges, data_bytes)
        self._stream = MappedStream(self._target, rounded(ranges, 1))

    def _begin_sparse(self, member: str, size_bytes: int, ranges: Iterable[ByteRange], data_bytes: int) -> None:
        """The map is made twice instead of being held: its length stands in the header before it."""
        count = entry_count(rounded(ranges, 1), size_bytes)
        map_bytes = sum(map(len, encode_map(rounded(ranges, 1), count, size_bytes)))
        map_padding = padding(map_bytes)
        records = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": member,
            "GNU.sparse.realsize": str(size_bytes),
        }
        stored_bytes = map_bytes + map_padding + data_bytes
        self._target.write([encode_member(f"GNUSparseFile.0/{member}", stored_bytes, self._time_s, records)])
        for text in encode_map(rounded(ranges, 1), count, size_bytes):
            self._target.write([text])
        self._target.write([bytes(map_padding)])


class _Counting:
    """A target that knows how much was written, from a pipe too."""

    seekable = False

    def __init__(self, target: ByteTarget) -> None:
        self._target = target
        self.written_bytes = 0

    def write(self, buffers: Sequence[Buffer]) -> None:
        self.written_bytes += sum(map(len, buffers))
        self._target.write(buffers)

    def seek(self, offset: int) -> None:
        raise TargetUnwritable("tar is written from front to back")

    def tell(self) -> int:
        return self.written_bytes


def _check_members(members: list[str]) -> None:
    """:raise ArchiveLimit: when two would be one file, or a name is too long for one."""
    if len(set(members)) < len(members):
        twice = next(member for member in members if members.count(member) > 1)
        raise ArchiveLimit(f"two disks or configs would be the member {twice}")
    for member in members:
        if len(member.rpartition("/")[2].encode()) > _MAX_NAME_BYTES:
            raise ArchiveLimit(f"the name of the member {member[:60]}... would be longer than {_MAX_NAME_BYTES} bytes")
