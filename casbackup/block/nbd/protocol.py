"""The numbers and byte layouts of the NBD protocol that client and server use.

Source: "The NBD protocol", doc/proto.md of https://github.com/NetworkBlockDevice/nbd. Names are those of that
document without the prefix ``NBD_``. All integers are big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from casbackup.units import KiB, MiB

DEFAULT_PORT = 10809

# --- Handshake (section "Fixed newstyle negotiation")
INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OLDSTYLE_MAGIC = bytes.fromhex("0000420281861253")
REPLY_MAGIC = 0x0003E889045565A9

GREETING = struct.Struct(">8s8sH")
"""Init magic, option magic, handshake flags."""
CLIENT_FLAGS = struct.Struct(">I")
OPTION_HEADER = struct.Struct(">8sII")
"""Option magic, option, length of the data that follows."""
OPTION_REPLY = struct.Struct(">QIII")
"""Reply magic, option, reply type, length of the data that follows."""

FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP = REP_ERROR + 1
REP_ERR_POLICY = REP_ERROR + 2
REP_ERR_INVALID = REP_ERROR + 3
REP_ERR_PLATFORM = REP_ERROR + 4
REP_ERR_TLS_REQD = REP_ERROR + 5
REP_ERR_UNKNOWN = REP_ERROR + 6
REP_ERR_SHUTDOWN = REP_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD = REP_ERROR + 8
REP_ERR_TOO_BIG = REP_ERROR + 9
REP_ERROR_TEXT = {
    REP_ERR_UNSUP: "the server does not know the option",
    REP_ERR_POLICY: "the server's policy forbids it",
    REP_ERR_INVALID: "the server calls the request invalid",
    REP_ERR_PLATFORM: "the server's platform does not support it",
    REP_ERR_TLS_REQD: "the server demands TLS: use nbds:// or nbds+unix://",
    REP_ERR_UNKNOWN: "the server has no such export",
    REP_ERR_SHUTDOWN: "the server is shutting down",
    REP_ERR_BLOCK_SIZE_REQD: "the server demands block sizes",
    REP_ERR_TOO_BIG: "the request is too big for the server",
}

COUNT = struct.Struct(">I")
"""Of the bytes of a name or query, or of queries, that follow."""
INFO_COUNT = struct.Struct(">H")
"""Of the infos that a client asks for; each is of this layout, too."""

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3
INFO_EXPORT_LAYOUT = struct.Struct(">HQH")
"""Info type, size of the export in bytes, transmission flags."""
INFO_BLOCK_SIZE_LAYOUT = struct.Struct(">HIII")
"""Info type; minimum, preferred and maximum size of a request's payload in bytes."""

EXPORT_NAME_REPLY = struct.Struct(">QH")
"""Size in bytes and transmission flags: the answer to EXPORT_NAME."""
EXPORT_NAME_PADDING = bytes(124)
"""Follows it unless both sides have set NO_ZEROES."""

BASE_ALLOCATION = b"base:allocation"


class ExportFlag(IntFlag):
    """Transmission flags (section "Transmission flags")."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8


# --- Transmission (section "Transmission phase")
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

REQUEST = struct.Struct(">IHHQQI")
"""Magic, command flags, command, cookie, offset, length."""
REPLY_MAGIC_LAYOUT = struct.Struct(">I")
SIMPLE_REPLY = struct.Struct(">IIQ")
"""Magic, error, cookie."""
CHUNK_HEADER = struct.Struct(">IHHQI")
"""Magic, flags, type, cookie, length of the payload that follows."""
DATA_OFFSET = struct.Struct(">Q")
HOLE = struct.Struct(">QI")
"""Offset, length."""
STATUS_CONTEXT = struct.Struct(">I")
STATUS_DESCRIPTOR = struct.Struct(">II")
"""Length, status flags."""
CHUNK_ERROR = struct.Struct(">IH")
"""Error, length of the message that follows."""


class Command(IntEnum):
    """Request types."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7

    @property
    def text(self) -> str:
        return self.name.lower().replace("_", " ")


CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3

CHUNK_FLAG_DONE = 1

CHUNK_NONE = 0
CHUNK_OFFSET_DATA = 1
CHUNK_OFFSET_HOLE = 2
CHUNK_BLOCK_STATUS = 5
CHUNK_IS_ERROR = 1 << 15
CHUNK_ERROR_PLAIN = CHUNK_IS_ERROR + 1

STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1


class Errno(IntEnum):
    """Error values; they are fixed by the protocol and only happen to be Linux's numbers."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


ERROR_NAMES = {error.value: error.name for error in Errno}

# --- Limits of ours
MAX_EXPORT_NAME_BYTES = 4096
MAX_OPTION_REPLY_BYTES = 64 * KiB
MAX_OPTION_REPLIES = 64
"""Replies to one option before the last; a server lists far fewer infos and contexts."""
MAX_STATUS_BYTES = STATUS_CONTEXT.size + 1024 * 1024 * STATUS_DESCRIPTOR.size
"""nbdkit's largest reply to a block status request; qemu-nbd's is 1 MiB."""
MAX_CHUNKS = 16 * 1024
"""Chunks of one reply; qemu sends one per 64 KiB cluster at the worst, the rest is room."""
MAX_ERROR_BYTES = 8 * KiB
MAX_ERROR_TEXT_BYTES = 1 * KiB
"""Of what our server sends."""
DEFAULT_MAX_BLOCK_BYTES = 32 * MiB
"""What the protocol lets a client assume when the server does not say."""
MAX_MIN_BLOCK_BYTES = 64 * KiB


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What the handshake found out. Equal for all connections to one export."""

    size_bytes: int
    flags: ExportFlag
    structured: bool
    """Structured replies were negotiated; then reads are answered in chunks."""
    context: int | None
    """The id in status replies of the context that was asked for; None when the server does not have it."""
    min_block_bytes: int = 1
    preferred_block_bytes: int = 4 * KiB
    max_block_bytes: int = DEFAULT_MAX_BLOCK_BYTES


def printable(raw: bytes) -> str:
    """What the other side sent made harmless for a terminal and short."""
    text = raw[:400].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)
