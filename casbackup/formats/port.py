"""The port of archive formats: what a plugin implements to be read from and written to.

An archive is a *head* (disks and config blobs) and a stream of *events*: this range of that disk has these bytes, or
is zero. Events may come in any order, disks interleaved, each byte of each disk exactly once. The same boundary
stands between live sources and what consumes them, so that everything that is read can be stored in a repository
or written in any other format, without temporary files where both sides permit it.

A format is an ``ArchiveFormat``, found by entry point in the group ``casbackup.formats`` and recognised by its first
bytes. ``casbackup.testing.archives`` has the conformance suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

from casbackup.formats.findings import Finding
from casbackup.fs import Buffer

ENTRY_POINTS = "casbackup.formats"

RECOGNISE_BYTES = 1024
"""How much of an archive's beginning a format is shown to recognise it by."""


@dataclass(frozen=True, slots=True)
class ArchiveDisk:
    """A disk as its archive names it, which may be anything: whoever makes files or records of it checks the name.

    ``device_id``: the number that the archive gave it, kept so that an export can give it again; None: none.
    """

    name: str
    size_bytes: int
    device_id: int | None = None
    is_vmstate: bool = False
    """RAM and device state of the VM instead of a disk."""


@dataclass(frozen=True, slots=True)
class ArchiveConfig:
    """A named blob of configuration. The name is the archive's: check it before use as a file's."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class ArchiveHead:
    """All that is known of an archive before its data. ``uuid`` has 16 bytes; ``time_s`` is Unix time."""

    disks: tuple[ArchiveDisk, ...]
    configs: tuple[ArchiveConfig, ...] = ()
    uuid: bytes | None = None
    time_s: int | None = None


class Data(NamedTuple):
    """``data`` stands at ``offset`` of the disk with this place in ``head.disks``.

    ``data`` is lent: it is valid until the next event is asked for.
    """

    disk: int
    offset: int
    data: Buffer


class Zeros(NamedTuple):
    """``length`` bytes from ``offset`` of a disk are zero."""

    disk: int
    offset: int
    length: int


Event = Data | Zeros


class ByteRange(NamedTuple):
    """``length`` bytes from ``offset``."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class ByteSource(Protocol):
    """Where an archive is read from: plain bytes (decompressed), from a file or a pipe."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def seekable(self) -> bool: ...

    @property
    def size_bytes(self) -> int | None:
        """Of the whole archive where that is known beforehand, as for a file; always known if ``seekable``."""

    def read_into(self, buffer: memoryview) -> int:
        """Fill the buffer; returns less than its length only at the end.

        :raise SourceError: when reading fails. :raise ArchiveDamaged: when what is decompressed is damaged.
        """

    def seek(self, offset: int) -> None:
        """Only if ``seekable``."""

    def tell(self) -> int: ...


@runtime_checkable
class SparseSource(ByteSource, Protocol):
    """A seekable source that knows its holes: what a file with SEEK_DATA may offer besides."""

    def next_data(self, offset: int) -> ByteRange | None:
        """The first range from ``offset`` on that may hold anything but zeros; None: there is none up to the end."""


class ByteTarget(Protocol):
    """Where an archive is written to."""

    @property
    def seekable(self) -> bool: ...

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Write all of all buffers. They stay the caller's.

        :raise TargetError: when writing fails; a reader that went away is a ``TargetClosed``.
        """

    def seek(self, offset: int) -> None:
        """Only if ``seekable``. Past the end leaves a hole."""

    def tell(self) -> int: ...


class Order(Enum):
    """In which order events come or must come."""

    ANY = "any"
    """Except that a VM's state comes from its beginning to its end, others' data perhaps in between."""
    ASCENDING = "ascending"
    """Disk after disk in the order of the head, each from its beginning to its end."""


@dataclass(frozen=True, slots=True)
class ReaderCapabilities:
    """``streams``: can be read from a pipe, in one pass. ``order``: what may be relied on."""

    streams: bool
    order: Order


@dataclass(frozen=True, slots=True)
class WriterCapabilities:
    """What a writer demands and offers; constant for a writer and its options."""

    streams: bool
    """Can write to a pipe. Otherwise the target must be seekable."""
    order: Order
    """In which order it takes events."""
    needs_map: bool
    """It must know beforehand which ranges of each disk hold data."""
    unit_bytes: int
    """Events must start at multiples of this and end there or at the disk's end."""
    max_disks: int
    configs: bool = True
    """Keeps configs; without it they are left out, and the exporter says so."""
    vmstate: bool = False


class Archive(Protocol):
    """An archive that is being read: the head has been, the data comes next."""

    @property
    def head(self) -> ArchiveHead: ...

    def events(self) -> Iterator[Event]:
        """All data, once. Ranges that never come are the consumer's to find (``formats.coverage``).

        :raise ArchiveDamaged: where the archive contradicts itself or ends too early.
        """


class ArchiveReader(Protocol):
    @property
    def capabilities(self) -> ReaderCapabilities: ...

    def open(self, source: ByteSource) -> Archive:
        """Read as far as the head.

        :raise ArchiveDamaged: when that is damaged. :raise ArchiveUnsupported: when it is a variant that this does
            not read.
        """


class ArchiveOutput(Protocol):
    """An archive that is being written. Give it every byte of every disk once, then ``finish``.

    What is not given when ``finish`` is called reads as zeros where ``needs_map`` is set and is an error elsewhere.
    After an error the output is of no use; removing what was written is the caller's.
    """

    def write(self, disk: int, offset: int, data: Buffer) -> None:
        """``data`` stays the caller's and may change after the call. Blocks of zeros in it are found by the writer."""

    def zeros(self, disk: int, offset: int, length: int) -> None: ...

    def finish(self) -> None:
        """Write what belongs at the end. Does not close or sync the target."""


class ArchiveWriter(Protocol):
    @property
    def capabilities(self) -> WriterCapabilities: ...

    def check(self, head: ArchiveHead) -> None:
        """Before anything is written.

        :raise ArchiveLimit: when the format cannot hold this: number, names or sizes of disks and configs.
        """

    def open(
        self, target: ByteTarget, head: ArchiveHead, maps: Sequence[Sequence[ByteRange]] | None = None
    ) -> ArchiveOutput:
        """Write the head at once, so that whoever reads a pipe sees it, and take the data.

        ``maps``: for each disk, the ranges that hold data, in order and not touching; given if ``needs_map``.
        The same head, maps and events give the same bytes.
        """


class ArchiveVerifier(Protocol):
    """Looks for all that is wrong with an archive. Formats without one are verified by reading them
    (``formats.verify``).
    """

    def findings(self, source: ByteSource, *, quick: bool = False) -> Iterator[Finding]:
        """Everything that is wrong, as it is found; never stops at the first. What is missing comes last.

        ``quick``: read no more than the format's own structures, and skip the data where the source can seek.

        :raise SourceError: when reading fails. Damage is a finding, never raised; so is what is decompressed being
            damaged (``ArchiveDamaged`` of the source), after which nothing more can be read.
        """


class SalvagedArchive(Archive, Protocol):
    """What could be rescued of a damaged archive. ``events`` raises no ``ArchiveDamaged``; no byte comes twice."""

    def findings(self) -> Sequence[Finding]:
        """What was damaged and what is lost: all of it once ``events`` has ended."""


class ArchiveSalvager(Protocol):
    def open(self, source: ByteSource) -> SalvagedArchive:
        """Search the whole archive for what is intact; the data is read by ``events``.

        :raise ArchiveUnsupported: when the source cannot seek.
        :raise ArchiveDamaged: when there is nothing in it to rescue.
        """


@dataclass(frozen=True, slots=True)
class ArchiveFormat:
    """A format plugin. ``options`` of a writer are the names that ``writer`` takes as keywords, with their meaning."""

    name: str
    summary: str
    suffixes: tuple[str, ...]
    """Endings of file names, with the dot; the first is the one that is given to new files."""
    recognises: Callable[[bytes], bool]
    """Told from the first ``RECOGNISE_BYTES`` (or fewer) bytes."""
    reader: Callable[[], ArchiveReader] | None = None
    writer: Callable[..., ArchiveWriter] | None = None
    options: tuple[tuple[str, str], ...] = ()
    verifier: Callable[[], ArchiveVerifier] | None = None
    salvager: Callable[[], ArchiveSalvager] | None = None
