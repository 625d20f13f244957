"""Every limit of casbackup in one table. ``docs/reference/limits.md`` is generated from here."""

from __future__ import annotations

from casbackup.units import GiB, KiB, MiB, TiB

BLOCK_BYTES = 4 * KiB
"""The unit of chunk boundaries: guest file systems allocate in blocks of this size."""

SEGMENT_BYTES = 4 * MiB
"""A leaf of the disk tree; chunks never cross it."""

SEGMENT_BLOCKS = SEGMENT_BYTES // BLOCK_BYTES

FANOUT = 256
"""Children of an inner node of the disk tree."""

MAX_LEVEL = 4
"""Levels of inner nodes: 4 MiB * 256**4 = 16 PiB, beyond the largest disk."""

MAX_DISK_BYTES = 1024 * TiB
"""The largest disk."""

MAX_DISKS = 254
"""Disks of one snapshot; the limit of the VMA format, so that every snapshot can be exported."""

MAX_CONFIGS = 256
MAX_CONFIG_BYTES = 16 * MiB
MAX_LABELS = 64
MAX_NOTES_BYTES = 64 * KiB
MAX_STORED_NOTES_BYTES = 96 * KiB
"""Sealed and written as text, notes take a third more."""

MAX_BLOB_BYTES = 16 * MiB
"""Plain size of one blob; chunks are far smaller, config blobs may reach it."""

PACK_BYTES = 64 * MiB
"""A pack is sealed once it holds this much."""

MAX_PACK_BYTES = 2 * GiB
"""Offsets within a pack are 32-bit."""

MAX_MANIFEST_BYTES = 4 * MiB
MAX_INDEX_BYTES = 4 * TiB
INITIAL_INDEX_MAP_BYTES = 256 * MiB

INDEX_BATCH_ENTRIES = 8_000
"""Entries that one index transaction of gc or repair changes at the most: other writers get their turn, and the pages
that it changes, one for each entry at worst, are held in memory."""

MAX_QUESTION_IDS = 65_536
"""Ids of one question to a server for what is missing; also of one request for records."""

MAX_KNOWN_IDS = 1_048_576
"""Tree nodes of a VM's last snapshot that a server tells a backup beforehand: those of 4 TiB."""

UPLOAD_BYTES = 4 * MiB
"""A client sends about so much in one request."""

MAX_UPLOAD_BYTES = 32 * MiB
"""The largest request with records; a record of the largest blob fits."""

MAX_REQUEST_BYTES = 8 * MiB
"""The largest other request: a manifest of the largest size, or a full question, fits."""

UPLOADS_IN_FLIGHT = 8
"""Requests with records that a client has under way at once."""

MAX_UPLOADING_BYTES = 64 * MiB
"""Records that a server has in memory while they arrive, of all clients; others wait."""

MAX_LIVE_SESSIONS = 256
"""Sessions of one repository that clients are attached to at once."""

MAX_CLOCK_SKEW_MS = 15 * 60 * 1000
"""By how much the time of a sealed snapshot may be off a server's clock, if the client is not trusted with times."""

MAX_READINGS = 1024
"""Readings of one repository at once."""

MAX_FORGET = 10_000
"""Snapshots that one request forgets or accounts for."""

MAX_ADOPTED = 64
"""Snapshots that one request makes visible."""

MAX_TOKENS = 10_000
"""Tokens of one repository."""

MAX_HTTP_RANGES = 64
"""Ranges in one request for a disk."""

MAX_REST_READERS = 64
"""Downloads from one repository at a time over REST; further ones are told to come later. A comparison of snapshots is
two.
"""

MAX_REST_EXPORTS = 2
"""Exports of one server at a time over REST; each takes some 40 MB."""

REST_CACHE_BYTES = 40 * MiB
"""Chunks in memory while disks are read over REST, of all repositories of a server."""

MAX_LISTED_SNAPSHOTS = 10_000
"""Snapshots in one answer that lists them over REST."""

MAX_SERVER_JOBS_KEPT = 500
"""Jobs of a repository that its server remembers."""

MAX_SERVER_JOBS_WAITING = 16
"""Jobs of a repository that wait for another one to end."""

MAX_SERVER_JOB_LOG_LINES = 1000
"""Lines of the log of a job that are kept: the first ones."""

ASSEMBLER_BYTES = 128 * MiB
"""What an import keeps in memory of segments that are not complete yet."""

MAX_RECORDED_GAPS = 10_000
"""Missing ranges that the manifest of an incomplete import records."""

MAX_ARCHIVE_NAMES_BYTES = 1 * MiB
"""All names of an imported archive together; the manifest keeps them."""

MAX_NBD_REQUEST_BYTES = 32 * MiB
"""Data of one NBD request that our server takes or gives; what the protocol lets clients assume."""

MAX_NBD_CONNECTIONS = 64
"""Connections to one NBD server at a time; further ones are closed at once."""

MAX_NBD_OPTIONS = 64
"""Options of one NBD handshake; clients send fewer than ten."""

MAX_NBD_OPTION_BYTES = 16 * KiB
"""Data of one option: a name of 4 KiB and some queries."""

NBD_HANDSHAKE_TIMEOUT_S = 10.0
"""For a whole NBD handshake, so that silent connections do not use up the places."""

NBD_STALL_TIMEOUT_S = 60.0
"""For one NBD request to arrive, or its reply to be taken, once it has begun."""

MAX_NBD_STATUS_EXTENTS = 4096
"""Descriptors in one reply to an NBD block status request; the client asks again for the rest."""

SINK_MEMORY_BYTES = 64 * MiB
"""Data of a live backup that is acknowledged and not yet consumed."""

SINK_SPOOL_BYTES = 1 * GiB
"""The file for what that memory has no room for, if there is to be one and nothing else is asked for."""

SERVED_CACHE_BYTES = 128 * MiB
"""Chunks in memory while disks of snapshots are served, unless asked otherwise."""

MIN_SERVED_CACHE_BYTES = 16 * MiB

MAX_TAR_RANGES = 4 * 1024 * 1024
"""Ranges with data of a disk in a tar archive; a reader holds them in 16 bytes each."""

MAX_TAR_MEMBERS = 20_000
"""Members of a tar archive of another program."""

MAX_QCOW2_DISK_BYTES = 64 * TiB
"""What is written as qcow2; QEMU refuses tables that a larger disk might need."""

MAX_VMDK_DISK_BYTES = 2031 * GiB
"""What is written as VMDK: its tables count sectors of the file in 32 bits, and a grain may take 129 of them."""

MAX_KEY_FILE_BYTES = 256 * KiB
"""A key file; one with the most wrappings for age recipients fits."""

MAX_KEY_WRAPPINGS = 32
"""Ways in which one key file wraps its key."""

MAX_KEY_COMMENT_CHARACTERS = 200

MAX_ARGON2_MEMORY_KIB = 1024 * 1024
"""Memory, in KiB, that a key file may ask for to make a key of a passphrase; so that a file of somebody else cannot
exhaust the machine."""

MAX_ARGON2_ITERATIONS = 16
MAX_ARGON2_LANES = 16

MAX_PASSPHRASE_BYTES = 1024
