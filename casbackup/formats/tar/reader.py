"""Reading: own archives in one pass, those of other programs where it is possible to seek."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from casbackup.buffers import aligned_buffer
from casbackup.errors import ArchiveDamaged, ArchiveUnsupported
from casbackup.formats.port import (
    ArchiveConfig,
    ArchiveDisk,
    ArchiveHead,
    ByteSource,
    Event,
    Order,
    ReaderCapabilities,
)
from casbackup.formats.reading import COPY_BYTES, drain, read_exactly
from casbackup.formats.tar.manifest import MEMBER, Manifest, parse_manifest
from casbackup.formats.tar.members import Member, Members, events_of
from casbackup.limits import MAX_CONFIGS, MAX_DISK_BYTES, MAX_DISKS, MAX_MANIFEST_BYTES, MAX_TAR_MEMBERS
from casbackup.units import KiB

DISK_SUFFIXES = (".raw", ".img")
CONFIG_SUFFIXES = (".conf", ".fw", ".cfg", ".ini", ".xml", ".ovf", ".json", ".yaml", ".yml", ".toml")
_FOREIGN_CONFIG_BYTES = 256 * KiB

FindMember = Callable[[str], Member | None]
"""The member of this name, with the source at its data; on a pipe the next one, whatever its name."""


class TarReader:
    """Own archives are read from a pipe; others need a file, because it takes all headers to know the disks."""

    capabilities = ReaderCapabilities(streams=True, order=Order.ASCENDING)

    def open(self, source: ByteSource) -> TarArchive:
        """:raise ArchiveUnsupported: for what has no disks, or is another program's and comes from a pipe."""
        if not source.seekable:
            return _open_stream(source)
        found = _scan(source)
        find = _finder(source, found)
        return _own_archive(source, find) if MEMBER in found else _foreign_archive(source, found, find)


class TarArchive:
    def __init__(self, source: ByteSource, head: ArchiveHead, members: Sequence[str], find: FindMember) -> None:
        """``members``: the name of each disk's."""
        self.head = head
        self._source = source
        self._members = members
        self._find = find

    def events(self) -> Iterator[Event]:
        """:raise ArchiveDamaged: when a member is missing, has another size, or is cut short."""
        buffer = memoryview(aligned_buffer(COPY_BYTES))
        for number, (name, disk) in enumerate(zip(self._members, self.head.disks, strict=True)):
            member = _expected(self._find(name), name, disk.size_bytes, self._source)
            yield from events_of(member, number, self._source, buffer)
        drain(self._source)


def _open_stream(source: ByteSource) -> TarArchive:
    members = Members(source)
    first = members.next()
    if first is None:
        raise ArchiveDamaged(f"{source.name}: a tar archive without members")
    if first.name != MEMBER:
        raise ArchiveUnsupported(
            f"{source.name}: a tar archive that casbackup did not write, or that was packed anew, "
            "is read from a file, not from a pipe"
        )
    waiting = [first]
    return _own_archive(source, lambda _name: waiting.pop() if waiting else members.next())


def _own_archive(source: ByteSource, find: FindMember) -> TarArchive:
    manifest = _read_manifest(source, find)
    configs = tuple(
        ArchiveConfig(
            entry.name, _content(_expected(find(entry.member), entry.member, entry.size_bytes, source), source)
        )
        for entry in manifest.configs
    )
    head = ArchiveHead(tuple(d.disk for d in manifest.disks), configs, manifest.uuid, manifest.time_s)
    return TarArchive(source, head, [d.member for d in manifest.disks], find)


def _read_manifest(source: ByteSource, find: FindMember) -> Manifest:
    member = find(MEMBER)
    if member is None or member.ranges is not None or not member.is_file or member.size_bytes > MAX_MANIFEST_BYTES:
        raise ArchiveDamaged(f"{source.name}: the member {MEMBER} is no manifest")
    return parse_manifest(_content(member, source), source.name)


def _foreign_archive(source: ByteSource, found: dict[str, Member], find: FindMember) -> TarArchive:
    """Disks are told by their suffix, configs by suffix and size; other members are not read."""
    disks = [name for name, member in found.items() if name.lower().endswith(DISK_SUFFIXES)]
    if not disks:
        raise ArchiveUnsupported(f"{source.name}: no member of the tar archive is a disk image (*.raw, *.img)")
    configs = [name for name, member in found.items() if _is_foreign_config(member)]
    if len(disks) > MAX_DISKS or len(configs) > MAX_CONFIGS:
        raise ArchiveUnsupported(f"{source.name}: more than {MAX_DISKS} disks or {MAX_CONFIGS} configs")
    if any(found[name].size_bytes > MAX_DISK_BYTES for name in disks):
        raise ArchiveUnsupported(f"{source.name}: a disk is larger than {MAX_DISK_BYTES} bytes")
    names = _short_names([name[:-4] for name in disks])
    head = ArchiveHead(
        tuple(ArchiveDisk(name, found[member].size_bytes) for name, member in zip(names, disks, strict=True)),
        tuple(
            ArchiveConfig(name, _content(_expected(find(member), member, found[member].size_bytes, source), source))
            for name, member in zip(_short_names(configs), configs, strict=True)
        ),
    )
    return TarArchive(source, head, disks, find)


def _scan(source: ByteSource) -> dict[str, Member]:
    """All files by name, without their maps; of several with one name the last, as tar extracts them."""
    members = Members(source)
    found: dict[str, Member] = {}
    count = 0
    while (member := members.next()) is not None:
        count += 1
        if count > MAX_TAR_MEMBERS:
            raise ArchiveUnsupported(f"{source.name}: a tar archive of more than {MAX_TAR_MEMBERS} members")
        if member.is_file:
            found[member.name] = replace(member, ranges=None) if member.ranges is not None else member
    return found


def _finder(source: ByteSource, found: dict[str, Member]) -> FindMember:
    def find(name: str) -> Member | None:
        if name not in found:
            return None
        source.seek(found[name].offset)
        return Members(source).next()

    return find


def _expected(member: Member | None, name: str, size_bytes: int, source: ByteSource) -> Member:
    """:raise ArchiveDamaged: unless it is the file of that name and size."""
    if member is None:
        raise ArchiveDamaged(f"{source.name}: the member {name} is missing")
    if member.name != name or not member.is_file or member.size_bytes != size_bytes:
        raise ArchiveDamaged(
            f"{source.name}: at byte {member.offset} there is {member.name} of {member.size_bytes} bytes "
            f"in place of {name} of {size_bytes}"
        )
    return member


def _content(member: Member, source: ByteSource) -> bytes:
    """Of a small member. :raise ArchiveDamaged: if it is sparse, which small ones never are."""
    if member.ranges is not None:
        raise ArchiveDamaged(f"{source.name}: the member {member.name} is sparse")
    return bytes(read_exactly(source, member.size_bytes, member.name))


def _is_foreign_config(member: Member) -> bool:
    return member.stored_bytes == member.size_bytes <= _FOREIGN_CONFIG_BYTES and member.name.lower().endswith(
        CONFIG_SUFFIXES
    )


def _short_names(paths: list[str]) -> list[str]:
    """Without folders where that tells them apart, otherwise with ``_`` for each slash."""
    names = [path.rpartition("/")[2] for path in paths]
    counts = Counter(names)
    return [name if counts[name] == 1 else path.replace("/", "_") for name, path in zip(names, paths, strict=True)]
