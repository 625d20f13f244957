"""The archive header: made from a head, and taken apart however damaged it is.

Taking apart collects problems instead of stopping at the first: a reader raises the first one, verify reports all,
salvage makes do with what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from casbackup.errors import ArchiveDamaged, ArchiveError, ArchiveUnsupported
from casbackup.formats.findings import Finding, Severity
from casbackup.formats.port import ArchiveConfig, ArchiveDisk, ArchiveHead, ByteSource
from casbackup.spec import vma
from casbackup.units import MiB

_READ_BYTES = MiB


class Device(NamedTuple):
    device_id: int
    name: bytes
    size_bytes: int


class Problem(NamedTuple):
    """``offset`` is within the header. ``fatal``: an archive with it cannot be read, only salvaged."""

    code: str
    text: str
    offset: int
    severity: Severity = Severity.ERROR
    fatal: bool = True
    unsupported: bool = False

    @property
    def finding(self) -> Finding:
        return Finding(self.severity, self.code, self.text, self.offset)

    def error(self, name: str) -> ArchiveError:
        """What a reader raises about archive ``name``."""
        message = f"{name}: byte {self.offset}: {self.text}"
        return ArchiveUnsupported(message) if self.unsupported else ArchiveDamaged(message)


class Header(NamedTuple):
    """What a header says. ``devices`` by id; slot 255 is among them. ``header_bytes``: where the extents begin."""

    uuid: bytes
    time_s: int
    header_bytes: int
    devices: tuple[Device, ...]
    configs: tuple[tuple[bytes, bytes], ...]
    """(name, content)"""


# --- writing


def encode_header(uuid: bytes, time_s: int, devices: Sequence[Device], configs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The header's bytes. Names are without their NUL; all limits have been checked."""
    blobs = _Blobs()
    pointers = [(blobs.add(name + b"\0"), blobs.add(content)) for name, content in configs]
    names, contents = _pointer_tables(pointers)
    table = bytearray(vma.DEVICE_SLOTS * vma.DEVICE.size)
    for device in sorted(devices):
        place = device.device_id * vma.DEVICE.size
        vma.DEVICE.pack_into(table, place, blobs.add(device.name + b"\0"), device.size_bytes)
    buffer = blobs.padded()
    fixed = vma.HEADER.pack(
        vma.MAGIC,
        vma.VERSION,
        uuid,
        time_s,
        bytes(vma.MD5_BYTES),
        vma.FIXED_BYTES,
        len(blobs.data),
        vma.FIXED_BYTES + len(buffer),
    )
    gap = bytes(vma.DEVICES_OFFSET - vma.CONFIG_CONTENTS_OFFSET - vma.CONFIG_POINTERS.size)
    header = bytearray(b"".join((fixed, names, contents, gap, table, buffer)))
    header[vma.MD5_OFFSET : vma.MD5_OFFSET + vma.MD5_BYTES] = vma.header_checksum(header)
    return bytes(header)


def blob_buffer_bytes(lengths: Sequence[int]) -> int:
    """Bytes of the padded buffer that holds blobs of these lengths."""
    used = vma.FIRST_BLOB + sum(vma.BLOB_LENGTH.size + length for length in lengths)
    return -(-used // vma.SECTOR_BYTES) * vma.SECTOR_BYTES


class _Blobs:
    def __init__(self) -> None:
        self.data = bytearray(vma.FIRST_BLOB)

    def add(self, content: bytes) -> int:
        """Returns the pointer."""
        pointer = len(self.data)
        self.data += vma.BLOB_LENGTH.pack(len(content)) + content
        return pointer

    def padded(self) -> bytes:
        return bytes(self.data) + bytes(-len(self.data) % vma.SECTOR_BYTES)


def _pointer_tables(pointers: Sequence[tuple[int, int]]) -> tuple[bytes, bytes]:
    unused = [0] * (vma.CONFIGS - len(pointers))
    names = vma.CONFIG_POINTERS.pack(*(name for name, _ in pointers), *unused)
    return names, vma.CONFIG_POINTERS.pack(*(content for _, content in pointers), *unused)


# --- reading


def read_header(source: ByteSource) -> Header:
    """Read the header and nothing behind it.

    :raise ArchiveDamaged: when it is not sound. :raise ArchiveUnsupported: when it is too large or of another version.
    """
    data = _header_bytes(source)
    if isinstance(data, Problem):
        raise data.error(source.name)
    header, problems = examine_header(data)
    for problem in problems:
        if problem.fatal:
            raise problem.error(source.name)
    return header


def _header_bytes(source: ByteSource) -> bytes | Problem:
    """As much as the header's own size says; memory is not taken before the bytes are there."""
    data = _read(source, vma.FIXED_BYTES)
    if len(data) < vma.FIXED_BYTES:
        return Problem("header-truncated", f"it ends within its header, after {len(data)} bytes", len(data))
    problem = _opening_problem(data)
    if problem is not None:
        return problem
    size = vma.HEADER.unpack_from(data)[-1]
    data += _read(source, size - len(data))
    if len(data) < size:
        text = f"it ends within its header, after {len(data)} of {size} bytes"
        return Problem("header-truncated", text, len(data))
    return data


def _read(source: ByteSource, length: int) -> bytes:
    parts = []
    while length > 0:
        part = bytearray(min(length, _READ_BYTES))
        got = source.read_into(memoryview(part))
        parts.append(bytes(part[:got]))
        if got < len(part):
            break
        length -= got
    return b"".join(parts)


def _opening_problem(data: bytes) -> Problem | None:
    """What forbids to go on to the rest of the header."""
    magic = data[: len(vma.MAGIC)]
    size = vma.HEADER.unpack_from(data)[-1]
    if magic != vma.MAGIC:
        return Problem("header-magic", f"it does not begin like a VMA archive, but with {magic.hex(' ')}", 0)
    if not vma.FIXED_BYTES < size < 1 << 31:
        return Problem("header-size", f"the header says that it has {size} bytes", 56)
    if size > vma.MAX_HEADER_BYTES:
        text = f"the header says that it has {size} bytes; up to {vma.MAX_HEADER_BYTES} are read"
        return Problem("header-size", text, 56, unsupported=True)
    return None


def examine_header(data: bytes) -> tuple[Header, list[Problem]]:
    """Take a header apart. ``data``: all of it, at least FIXED_BYTES. The problems are in the order of checking."""
    _magic, version, uuid, time_s, checksum, blob_offset, blob_size, size = vma.HEADER.unpack_from(data)
    problems = [problem] if (problem := _opening_problem(data)) else []
    if not problems and size != len(data):
        text = f"the header says that it has {size} bytes, and {len(data)} are there before the first extent"
        problems.append(Problem("header-size", text, 56))
    if vma.header_checksum(data) != checksum:
        problems.append(Problem("header-checksum", "the checksum of the header is wrong", vma.MD5_OFFSET))
    if version != vma.VERSION:
        text = f"it has version {version}, and {vma.VERSION} is the only one that is known"
        problems.append(Problem("header-version", text, 4, unsupported=True))
    if blob_offset < vma.FIXED_BYTES or blob_size < 1 or blob_offset + blob_size > len(data):
        text = f"the blobs lie outside of the header: {blob_size} bytes from {blob_offset}"
        problems.append(Problem("blob-buffer", text, 48))
    if any(data[vma.HEADER.size - 1984 : vma.HEADER.size]):
        problems.append(_oddity("reserved-bytes", "reserved bytes of the header are set", 60))
    blobs = dict(_blobs(data[blob_offset : blob_offset + blob_size]))
    devices = tuple(_devices(data, blobs, problems))
    configs = tuple(_configs(data, blobs, problems))
    return Header(uuid, time_s, size, devices, configs), problems


def _blobs(buffer: bytes) -> Iterator[tuple[int, bytes]]:
    """(pointer, content), as far as they are whole."""
    position = vma.FIRST_BLOB
    while position + vma.BLOB_LENGTH.size <= len(buffer):
        (length,) = vma.BLOB_LENGTH.unpack_from(buffer, position)
        start = position + vma.BLOB_LENGTH.size
        if start + length > len(buffer):
            return
        yield position, buffer[start : start + length]
        position = start + length


def _devices(data: bytes, blobs: dict[int, bytes], problems: list[Problem]) -> Iterator[Device]:
    names = set[bytes]()
    for device_id in range(1, vma.DEVICE_SLOTS):
        place = vma.DEVICES_OFFSET + device_id * vma.DEVICE.size
        pointer, size = vma.DEVICE.unpack_from(data, place)
        if pointer == 0 and size == 0:
            continue
        name = _name(blobs.get(pointer))
        if name is None or size == 0:
            problems.append(_oddity("device-slot", f"device {device_id} has no name or no size", place))
            continue
        if size > vma.MAX_DEVICE_BYTES:
            text = f"device {device_id} has {size} bytes, more than the format can hold"
            problems.append(Problem("device-size", text, place))
        if device_id > vma.MAX_DEVICES:
            text = f"device {device_id} is in a slot that readers ignore"
            problems.append(_oddity("device-slot", text, place))
        if name in names:
            text = f"two devices have the name {_decoded(name)!r}; the reference program does not extract that"
            problems.append(Problem("device-name", text, place, fatal=False))
        names.add(name)
        yield Device(device_id, name, size)


def _configs(data: bytes, blobs: dict[int, bytes], problems: list[Problem]) -> Iterator[tuple[bytes, bytes]]:
    names = vma.CONFIG_POINTERS.unpack_from(data, vma.CONFIG_NAMES_OFFSET)
    contents = vma.CONFIG_POINTERS.unpack_from(data, vma.CONFIG_CONTENTS_OFFSET)
    for number, (name_pointer, content_pointer) in enumerate(zip(names, contents, strict=True)):
        place = vma.CONFIG_NAMES_OFFSET + number * 4
        if name_pointer == 0 and content_pointer == 0:
            continue
        if name_pointer == 0 or content_pointer == 0:
            text = f"config {number} has a name or a content, not both, and is ignored"
            problems.append(_oddity("config-slot", text, place))
            continue
        name, content = _name(blobs.get(name_pointer)), blobs.get(content_pointer)
        if name is None or content is None:
            problems.append(Problem("config-pointer", f"the pointers of config {number} are invalid", place))
        else:
            yield name, content


def _oddity(code: str, text: str, offset: int) -> Problem:
    """What readers overlook."""
    return Problem(code, text, offset, Severity.WARNING, fatal=False)


def _name(blob: bytes | None) -> bytes | None:
    """A string up to its first NUL; None if it has none at its end."""
    return blob.split(b"\0", 1)[0] if blob is not None and blob.endswith(b"\0") else None


# --- the head


def head_of(header: Header, devices: Sequence[Device]) -> ArchiveHead:
    """The head with these devices of the header. The last one with the state's name is the VM's state."""
    states = [device.device_id for device in devices if device.name == vma.STATE_NAME.encode()]
    disks = tuple(
        ArchiveDisk(_decoded(d.name), d.size_bytes, d.device_id, is_vmstate=states[-1:] == [d.device_id])
        for d in devices
    )
    configs = tuple(ArchiveConfig(_decoded(name), content) for name, content in header.configs)
    return ArchiveHead(disks, configs, header.uuid, header.time_s)


def listed_devices(header: Header) -> tuple[Device, ...]:
    """Those that the reference program lists and reads."""
    return tuple(device for device in header.devices if device.device_id <= vma.MAX_DEVICES)


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
