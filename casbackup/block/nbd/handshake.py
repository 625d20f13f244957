"""The fixed newstyle handshake, client side: from a fresh connection to the transmission phase."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.protocol import ExportFlag, ExportInfo
from casbackup.block.nbd.wire import Wire
from casbackup.errors import CasbackupError, NbdConnectionFailed, NbdProtocolError

_MAX_SIZE_BYTES = 1 << 63


def negotiate(wire: Wire, export: str, context: bytes = nbd.BASE_ALLOCATION) -> ExportInfo:
    """Choose the export, with structured replies and one meta context where the server has them.

    The order is the one that QEMU uses too: structured replies, meta context, GO.

    ``wire`` has been through ``greet``, and ``request_tls`` if there is to be TLS.

    :raise NbdConnectionFailed: when the server refuses the export or goes away.
    :raise NbdProtocolError: when it does not speak the fixed newstyle protocol as written.
    """
    name = export.encode("utf-8", "surrogateescape")
    structured = _request_structured_replies(wire)
    return _go(wire, name, structured, _request_context(wire, name, context) if structured else None)


def greet(wire: Wire) -> None:
    """The beginning of every connection. Errors as ``negotiate``."""
    init_magic, option_magic, flags = nbd.GREETING.unpack(wire.receive(nbd.GREETING.size))
    if init_magic != nbd.INIT_MAGIC:
        raise NbdProtocolError(f"{wire.peer} is not an NBD server")
    if option_magic == nbd.OLDSTYLE_MAGIC:
        raise NbdProtocolError(f"{wire.peer} speaks the oldstyle NBD protocol, which is not supported")
    if option_magic != nbd.OPTION_MAGIC or not flags & nbd.FLAG_FIXED_NEWSTYLE:
        raise NbdProtocolError(f"{wire.peer} does not speak the fixed newstyle NBD protocol")
    wire.send(nbd.CLIENT_FLAGS.pack(flags & (nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)))


def request_tls(wire: Wire) -> None:
    """The server agrees to TLS, which then begins. Errors as ``negotiate``."""
    for kind, payload in _option(wire, nbd.OPT_STARTTLS, b""):
        if kind & nbd.REP_ERROR:
            raise NbdConnectionFailed(f"{wire.peer}: no TLS: {_reason(kind, payload)}")
        if kind != nbd.REP_ACK:
            raise _unexpected(wire, kind)


def _request_structured_replies(wire: Wire) -> bool:
    for kind, _payload in _option(wire, nbd.OPT_STRUCTURED_REPLY, b""):
        if kind & nbd.REP_ERROR:
            return False
        if kind != nbd.REP_ACK:
            raise _unexpected(wire, kind)
    return True


def _request_context(wire: Wire, name: bytes, query: bytes) -> int | None:
    """The context's id; None when the server does not have it or does not know of contexts."""
    data = _counted(name) + struct.pack(">I", 1) + _counted(query)
    context: int | None = None
    for kind, payload in _option(wire, nbd.OPT_SET_META_CONTEXT, data):
        if kind & nbd.REP_ERROR:
            return None
        if kind == nbd.REP_META_CONTEXT and payload[4:] == query:
            context = int.from_bytes(payload[:4], "big")
        elif kind != nbd.REP_ACK:
            raise _unexpected(wire, kind)
    return context


def _go(wire: Wire, name: bytes, structured: bool, context: int | None) -> ExportInfo:
    data = _counted(name) + struct.pack(">HH", 1, nbd.INFO_BLOCK_SIZE)
    export: tuple[int, ExportFlag] | None = None
    sizes = (1, 4096, nbd.DEFAULT_MAX_BLOCK_BYTES)
    for kind, payload in _option(wire, nbd.OPT_GO, data):
        if kind & nbd.REP_ERROR:
            raise _refused(wire, name, kind, payload)
        if kind == nbd.REP_INFO and payload[:2] == struct.pack(">H", nbd.INFO_EXPORT):
            export = _export(wire, payload)
        elif kind == nbd.REP_INFO and payload[:2] == struct.pack(">H", nbd.INFO_BLOCK_SIZE):
            sizes = _block_sizes(wire, payload)
        elif kind not in (nbd.REP_ACK, nbd.REP_INFO):
            raise _unexpected(wire, kind)
    if export is None:
        raise NbdProtocolError(f"{wire.peer}: the server did not tell the size of the export")
    return ExportInfo(*export, structured, context, *sizes)


def _export(wire: Wire, payload: bytes) -> tuple[int, ExportFlag]:
    if len(payload) != nbd.INFO_EXPORT_LAYOUT.size:
        raise NbdProtocolError(f"{wire.peer}: the description of the export has {len(payload)} bytes")
    _kind, size_bytes, flags = nbd.INFO_EXPORT_LAYOUT.unpack(payload)
    if size_bytes >= _MAX_SIZE_BYTES:
        raise NbdProtocolError(f"{wire.peer}: an export of {size_bytes} bytes is not possible")
    return size_bytes, ExportFlag(flags)


def _block_sizes(wire: Wire, payload: bytes) -> tuple[int, int, int]:
    """Minimum, preferred, maximum. What requests depend on is checked; the preference is only corrected."""
    if len(payload) != nbd.INFO_BLOCK_SIZE_LAYOUT.size:
        raise NbdProtocolError(f"{wire.peer}: the block sizes have {len(payload)} bytes")
    _kind, least, preferred, most = nbd.INFO_BLOCK_SIZE_LAYOUT.unpack(payload)
    if not 0 < least <= nbd.MAX_MIN_BLOCK_BYTES or least & (least - 1) or most < least:
        raise NbdProtocolError(f"{wire.peer}: block sizes {least} to {most} are not possible")
    return least, max(least, preferred), most - most % least


def _option(wire: Wire, option: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Send an option and yield its replies (type, payload), the last of which is an ACK or an error."""
    deadline = time.monotonic() + wire.timeout_s
    wire.send(nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, option, len(data)), data)
    for _ in range(nbd.MAX_OPTION_REPLIES):
        kind, payload = _option_reply(wire, option)
        yield kind, payload
        if kind == nbd.REP_ACK or kind & nbd.REP_ERROR:
            return
        wire.check(deadline)
    raise NbdProtocolError(f"{wire.peer}: the server does not come to an end during the handshake")


def _option_reply(wire: Wire, option: int) -> tuple[int, bytes]:
    magic, answered, kind, length = nbd.OPTION_REPLY.unpack(wire.receive(nbd.OPTION_REPLY.size))
    if magic != nbd.REPLY_MAGIC or answered != option:
        raise NbdProtocolError(f"{wire.peer}: the reply to option {option} makes no sense")
    if length > nbd.MAX_OPTION_REPLY_BYTES:
        raise NbdProtocolError(f"{wire.peer}: the reply to option {option} has {length} bytes")
    return kind, wire.receive(length)


def _counted(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def _unexpected(wire: Wire, kind: int) -> CasbackupError:
    return NbdProtocolError(f"{wire.peer}: reply of type {kind:#x} where it is not expected")


def _refused(wire: Wire, name: bytes, kind: int, payload: bytes) -> CasbackupError:
    return NbdConnectionFailed(f"{wire.peer}: export {nbd.printable(name)!r}: {_reason(kind, payload)}")


def _reason(kind: int, payload: bytes) -> str:
    reason = nbd.REP_ERROR_TEXT.get(kind, f"error {kind:#x}")
    return f"{reason} ({nbd.printable(payload)})" if payload else reason
