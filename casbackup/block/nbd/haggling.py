"""The fixed newstyle handshake, server side: from a fresh connection to the export that the client chose."""

from __future__ import annotations

import contextlib
import ssl
import struct
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from casbackup import limits
from casbackup.block.device import BlockDevice
from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.exports import Export
from casbackup.block.nbd.protocol import ExportFlag
from casbackup.block.nbd.tls import secure_server
from casbackup.block.nbd.wire import Wire
from casbackup.errors import CasbackupError, NbdConnectionFailed, NbdProtocolError
from casbackup.units import KiB, MiB

_FLAGS = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES
_MAX_SKIPPED_BYTES = 1 * MiB
"""An option with more data than this ends the connection; the data of a smaller one is skipped."""
_CONTEXT = 1
"""The id that we give to base:allocation."""
_SINK_BLOCK_BYTES = 64 * KiB
"""QEMU's clusters. A larger minimum would make it read from the sink and write ranges twice."""


class Chosen(NamedTuple):
    """What both sides have agreed on. The export has been acquired and is to be released."""

    export: Export
    device: BlockDevice
    structured: bool
    context: int | None
    """The id of base:allocation for block status."""


class Haggling:
    """One handshake. ``wire`` may be another object afterwards: the same connection with TLS."""

    def __init__(self, wire: Wire, exports: Mapping[bytes, Export], tls: ssl.SSLContext | None) -> None:
        """``tls``: demanded of the client; None: not offered."""
        self.wire = wire
        self._exports = exports
        self._tls = tls
        self._plain = tls is not None
        self._structured = False
        self._context_of: bytes | None = None
        self._padding = nbd.EXPORT_NAME_PADDING

    def run(self) -> Chosen | None:
        """The client's choice; None when it left without one.

        :raise NbdProtocolError: when it does not keep to the protocol.
        :raise NbdConnectionFailed: when it goes away or takes too long.
        """
        deadline = time.monotonic() + self.wire.timeout_s
        if not self._greet():
            return None
        for _ in range(limits.MAX_NBD_OPTIONS):
            option, data = self._receive_option()
            if option == nbd.OPT_ABORT:
                with contextlib.suppress(NbdConnectionFailed):  # it need not wait for that
                    self._reply(option, nbd.REP_ACK)
                return None
            if (chosen := self._answer(option, data)) is not None:
                return chosen
            self.wire.check(deadline)
        raise NbdProtocolError(f"{self.wire.peer}: more than {limits.MAX_NBD_OPTIONS} options")

    def _greet(self) -> bool:
        """False when the client goes at once: it only wanted to know whether somebody listens."""
        try:
            self.wire.send(nbd.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, _FLAGS))
            (flags,) = nbd.CLIENT_FLAGS.unpack(self.wire.receive(nbd.CLIENT_FLAGS.size))
        except NbdConnectionFailed as error:
            if isinstance(error.__cause__, ConnectionError):
                return False
            raise
        if flags & ~_FLAGS:
            raise NbdProtocolError(f"{self.wire.peer}: unknown flags {flags:#x}")
        if flags & nbd.FLAG_NO_ZEROES:
            self._padding = b""
        return True

    def _receive_option(self) -> tuple[int, bytes | None]:
        """Its number and data; None for data that is too long, which has been skipped."""
        magic, option, length = nbd.OPTION_HEADER.unpack(self.wire.receive(nbd.OPTION_HEADER.size))
        if magic != nbd.OPTION_MAGIC:
            raise NbdProtocolError(f"{self.wire.peer}: an option begins with {magic.hex()}")
        if length > _MAX_SKIPPED_BYTES:
            raise NbdProtocolError(f"{self.wire.peer}: an option of {length} bytes")
        data = self.wire.receive(length)
        return option, data if length <= limits.MAX_NBD_OPTION_BYTES else None

    def _answer(self, option: int, data: bytes | None) -> Chosen | None:
        if data is None:
            self._refuse(option, nbd.REP_ERR_TOO_BIG, "too much data")
        elif self._plain and option != nbd.OPT_STARTTLS:
            self._refuse(option, nbd.REP_ERR_TLS_REQD, "TLS is demanded")
        elif option == nbd.OPT_EXPORT_NAME:
            return self._choose_by_name(data)
        elif option in (nbd.OPT_INFO, nbd.OPT_GO):
            return self._inform(option, data)
        elif option in (nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT):
            self._tell_contexts(option, data)
        elif data:
            self._refuse(option, nbd.REP_ERR_INVALID, "data where none is expected")
        elif option == nbd.OPT_STARTTLS:
            self._start_tls()
        elif option == nbd.OPT_LIST:
            self._list()
        elif option == nbd.OPT_STRUCTURED_REPLY:
            self._structured = True
            self._reply(option, nbd.REP_ACK)
        else:
            self._refuse(option, nbd.REP_ERR_UNSUP, "unknown option")
        return None

    def _start_tls(self) -> None:
        if self._tls is None or not self._plain:
            self._refuse(nbd.OPT_STARTTLS, nbd.REP_ERR_POLICY, "TLS is not set up here, or is in use")
            return
        self._reply(nbd.OPT_STARTTLS, nbd.REP_ACK)
        self.wire = secure_server(self.wire, self._tls)
        self._plain = False

    def _list(self) -> None:
        for export in self._exports.values():
            name = export.encoded_name
            self._reply(nbd.OPT_LIST, nbd.REP_SERVER, nbd.COUNT.pack(len(name)) + name + export.description.encode())
        self._reply(nbd.OPT_LIST, nbd.REP_ACK)

    def _tell_contexts(self, option: int, data: bytes) -> None:
        setting = option == nbd.OPT_SET_META_CONTEXT
        try:
            name, queries = _parsed_queries(data)
        except (struct.error, ValueError) as error:
            self._refuse(option, nbd.REP_ERR_INVALID, str(error))
            return
        export = self._exports.get(name)
        if export is None or not self._structured:
            kind = nbd.REP_ERR_UNKNOWN if export is None else nbd.REP_ERR_INVALID
            self._refuse(option, kind, "no such export, or no structured replies")
            return
        wanted = (nbd.BASE_ALLOCATION,) if setting else (nbd.BASE_ALLOCATION, b"base:")
        found = (not queries and not setting) or any(query in wanted for query in queries)
        found = found and export.receiver is None  # a sink has no content to tell of
        if setting:
            self._context_of = name if found else None
        if found:
            self._reply(option, nbd.REP_META_CONTEXT, nbd.COUNT.pack(_CONTEXT if setting else 0) + nbd.BASE_ALLOCATION)
        self._reply(option, nbd.REP_ACK)

    def _inform(self, option: int, data: bytes) -> Chosen | None:
        """INFO, or GO if that ends the handshake."""
        try:
            name, infos = _parsed_infos(data)
        except (struct.error, ValueError) as error:
            self._refuse(option, nbd.REP_ERR_INVALID, str(error))
            return None
        export = self._exports.get(name)
        if export is None:
            self._refuse(option, nbd.REP_ERR_UNKNOWN, "no such export")
            return None
        try:
            device = export.acquire()
        except CasbackupError as error:
            self._refuse(option, nbd.REP_ERR_PLATFORM, error.message)
            return None
        going = False
        try:
            for info in _infos(export, device, infos):
                self._reply(option, nbd.REP_INFO, info)
            self._reply(option, nbd.REP_ACK)
            going = option == nbd.OPT_GO
        finally:
            if not going:
                export.release()
        return self._chosen(export, device) if going else None

    def _choose_by_name(self, name: bytes) -> Chosen:
        """The old way, in which a refusal is to hang up."""
        export = self._exports.get(name)
        if export is None:
            raise NbdConnectionFailed(f"{self.wire.peer}: no export {nbd.printable(name)!r}")
        device = export.acquire()
        try:
            reply = nbd.EXPORT_NAME_REPLY.pack(device.size_bytes, export_flags(export, device))
            self.wire.send(reply, self._padding)
        except BaseException:
            export.release()
            raise
        return self._chosen(export, device)

    def _chosen(self, export: Export, device: BlockDevice) -> Chosen:
        context = _CONTEXT if self._context_of == export.encoded_name else None
        return Chosen(export, device, self._structured, context)

    def _refuse(self, option: int, kind: int, reason: str) -> None:
        """:raise NbdConnectionFailed: for EXPORT_NAME, which knows no other refusal."""
        if option == nbd.OPT_EXPORT_NAME:
            raise NbdConnectionFailed(f"{self.wire.peer}: {reason}")
        self._reply(option, kind, reason.encode())

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.wire.send(nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, option, kind, len(data)), data)


def export_flags(export: Export, device: BlockDevice) -> ExportFlag:
    """Transmission flags. All connections share one device, so a flush on one holds for all: CAN_MULTI_CONN."""
    able = device.capabilities
    flags = ExportFlag.HAS_FLAGS | ExportFlag.SEND_DF
    if able.multi_conn:
        flags |= ExportFlag.CAN_MULTI_CONN
    if not able.writable:
        return flags | ExportFlag.READ_ONLY
    flags |= ExportFlag.SEND_FLUSH | ExportFlag.SEND_FUA | ExportFlag.SEND_WRITE_ZEROES
    return flags | ExportFlag.SEND_TRIM if able.can_trim else flags


def _infos(export: Export, device: BlockDevice, wanted: set[int]) -> Iterator[bytes]:
    able = device.capabilities
    preferred = _SINK_BLOCK_BYTES if export.receiver else max(able.preferred_block_bytes, able.min_block_bytes)
    sizes = (able.min_block_bytes, preferred, limits.MAX_NBD_REQUEST_BYTES)
    yield nbd.INFO_EXPORT_LAYOUT.pack(nbd.INFO_EXPORT, device.size_bytes, export_flags(export, device))
    yield nbd.INFO_BLOCK_SIZE_LAYOUT.pack(nbd.INFO_BLOCK_SIZE, *sizes)
    for kind, text in ((nbd.INFO_NAME, export.encoded_name), (nbd.INFO_DESCRIPTION, export.description.encode())):
        if kind in wanted:
            yield nbd.INFO_COUNT.pack(kind) + text


def _parsed_infos(data: bytes) -> tuple[bytes, set[int]]:
    """The name and the infos asked for. :raise ValueError: or ``struct.error`` when it is malformed."""
    name, rest = _counted(data)
    (count,) = nbd.INFO_COUNT.unpack_from(rest)
    infos = rest[nbd.INFO_COUNT.size :]
    if len(infos) != count * nbd.INFO_COUNT.size:
        raise ValueError("the infos are not as many as said")
    return name, {info for (info,) in nbd.INFO_COUNT.iter_unpack(infos)}


def _parsed_queries(data: bytes) -> tuple[bytes, list[bytes]]:
    """The name and the queries for contexts. Errors as ``_parsed_infos``."""
    name, rest = _counted(data)
    (count,) = nbd.COUNT.unpack_from(rest)
    rest, queries = rest[nbd.COUNT.size :], []
    while rest:
        query, rest = _counted(rest)
        queries.append(query)
    if len(queries) != count:
        raise ValueError("the queries are not as many as said")
    return name, queries


def _counted(data: bytes) -> tuple[bytes, bytes]:
    """A text that its length stands before, and what follows. Errors as ``_parsed_infos``."""
    (length,) = nbd.COUNT.unpack_from(data)
    text, rest = data[nbd.COUNT.size :][:length], data[nbd.COUNT.size + length :]
    if len(text) != length:
        raise ValueError("a text ends too early")
    return text, rest
