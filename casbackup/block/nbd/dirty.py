"""Reading a dirty bitmap of QEMU, which its NBD server offers as a meta context of an export (``nbd.txt`` of QEMU)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from casbackup.block.nbd import protocol as nbd
from casbackup.block.nbd.connection import Connection
from casbackup.block.nbd.protocol import Command
from casbackup.block.nbd.request import Request
from casbackup.block.nbd.uri import NbdAddress
from casbackup.errors import NbdProtocolError
from casbackup.units import GiB

_CONTEXT = "qemu:dirty-bitmap:"
_DIRTY = 1 << 0
_STEP_BYTES = 1 * GiB
_TIMEOUT_S = 30.0


def dirty_ranges(address: NbdAddress, bitmap: str) -> Iterator[tuple[int, int]]:
    """The ranges of an export, as (offset, length), that one of its bitmaps has as dirty. Ascending, they may touch.

    :raise NbdProtocolError: when the server does not offer the bitmap. Other errors as ``Connection``.
    """
    context = f"{_CONTEXT}{bitmap}".encode()
    connection = Connection.open(address, connect_timeout_s=_TIMEOUT_S, timeout_s=_TIMEOUT_S, context=context)
    with contextlib.closing(connection):
        if connection.info.context is None:
            raise NbdProtocolError(f"the NBD server does not offer the dirty bitmap {bitmap}")
        position, size_bytes = 0, connection.info.size_bytes
        while position < size_bytes:
            for length, flags in _status(connection, position, min(_STEP_BYTES, size_bytes - position)):
                if flags & _DIRTY:
                    yield position, min(length, size_bytes - position)
                position += length


def _status(connection: Connection, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Descriptors (length, flags) from ``offset`` on. They may end early, and the last one late."""
    request = Request(Command.BLOCK_STATUS, offset, length)
    connection.run([request])
    for length, flags in nbd.STATUS_DESCRIPTOR.iter_unpack(request.status or b""):
        if not length:
            raise NbdProtocolError("the NBD server gave a status for no bytes")
        yield length, flags
