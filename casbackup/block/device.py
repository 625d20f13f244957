"""The BlockDevice port: what a backup reads from, a restore writes to, and a filter is stacked on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from casbackup.fs import Buffer


class Extent(NamedTuple):
    """A span of a device, in bytes. ``zero``: it reads as zeros and need not be read."""

    offset: int
    length: int
    zero: bool

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device can do. Asked once; never changes while the device is open."""

    writable: bool = False
    can_write_zeros: bool = False
    """``write_zeros`` is an operation of its own; without it the device writes literal zeros."""
    zero_is_cheap: bool = False
    """``write_zeros`` costs far less than writing, because it leaves a hole or the storage does it."""
    can_trim: bool = False
    """``discard`` may give space back; without it, it does nothing."""
    knows_zeros: bool = False
    """``extents`` may find zeros; without it the whole device is reported as data."""
    multi_conn: bool = False
    """Calls by several threads run at once rather than in turn."""
    min_block_bytes: int = 1
    """Offsets and lengths must be multiples of this; only the end of the device is exempt."""
    preferred_block_bytes: int = 4096
    """Requests aligned to this avoid read-modify-write below."""


class BlockDevice(Protocol):
    """A fixed number of bytes that can be read and perhaps written at any offset.

    **Who checks.** An implementation may assume that a call is valid: the range lies within the device and is
    aligned to ``min_block_bytes``, lengths are above zero, buffers are contiguous bytes, the device is open,
    and writable if written to. ``Guarded`` checks that and raises ``ValueError``, for a wrong call is a fault
    of the program and not of the storage. Whoever opens a device for others hands it out guarded.

    **Threads.** Any number of threads may call any method but ``close`` at once. Calls on ranges that do not
    overlap do not disturb each other. When a write overlaps another call in time and range, each byte read or
    left behind is the old or the new one, nothing more is promised. ``close`` is called once no other call is
    under way; closing twice is harmless.

    **Buffers** stay the caller's. They are filled or read during the call and not kept after it.

    **Errors** of the storage are ``CasbackupError``s: ``SourceUnreadable`` or ``SourceChanged`` where reading
    fails, ``TargetUnwritable`` where writing fails, an ``NbdError`` where the device is behind NBD, and what
    the implementation names beyond these. After a failed read the buffer's content is undefined; after a
    failed write that of the range is. Nothing is retried below this port.

    **Durability.** What was written survives a crash once a ``flush`` that began after the write returned.
    """

    @property
    def size_bytes(self) -> int:
        """The size when the device was opened. Any number, not only multiples of 512."""

    @property
    def capabilities(self) -> Capabilities: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer with the bytes from ``offset`` on. A short read is an error, not a result."""

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data`` at ``offset``."""

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        """Afterwards the range reads as zeros.

        ``may_trim``: its space may be given back, so that a later write to it may fail for lack of space.
        """

    def discard(self, offset: int, length: int) -> None:
        """Hint that the range is no longer needed: its content is undefined afterwards. May do nothing."""

    def flush(self) -> None:
        """See *Durability* above. Does nothing on a device that is not writable."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Cover the range with extents in order, without gaps or overlaps, adjacent ones of a kind merged.

        The statuses are taken while the iterator advances, not all at the beginning. Errors as for reading.
        """

    def changed_size(self) -> int | None:
        """The size now, in bytes, if it is not ``size_bytes`` any more; None if it is or cannot be known."""

    def close(self) -> None:
        """Give up what the device holds. Does not flush."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""


class Closing(ABC):
    """Makes a context manager of what has ``close``."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same coverage with adjacent extents of a kind made one. Input must be in order; gaps stay."""
    pending: Extent | None = None
    for extent in extents:
        if pending is None:
            pending = extent
        elif pending.zero == extent.zero and pending.end == extent.offset:
            pending = Extent(pending.offset, pending.length + extent.length, pending.zero)
        else:
            yield pending
            pending = extent
    if pending is not None:
        yield pending


def read_bytes(device: BlockDevice, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset`` as a new object; for small reads, where a copy does not matter."""
    buffer = bytearray(length)
    if length:
        device.read_into(offset, memoryview(buffer))
    return bytes(buffer)
