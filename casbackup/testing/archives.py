"""Conformance suite of archive formats: every plugin passes every check that applies to it.

    suite = ArchiveConformance(FORMAT)
    for name, check in suite.checks():
        check()

No test framework is needed: a check returns, or raises ``AssertionError``. Beside the suite stand what it is made of:
sources and targets in memory, and functions that write and read a whole archive.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from casbackup.errors import ArchiveLimit, ArchiveUnsupported, CasbackupError
from casbackup.formats.coverage import ArchiveCoverage
from casbackup.formats.port import (
    RECOGNISE_BYTES,
    ArchiveConfig,
    ArchiveDisk,
    ArchiveFormat,
    ArchiveHead,
    ArchiveOutput,
    ArchiveReader,
    ArchiveWriter,
    ByteRange,
    Data,
    Event,
    Order,
    WriterCapabilities,
    Zeros,
)
from casbackup.formats.verify import verify
from casbackup.fs import Buffer
from casbackup.limits import SEGMENT_BYTES
from casbackup.units import KiB, MiB

UUID = bytes(range(16))
TIME_S = 1_795_380_148

_MAX_READ_BYTES = 256 * MiB
"""Disks that are read whole; damaged archives may claim any size."""


class MemorySource:
    """A ByteSource over bytes. Without ``seekable`` it is a pipe."""

    def __init__(self, data: bytes, *, seekable: bool = True, name: str = "memory") -> None:
        self._data = memoryview(data)
        self._seekable = seekable
        self._name = name
        self._position = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def seekable(self) -> bool:
        return self._seekable

    @property
    def size_bytes(self) -> int | None:
        return len(self._data) if self._seekable else None

    def read_into(self, buffer: memoryview) -> int:
        part = self._data[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def seek(self, offset: int) -> None:
        assert self._seekable, "a pipe was asked to seek"
        assert 0 <= offset <= len(self._data), f"seek to {offset} of {len(self._data)}"
        self._position = offset

    def tell(self) -> int:
        return self._position


class MemoryTarget:
    """A ByteTarget in memory. What is written stays what it was when it was written."""

    def __init__(self, *, seekable: bool = True) -> None:
        self.data = bytearray()
        self._seekable = seekable
        self._position = 0

    @property
    def seekable(self) -> bool:
        return self._seekable

    def write(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            with memoryview(buffer) as view, view.cast("B") as flat:
                if self._position > len(self.data):
                    self.data.extend(bytes(self._position - len(self.data)))
                self.data[self._position : self._position + len(flat)] = flat
                self._position += len(flat)

    def seek(self, offset: int) -> None:
        assert self._seekable, "a pipe was asked to seek"
        self._position = offset

    def tell(self) -> int:
        return self._position


@dataclass(frozen=True, slots=True)
class Sample:
    """An archive's content: ``contents`` has the bytes of each disk of the head."""

    head: ArchiveHead
    contents: tuple[bytes, ...]


def sample(sizes: Sequence[int], configs: Sequence[ArchiveConfig] = (), *, fill: Callable[[int], bytes]) -> Sample:
    """Disks of these sizes, called ``drive-scsi0`` …, with ids from 1 on; ``fill`` gives the bytes for a size."""
    disks = tuple(ArchiveDisk(f"drive-scsi{i}", size, i + 1) for i, size in enumerate(sizes))
    return Sample(ArchiveHead(disks, tuple(configs), UUID, TIME_S), tuple(fill(size) for size in sizes))


def write_archive(writer: ArchiveWriter, content: Sample, *, seed: int = 0, seekable: bool | None = None) -> bytes:
    """Write all of it as the writer's capabilities demand; events are cut and ordered at random.

    ``seekable`` None: as little as the writer needs.
    """
    capabilities = writer.capabilities
    target = MemoryTarget(seekable=not capabilities.streams if seekable is None else seekable)
    writer.check(content.head)
    maps = [data_ranges(data, capabilities.unit_bytes) for data in content.contents]
    output = writer.open(target, content.head, maps if capabilities.needs_map else None)
    for event in cut_events(content, capabilities, seed):
        give(output, event)
    output.finish()
    return bytes(target.data)


def give(output: ArchiveOutput, event: Event) -> None:
    """Pass an event on, its data in a buffer that is overwritten after the call."""
    if isinstance(event, Zeros):
        output.zeros(*event)
        return
    lent = bytearray(event.data)
    kinds: tuple[Buffer, ...] = (lent, memoryview(lent), bytes(lent))
    output.write(event.disk, event.offset, kinds[(event.offset // KiB + len(lent)) % 3])
    lent[:] = b"\xa5" * len(lent)


def read_archive(reader: ArchiveReader, data: bytes, *, seekable: bool | None = None) -> Sample:
    """Read all of an archive, and check that each byte comes exactly once and in the order that is promised.

    ``seekable`` None: as little as the reader needs.

    :raise ArchiveError: what the reader raises, or that something comes twice or not at all.
    """
    capabilities = reader.capabilities
    source = MemorySource(data, seekable=not capabilities.streams if seekable is None else seekable)
    archive = reader.open(source)
    coverage = ArchiveCoverage(archive.head)
    if sum(disk.size_bytes for disk in archive.head.disks) > _MAX_READ_BYTES:
        raise ArchiveUnsupported("the disks are too large to be read into memory")
    disks = [bytearray(b"\xa5" * disk.size_bytes) for disk in archive.head.disks]
    previous = (0, 0)
    for event in coverage.passing(archive.events()):
        length = len(event.data) if isinstance(event, Data) else event.length
        assert length > 0, f"an empty event: {event}"
        if capabilities.order is Order.ASCENDING:
            assert (event.disk, event.offset) >= previous, f"{event[:2]} after {previous}"
            previous = (event.disk, event.offset + length)
        disks[event.disk][event.offset : event.offset + length] = (
            event.data if isinstance(event, Data) else bytes(length)
        )
    coverage.require_complete()
    return Sample(archive.head, tuple(bytes(disk) for disk in disks))


def data_ranges(data: bytes, unit: int) -> list[ByteRange]:
    """The ranges of units that hold anything but zeros."""
    found: list[ByteRange] = []
    for start in range(0, len(data), unit):
        part = data[start : start + unit]
        if not part.strip(b"\0"):
            continue
        if found and found[-1].end == start:
            found[-1] = ByteRange(found[-1].offset, found[-1].length + len(part))
        else:
            found.append(ByteRange(start, len(part)))
    return found


def cut_events(content: Sample, capabilities: WriterCapabilities, seed: int) -> list[Event]:
    """Events for all disks, in pieces of random length up to a segment; in random order where that is allowed, but a
    VM's state ascending.

    Zeros come sometimes as such and sometimes as data. Where the writer has a map, zeros outside it are left out
    sometimes.
    """
    chance = random.Random(seed)
    events: list[Event] = []
    for disk, data in enumerate(content.contents):
        for start, end in _cuts(len(data), capabilities.unit_bytes, chance):
            part = data[start:end]
            if part.strip(b"\0") or (not capabilities.needs_map and chance.random() < 0.5):
                events.append(Data(disk, start, part))
            elif not capabilities.needs_map or chance.random() < 0.5:
                events.append(Zeros(disk, start, end - start))
    if capabilities.order is Order.ANY:
        chance.shuffle(events)
        state = [number for number, disk in enumerate(content.head.disks) if disk.is_vmstate]
        in_order = iter(sorted((e for e in events if e.disk in state), key=lambda event: event.offset))
        events = [next(in_order) if event.disk in state else event for event in events]
    return events


def _cuts(size: int, unit: int, chance: random.Random) -> Iterator[tuple[int, int]]:
    position = 0
    while position < size:
        units = chance.choice((1, 1, 3, 16, max(SEGMENT_BYTES // unit, 1)))
        end = min(size, position + units * unit)
        yield position, end
        position = end


@lru_cache(maxsize=64)
def random_bytes(size: int) -> bytes:
    """Bytes without a zero block."""
    return random.Random(size).randbytes(size)


@lru_cache(maxsize=64)
def mixed_bytes(size: int) -> bytes:
    """Data, zero blocks, zero clusters and blocks with one byte that is not zero, by turns; the end is data."""
    content = bytearray(size)
    chance = random.Random(size)
    position = 0
    while position < size:
        length = chance.choice((512, 4 * KiB, 12 * KiB, 64 * KiB, 192 * KiB))
        kind = chance.randrange(4)
        if kind == 0:
            content[position] = 1
        elif kind == 1:
            content[position : position + length] = chance.randbytes(min(length, size - position))
        position += length
    if size:
        content[-1] = 1
    return bytes(content)


class ArchiveConformance:
    """All the checks of one format."""

    def __init__(
        self,
        archive_format: ArchiveFormat,
        *,
        options: Mapping[str, object] | None = None,
        size_multiple: int = 1,
        keeps_names: bool = True,
        keeps_identity: bool = True,
        detects_truncation: bool = True,
    ) -> None:
        """``options``: for the writer. ``size_multiple``: sizes are rounded up to multiples of it. ``keeps_names``:
        disks have the same names after a round trip; ``keeps_identity``: and so have uuid, time and device ids.
        ``detects_truncation``: a reader can tell that the end is missing.
        """
        assert archive_format.reader is not None and archive_format.writer is not None
        self._format = archive_format
        self._options = dict(options or {})
        self._size_multiple = size_multiple
        self._keeps_names = keeps_names
        self._keeps_identity = keeps_identity
        self._detects_truncation = detects_truncation
        self._capabilities = self._writer().capabilities

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name and function of each check that applies."""
        for name in sorted(dir(self)):
            if name.startswith("check_"):
                yield name.removeprefix("check_"), getattr(self, name)

    def run(self) -> None:
        """All checks, one after the other."""
        for _name, check in self.checks():
            check()

    # --- what is written is read back

    def check_disks_of_all_sizes(self) -> None:
        for size in (1, 511, 512, 4096, 4097, 64 * KiB, 64 * KiB + 512, 70_001, 5 * MiB + 12_800):
            self._round_trip(self._sample([size]))

    def check_mixed_content(self) -> None:
        for seed in range(5):
            self._round_trip(self._sample([3 * MiB + seed * 4099], fill=mixed_bytes), seed=seed)

    def check_zeros(self) -> None:
        for size in (1, 64 * KiB, 9 * MiB + 512):
            self._round_trip(self._sample([size], fill=bytes), seed=size)

    def check_several_disks(self) -> None:
        sizes = [1 * MiB, 70_000, 512, 3 * MiB + 4096][: self._capabilities.max_disks]
        for seed in range(5):
            self._round_trip(self._sample(sizes, self._configs(), fill=mixed_bytes), seed=seed)

    def check_many_disks(self) -> None:
        count = min(self._capabilities.max_disks, 300)
        self._round_trip(self._sample([512 * (i % 9 + 1) for i in range(count)]))

    def check_too_many_disks(self) -> None:
        count = self._capabilities.max_disks + 1
        if count <= 100_000:
            self._refused(self._sample([512] * count, fill=bytes).head)

    def check_no_disk(self) -> None:
        content = self._sample([], self._configs())
        try:
            self._writer().check(content.head)
        except ArchiveLimit:
            return
        self._round_trip(content)

    def check_configs(self) -> None:
        if self._capabilities.configs:
            configs = [ArchiveConfig("empty", b""), ArchiveConfig("qemu-server.conf", b"cores: 2\n\0\xff" * 300)]
            self._round_trip(self._sample([4096], configs))

    def check_vmstate(self) -> None:
        if not self._capabilities.vmstate:
            return
        content = self._sample([200_000, 300_000], fill=mixed_bytes)
        state = replace(content.head.disks[1], name="vmstate", is_vmstate=True)
        head = replace(content.head, disks=(content.head.disks[0], state))
        self._round_trip(Sample(head, content.contents))

    # --- pipes

    def check_pipe_as_target(self) -> None:
        content = self._sample([200_000], fill=mixed_bytes)
        if self._capabilities.streams:
            assert self._write(content, seekable=False) == self._write(content, seekable=True)
        else:
            _raises(ArchiveUnsupported, lambda: write_archive(self._writer(), content, seekable=False))

    def check_pipe_as_source(self) -> None:
        content = self._sample([200_000], fill=mixed_bytes)
        data = self._write(content)
        if self._reader().capabilities.streams:
            self._compare(content, read_archive(self._reader(), data, seekable=False))
            self._compare(content, read_archive(self._reader(), data, seekable=True))
        else:
            _raises(ArchiveUnsupported, lambda: read_archive(self._reader(), data, seekable=False))

    # --- promises

    def check_same_input_same_bytes(self) -> None:
        sizes = [2 * MiB, 70_000][: self._capabilities.max_disks]
        content = self._sample(sizes, self._configs(), fill=mixed_bytes)
        assert self._write(content, seed=3) == self._write(content, seed=3)

    def check_recognised(self) -> None:
        data = self._write(self._sample([4096]))
        if self._format.recognises(data[:RECOGNISE_BYTES]):
            for other in (b"", b"\0" * RECOGNISE_BYTES, random_bytes(RECOGNISE_BYTES), data[:1]):
                assert not self._format.recognises(other), f"recognises {other[:16]!r}"
        assert self._format.suffixes and all(suffix.startswith(".") for suffix in self._format.suffixes)

    def check_incomplete_data_is_refused(self) -> None:
        if self._capabilities.needs_map:
            return
        target = MemoryTarget(seekable=not self._capabilities.streams)
        content = self._sample([1 * MiB])
        output = self._writer().open(target, content.head)
        output.write(0, 0, content.contents[0][: 512 * KiB])
        _raises(CasbackupError, output.finish)

    def check_sound_archive_has_no_findings(self) -> None:
        data = self._write(self._sample([1 * MiB + 512], self._configs(), fill=mixed_bytes))
        for quick in (False, True):
            found = list(verify(self._format, self._source(data), quick=quick))
            assert not found, f"{found}"

    def check_salvage_of_a_sound_archive(self) -> None:
        if self._format.salvager is not None:
            content = self._sample([1 * MiB + 512], self._configs(), fill=mixed_bytes)
            salvaged = self._format.salvager().open(MemorySource(self._write(content)))
            disk = bytearray(salvaged.head.disks[0].size_bytes)
            coverage = ArchiveCoverage(salvaged.head)
            for event in coverage.passing(salvaged.events()):
                if isinstance(event, Data):
                    disk[event.offset : event.offset + len(event.data)] = event.data
            coverage.require_complete()
            assert not salvaged.findings(), f"{salvaged.findings()}"
            self._compare(content, Sample(salvaged.head, (bytes(disk),)))

    # --- damage

    def check_truncated_archives(self) -> None:
        """Cut anywhere, an archive is an error or incomplete, unless nothing of its content was cut off."""
        if not self._detects_truncation:
            return
        content = self._sample([300_000], self._configs(), fill=mixed_bytes)
        data = self._write(content)
        chance = random.Random(7)
        places = {0, 1, 511, 512, 513, 4096, len(data) - 1, len(data) - 512, len(data) - 4096}
        for length in sorted(places | {chance.randrange(len(data)) for _ in range(40)}):
            cut = data[: max(length, 0)]
            found = self._read_damaged(cut)
            if found is not None:
                self._compare(content, found)
            elif length > 0:
                assert any(f.is_error for f in verify(self._format, self._source(cut))), f"cut to {length}"

    def check_flipped_bits(self) -> None:
        """Whatever is flipped: a reader gives events within the disks or an error of casbackup."""
        data = self._write(self._sample([100_000], self._configs(), fill=mixed_bytes))
        chance = random.Random(8)
        for number in range(150):
            damaged = bytearray(data)
            place = chance.randrange(len(data) if number % 2 else min(len(data), 16 * KiB))
            damaged[place] ^= 1 << chance.randrange(8)
            self._read_damaged(bytes(damaged))
            list(verify(self._format, self._source(bytes(damaged))))

    def check_garbage(self) -> None:
        data = self._write(self._sample([100_000], fill=mixed_bytes))
        for garbage in (b"", b"\0" * 9999, random_bytes(30_000), data[:600] + random_bytes(30_000)):
            self._read_damaged(garbage)
            list(verify(self._format, self._source(garbage)))

    # --- helpers

    def _writer(self) -> ArchiveWriter:
        assert self._format.writer is not None
        return self._format.writer(**self._options)

    def _reader(self) -> ArchiveReader:
        assert self._format.reader is not None
        return self._format.reader()

    def _source(self, data: bytes) -> MemorySource:
        return MemorySource(data, seekable=not self._reader().capabilities.streams)

    def _sample(
        self,
        sizes: Sequence[int],
        configs: Sequence[ArchiveConfig] = (),
        *,
        fill: Callable[[int], bytes] = random_bytes,
    ) -> Sample:
        return sample(sizes, configs, fill=fill)

    def _configs(self) -> list[ArchiveConfig]:
        if not self._capabilities.configs:
            return []
        return [ArchiveConfig("qemu-server.conf", b"cores: 2\n"), ArchiveConfig("qemu-server.fw", b"[OPTIONS]\n")]

    def _write(self, content: Sample, *, seed: int = 0, seekable: bool | None = None) -> bytes:
        return write_archive(self._writer(), content, seed=seed, seekable=seekable)

    def _round_trip(self, content: Sample, *, seed: int = 0) -> None:
        self._compare(content, read_archive(self._reader(), self._write(content, seed=seed)))

    def _compare(self, content: Sample, found: Sample) -> None:
        """``found`` is ``content``, as far as the format keeps it."""
        assert len(found.contents) == len(content.contents)
        for disk, expected, got in zip(content.head.disks, content.contents, found.contents, strict=True):
            padded = expected + bytes(-len(expected) % self._size_multiple)
            assert got == padded, f"the content of a disk of {disk.size_bytes} bytes differs"
        if self._keeps_names:
            assert [(d.name, d.is_vmstate) for d in found.head.disks] == [
                (d.name, d.is_vmstate) for d in content.head.disks
            ]
        assert found.head.configs == (content.head.configs if self._capabilities.configs else ())
        if self._keeps_identity:
            assert (found.head.uuid, found.head.time_s) == (content.head.uuid, content.head.time_s)
            assert [d.device_id for d in found.head.disks] == [d.device_id for d in content.head.disks]

    def _refused(self, head: ArchiveHead) -> None:
        _raises(ArchiveLimit, lambda: self._writer().check(head))

    def _read_damaged(self, data: bytes) -> Sample | None:
        """What is read, or None when it is refused."""
        try:
            return read_archive(self._reader(), data)
        except CasbackupError:
            return None


def _raises(expected: type[CasbackupError], call: Callable[[], object]) -> None:
    try:
        call()
    except expected:
        return
    raise AssertionError(f"no {expected.__name__}")
