"""The transmission phase, server side: one connection's requests, answered in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from casbackup import limits
from casbackup.block.buffers import MAX_BUFFER_BYTES
from casbackup.block.device import Extent
from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.exports import Receiver
from casbackup.block.nbd.haggling import Chosen
from casbackup.block.nbd.protocol import Command, Errno
from casbackup.block.nbd.wire import Wire
from casbackup.buffers import aligned_buffer
from casbackup.errors import CasbackupError, NbdProtocolError
from casbackup.units import KiB

_MIN_HOLE_BYTES = 32 * KiB
"""Shorter runs of zeros within what is read are sent as data: cheaper than a chunk of their own."""
_SINK_GRANULE_BYTES = 512
"""QEMU rounds the size of a disk up to this and writes up to there, past what it was told is the end."""

_KNOWN_FLAGS: dict[int, int] = {
    Command.READ: nbd.CMD_FLAG_DF,
    Command.WRITE: nbd.CMD_FLAG_FUA,
    Command.WRITE_ZEROES: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE,
    Command.TRIM: nbd.CMD_FLAG_FUA,
    Command.FLUSH: 0,
    Command.BLOCK_STATUS: nbd.CMD_FLAG_REQ_ONE,
}
_WITH_DATA = (Command.READ, Command.WRITE)
_CHANGES = (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)


class _Request(NamedTuple):
    flags: int
    command: int
    cookie: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class _Refused(Exception):
    """The request is not carried out; the client is told why."""

    def __init__(self, error: Errno, reason: str) -> None:
        super().__init__(reason)
        self.error = error


class Session:
    """Payload is received into, and sent from, one buffer that is used again, or a receiver's own.

    Every request is checked here: the device sees only calls that are allowed.
    """

    def __init__(self, wire: Wire, chosen: Chosen) -> None:
        self._wire = wire
        self._device = chosen.device
        self._receiver = chosen.export.receiver
        self._structured = chosen.structured
        self._context = chosen.context
        self._header = memoryview(bytearray(nbd.REQUEST.size))
        self._buffer = memoryview(b"")
        self._handlers: dict[int, Callable[[_Request], None]] = {
            Command.READ: self._read,
            Command.WRITE: self._write,
            Command.WRITE_ZEROES: self._write_zeros,
            Command.TRIM: self._trim,
            Command.FLUSH: self._flush,
            Command.BLOCK_STATUS: self._block_status,
        }

    def run(self) -> None:
        """Serve until the client disconnects, properly or not between two requests.

        :raise NbdProtocolError: when it does not keep to the protocol so that no answer is possible.
        :raise NbdConnectionFailed: when the connection ends or stalls within a request.
        """
        while self._wire.receive_next(self._header):
            magic, *fields = nbd.REQUEST.unpack(self._header)
            if magic != nbd.REQUEST_MAGIC:
                raise NbdProtocolError(f"{self._wire.peer}: a request begins with {magic:#010x}")
            request = _Request(*fields)
            if request.command == Command.DISC:
                return
            self._serve(request)

    def _serve(self, request: _Request) -> None:
        try:
            self._check(request)
        except _Refused as refused:
            self._skip_payload(request)
            self._refuse(request, refused)
            return
        try:
            self._handlers[request.command](request)
        except _Refused as refused:
            self._fail(request, refused)

    def _check(self, request: _Request) -> None:
        """:raise _Refused: when the request is not allowed."""
        known = _KNOWN_FLAGS.get(request.command)
        if known is None:
            raise _Refused(Errno.EINVAL, f"unknown command {request.command}")
        if request.flags & ~known:
            raise _Refused(Errno.EINVAL, f"unknown flags {request.flags:#x}")
        if request.command == Command.FLUSH:
            return
        if request.command in _CHANGES and not self._device.capabilities.writable:
            raise _Refused(Errno.EPERM, "the export is read-only")
        if request.command in _WITH_DATA and request.length > limits.MAX_NBD_REQUEST_BYTES:
            raise _Refused(Errno.EOVERFLOW, "more data than a request may have")
        self._check_range(request)

    def _check_range(self, request: _Request) -> None:
        size_bytes = self._device.size_bytes
        room_bytes = -(-size_bytes // _SINK_GRANULE_BYTES) * _SINK_GRANULE_BYTES if self._receiver else size_bytes
        if request.end > room_bytes:
            error = Errno.ENOSPC if request.command in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL
            raise _Refused(error, "beyond the end of the export")
        block = self._device.capabilities.min_block_bytes
        if request.offset % block or (request.end % block and request.end != size_bytes):
            raise _Refused(Errno.EINVAL, f"not aligned to blocks of {block} bytes")

    def _refuse(self, request: _Request, refused: _Refused) -> None:
        """Say no; but a sink's writer is told yes, and the backup is lost instead."""
        if self._receiver is not None and request.command in _CHANGES:
            self._receiver.refuse(f"{self._wire.peer}: {_name(request)} refused: {refused}")
            self._acknowledge(request)
        else:
            self._fail(request, refused)

    def _skip_payload(self, request: _Request) -> None:
        """Receive what belongs to a request that is not carried out."""
        if request.command != Command.WRITE:
            return
        if request.length > limits.MAX_NBD_REQUEST_BYTES:
            raise NbdProtocolError(f"{self._wire.peer}: a write of {request.length} bytes")
        for _offset, length in _pieces(request):
            self._wire.receive_into(self._buffer_of(length))

    # --- requests; each sends its own reply, or raises _Refused when the device fails

    def _read(self, request: _Request) -> None:
        if not self._structured:
            self._read_simple(request)
        elif request.length:
            self._read_chunks(request)
        else:
            self._send_chunk(request, nbd.CHUNK_NONE, b"", done=True)

    def _read_simple(self, request: _Request) -> None:
        data = self._buffer_of(request.length)
        if request.length:
            self._read_into(request.offset, data)
        self._wire.send(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, request.cookie), data)

    def _read_chunks(self, request: _Request) -> None:
        """Data is sent as soon as it is read, in chunks of up to 1 MiB; long zeros are not sent at all."""
        for extent in self._extents_to_read(request):
            done = extent.end == request.end
            if extent.zero:
                self._send_chunk(request, nbd.CHUNK_OFFSET_HOLE, nbd.HOLE.pack(extent.offset, extent.length), done=done)
            else:
                data = self._buffer_of(extent.length)
                self._read_into(extent.offset, data)
                self._send_chunk(request, nbd.CHUNK_OFFSET_DATA, nbd.DATA_OFFSET.pack(extent.offset), data, done=done)

    def _read_into(self, offset: int, data: memoryview) -> None:
        with _device_errors():
            self._device.read_into(offset, data)

    def _extents_to_read(self, request: _Request) -> Iterator[Extent]:
        """The range in pieces: zeros worth telling of, and data of up to 1 MiB."""
        if request.flags & nbd.CMD_FLAG_DF or not self._device.capabilities.knows_zeros:
            step = request.length if request.flags & nbd.CMD_FLAG_DF else MAX_BUFFER_BYTES
            yield from _split(request.offset, request.end, step)
            return
        start = request.offset
        for extent in self._extents(request):
            if extent.zero and (extent.length >= _MIN_HOLE_BYTES or extent.length == request.length):
                yield from _split(start, extent.offset, MAX_BUFFER_BYTES)
                yield extent
                start = extent.end
        yield from _split(start, request.end, MAX_BUFFER_BYTES)

    def _extents(self, request: _Request) -> Iterator[Extent]:
        with _device_errors():
            yield from self._device.extents(request.offset, request.length)

    def _write(self, request: _Request) -> None:
        if self._receiver is not None:
            self._receive(request, self._receiver)
            self._acknowledge(request)
            return
        failure: _Refused | None = None
        for offset, length in _pieces(request):
            data = self._buffer_of(length)
            self._wire.receive_into(data)
            if failure is None:
                failure = self._written(offset, data)
        if failure is not None:
            raise failure
        self._finish(request)

    def _written(self, offset: int, data: memoryview) -> _Refused | None:
        """Write a piece; what went wrong, for the rest of the payload has to be received first."""
        try:
            with _device_errors():
                self._device.write(offset, data)
        except _Refused as refused:
            return refused
        return None

    def _receive(self, request: _Request, receiver: Receiver) -> None:
        for offset, length in _pieces(request):
            room = receiver.room(length)
            try:
                self._wire.receive_into(room)
            except BaseException:
                receiver.give_back(room)
                raise
            receiver.receive(offset, room)

    def _write_zeros(self, request: _Request) -> None:
        may_trim = not request.flags & nbd.CMD_FLAG_NO_HOLE
        if request.length:
            with _device_errors():
                self._device.write_zeros(request.offset, request.length, may_trim=may_trim)
        self._finish(request)

    def _trim(self, request: _Request) -> None:
        if request.length:
            with _device_errors():
                self._device.discard(request.offset, request.length)
        self._finish(request)

    def _flush(self, request: _Request) -> None:
        with _device_errors():
            self._device.flush()
        self._acknowledge(request)

    def _block_status(self, request: _Request) -> None:
        if self._context is None or not request.length:
            raise _Refused(Errno.EINVAL, "no context was agreed on, or an empty range")
        most = 1 if request.flags & nbd.CMD_FLAG_REQ_ONE else limits.MAX_NBD_STATUS_EXTENTS
        extents = list(islice(self._extents(request), most))
        zero = nbd.STATE_HOLE | nbd.STATE_ZERO
        descriptors = (nbd.STATUS_DESCRIPTOR.pack(extent.length, zero if extent.zero else 0) for extent in extents)
        self._send_chunk(
            request, nbd.CHUNK_BLOCK_STATUS, nbd.STATUS_CONTEXT.pack(self._context), b"".join(descriptors), done=True
        )

    # --- replies

    def _finish(self, request: _Request) -> None:
        """The change is made: bring it to the disk if that was asked for, and say so."""
        if request.flags & nbd.CMD_FLAG_FUA:
            with _device_errors():
                self._device.flush()
        self._acknowledge(request)

    def _acknowledge(self, request: _Request) -> None:
        self._wire.send(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, request.cookie))

    def _fail(self, request: _Request, refused: _Refused) -> None:
        if not self._structured:
            self._wire.send(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, refused.error, request.cookie))
            return
        text = str(refused).encode("utf-8", "replace")[: nbd.MAX_ERROR_TEXT_BYTES]
        payload = nbd.CHUNK_ERROR.pack(refused.error, len(text)) + text
        self._send_chunk(request, nbd.CHUNK_ERROR_PLAIN, payload, done=True)

    def _send_chunk(
        self, request: _Request, kind: int, start: bytes, payload: bytes | memoryview = b"", *, done: bool
    ) -> None:
        flags = nbd.CHUNK_FLAG_DONE if done else 0
        length = len(start) + len(payload)
        header = nbd.CHUNK_HEADER.pack(nbd.STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length)
        self._wire.send(header + start, payload)

    def _buffer_of(self, length: int) -> memoryview:
        """The session's own buffer, or a new one for the rare answer that must be in one piece beyond 1 MiB."""
        if length > MAX_BUFFER_BYTES:
            return memoryview(bytearray(length))
        if not self._buffer:
            self._buffer = memoryview(aligned_buffer(MAX_BUFFER_BYTES))
        return self._buffer[:length]


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """The device's errors, and only those: one of the connection must not be answered on it."""
    try:
        yield
    except CasbackupError as error:
        raise _Refused(_errno(error), error.message) from error


def _pieces(request: _Request) -> Iterator[tuple[int, int]]:
    """(offset, length) of the payload in pieces of up to 1 MiB."""
    for offset in range(request.offset, request.end, MAX_BUFFER_BYTES):
        yield offset, min(MAX_BUFFER_BYTES, request.end - offset)


def _split(start: int, end: int, step: int) -> Iterator[Extent]:
    for offset in range(start, end, step):
        yield Extent(offset, min(step, end - offset), False)


def _name(request: _Request) -> str:
    return f"{Command(request.command).text} of {request.length} bytes at {request.offset}"


def _errno(error: CasbackupError) -> Errno:
    """What the protocol can say of an error: the system's own number where it knows it."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in (Errno.EPERM, Errno.ENOMEM, Errno.ENOSPC):
        return Errno(cause.errno)
    return Errno.EIO
