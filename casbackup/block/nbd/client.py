"""A block device behind an NBD server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from casbackup.block.device import Capabilities, Closing, Extent, merged
from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.connection import Connection
from casbackup.block.nbd.pool import Pool
from casbackup.block.nbd.protocol import Command, ExportFlag, ExportInfo
from casbackup.block.nbd.request import Request
from casbackup.block.nbd.uri import NbdAddress, parse_uri
from casbackup.errors import NbdProtocolError, NbdRequestFailed
from casbackup.fs import Buffer
from casbackup.units import GiB, MiB

MAX_CONNECTIONS = 4
"""Connections to a server that allows several. qemu-nbd must be started with at least this ``--shared``."""

_PAYLOAD_BYTES = 1 * MiB
"""Data of one request. Larger ones gain nothing, and QEMU's own client sends no more either."""
_STATUS_STEP_BYTES = 1 * GiB
_ZERO_STEP_BYTES = 64 * MiB
"""A server without a hole operation writes zeros literally; a step must not take it longer than a timeout."""
_FLUSH_TIMEOUT_FACTOR = 10


class NbdClient(Closing):
    """Reads and writes go out as several requests at a time, straight from and into the caller's buffers.

    Several threads share the device over several connections if the server allows that, else in turn.

    Every method may raise

    * ``NbdRequestFailed``: the server reported an error; the device stays usable.
    * ``NbdProtocolError``: it broke the protocol; the device is not usable any more.
    * ``NbdConnectionFailed``: it went away, or did not answer in time; the same.
    """

    def __init__(self, pool: Pool, timeout_s: float, *, whole_reads: bool = False) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._info = pool.info
        self._payload_bytes = min(_PAYLOAD_BYTES, self._info.max_block_bytes)
        self._read_flags = nbd.CMD_FLAG_DF if whole_reads and ExportFlag.SEND_DF in self._info.flags else 0
        self.size_bytes = self._info.size_bytes
        self.capabilities = _capabilities(self._info)

    @classmethod
    def connect(
        cls,
        address: NbdAddress | str,
        *,
        connect_timeout_s: float = 10.0,
        timeout_s: float = 60.0,
        max_connections: int = MAX_CONNECTIONS,
        whole_reads: bool = False,
    ) -> NbdClient:
        """Connect to the export of an address or URI.

        ``timeout_s`` bounds each reply, ten times that a flush. ``max_connections`` counts only for servers
        that allow several. ``whole_reads``: no holes within what is read. QEMU hangs up when it cannot read, if it
        looks for holes meanwhile; without, it reports the error.

        :raise UsageError: for a URI that is malformed, or certificates that cannot be used.
        :raise NbdConnectionFailed: when there is no server, or it refuses the export.
        :raise NbdProtocolError: when it does not speak the fixed newstyle protocol.
        """
        target = parse_uri(address) if isinstance(address, str) else address

        def open_one() -> Connection:
            return Connection.open(target, connect_timeout_s=connect_timeout_s, timeout_s=timeout_s)

        return cls(open_pool(open_one(), open_one, max_connections), timeout_s, whole_reads=whole_reads)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self._connection() as connection:
            connection.run(self._pieces(Command.READ, offset, buffer, self._read_flags))

    def write(self, offset: int, data: Buffer) -> None:
        with self._connection() as connection:
            connection.run(self._pieces(Command.WRITE, offset, memoryview(data)))

    def write_zeros(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        if ExportFlag.SEND_WRITE_ZEROES not in self._info.flags:
            self._write_literal_zeros(offset, length)
            return
        flags = 0 if may_trim else nbd.CMD_FLAG_NO_HOLE
        steps = _steps(offset, length, _ZERO_STEP_BYTES)
        with self._connection() as connection:
            connection.run(Request(Command.WRITE_ZEROES, at, count, flags=flags) for at, count in steps)

    def discard(self, offset: int, length: int) -> None:
        if ExportFlag.SEND_TRIM in self._info.flags:
            steps = _steps(offset, length, _ZERO_STEP_BYTES)
            with self._connection() as connection:
                connection.run(Request(Command.TRIM, at, count) for at, count in steps)

    def flush(self) -> None:
        if ExportFlag.SEND_FLUSH in self._info.flags:
            with self._connection() as connection:
                connection.flush(self._timeout_s * _FLUSH_TIMEOUT_FACTOR)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What the server cannot tell the status of is reported as data: reading it then shows why."""
        if self._info.context is None:
            return iter([Extent(offset, length, False)])
        return merged(self._statuses(offset, offset + length))

    def changed_size(self) -> int | None:
        """None: the protocol has no way to ask."""
        return None

    def close(self) -> None:
        self._pool.close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection for one call; where a subclass explains why there is none any more."""
        with self._pool.connection() as connection:
            yield connection

    def _pieces(self, command: Command, offset: int, view: memoryview, flags: int = 0) -> Iterator[Request]:
        for at, count in _steps(offset, len(view), self._payload_bytes):
            yield Request(command, at, count, view[at - offset : at - offset + count], flags)

    def _write_literal_zeros(self, offset: int, length: int) -> None:
        zeros = memoryview(bytes(min(self._payload_bytes, length)))
        steps = _steps(offset, length, self._payload_bytes)
        with self._connection() as connection:
            connection.run(Request(Command.WRITE, at, count, zeros[:count]) for at, count in steps)

    def _statuses(self, start: int, end: int) -> Iterator[Extent]:
        while start < end:
            request = Request(Command.BLOCK_STATUS, start, min(_STATUS_STEP_BYTES, end - start))
            try:
                with self._connection() as connection:
                    connection.run([request])
            except NbdRequestFailed:
                yield Extent(start, request.length, False)
                start += request.length
                continue
            for extent in self._decoded(request):
                yield extent
                start = extent.end

    def _decoded(self, request: Request) -> Iterator[Extent]:
        """The descriptors of a reply as extents within the request. They may end early, the last one late.

        :raise NbdProtocolError: for empty or unaligned ones, and ones past the export or request.
        """
        position, end = request.offset, request.offset + request.length
        for length, flags in nbd.STATUS_DESCRIPTOR.iter_unpack(request.status or b""):
            stop = position + length
            if not length or position >= end or stop > self.size_bytes or self._unaligned(stop):
                raise NbdProtocolError(f"the NBD server gave a status for {length} bytes at {position}")
            yield Extent(position, min(stop, end) - position, bool(flags & nbd.STATE_ZERO))
            position = stop

    def _unaligned(self, offset: int) -> bool:
        return bool(offset % self._info.min_block_bytes) and offset != self.size_bytes


def open_pool(first: Connection, more: Callable[[], Connection], max_connections: int) -> Pool:
    """A pool of up to ``max_connections`` if the server allows several, else of one. Takes over ``first``."""
    several = ExportFlag.CAN_MULTI_CONN in first.info.flags
    return Pool(first, more, max_connections if several else 1)


def _steps(offset: int, length: int, step_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces of a range, each of at most ``step_bytes``."""
    end = offset + length
    for start in range(offset, end, step_bytes):
        yield start, min(step_bytes, end - start)


def _capabilities(info: ExportInfo) -> Capabilities:
    writable = ExportFlag.READ_ONLY not in info.flags
    zeroes = ExportFlag.SEND_WRITE_ZEROES in info.flags
    return Capabilities(
        writable=writable,
        can_write_zeros=writable and zeroes,
        zero_is_cheap=writable and zeroes,
        can_trim=writable and ExportFlag.SEND_TRIM in info.flags,
        knows_zeros=info.context is not None,
        multi_conn=ExportFlag.CAN_MULTI_CONN in info.flags,
        min_block_bytes=info.min_block_bytes,
        preferred_block_bytes=info.preferred_block_bytes,
    )
