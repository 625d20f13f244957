"""What arrives is checked before it is stored: the sender is never trusted."""

from __future__ import annotations

from casbackup.codec.codec import Codec
from casbackup.codec.records import parse_record
from casbackup.errors import InvalidName, RequestRefused, ServerProtocolError, UsageError
from casbackup.fs import Buffer
from casbackup.ids import parse_config_name, parse_label
from casbackup.limits import (
    MAX_CONFIG_BYTES,
    MAX_CONFIGS,
    MAX_DISKS,
    MAX_LABELS,
    MAX_QUESTION_IDS,
    MAX_STORED_NOTES_BYTES,
)
from casbackup.repository.adoption import check_roots
from casbackup.repository.repository import Repository
from casbackup.spec.manifest import Manifest
from casbackup.spec.record import BlobKind, Record
from casbackup.spec.wire import parse_frames

_MAX_TEXT_BYTES = 4096
"""Of a disk's source, a host, a program."""


def verified_records(data: Buffer, codec: Codec) -> list[Record]:
    """The records of a request, which keep its memory. Checksums are right, and ids are those of the plain bytes unless
    these are sealed; of tree nodes the session sees to that.

    :raise ServerProtocolError: when they are not records. :raise BlobDamaged: when one is not what it says.
    """
    records = [parse_record(frame, at=f"place {n} of the request") for n, frame in enumerate(parse_frames(data))]
    if len(records) > MAX_QUESTION_IDS:
        raise RequestRefused(f"more than {MAX_QUESTION_IDS} records in one request")
    codec.verify_contents([record for record in records if record.kind != BlobKind.NODE])
    return records


def check_draft(repository: Repository, draft: Manifest) -> None:
    """Could it be the manifest of a snapshot? Its blobs are stored: that the session checks.

    :raise UsageError: when a limit is exceeded or a name wrong. :raise NodeInvalid: when a root is not of its disk.
    """
    if not draft.sealed and (draft.sequence or draft.parent is not None):
        raise ServerProtocolError("the server numbers snapshots itself")
    if bool(draft.sealed) != repository.config.encrypted:
        raise UsageError("manifests are sealed in an encrypted repository, and nowhere else")
    check_manifest(draft)
    check_roots(repository, draft)


def check_manifest(draft: Manifest) -> None:
    """:raise UsageError: when a limit is exceeded, or a name wrong or there twice."""
    names = [disk.name for disk in draft.disks]
    if len(set(names)) < len(names) or len({c.name for c in draft.configs}) < len(draft.configs):
        raise UsageError("two disks or configs have the same name")
    if len(names) > MAX_DISKS or len(draft.configs) > MAX_CONFIGS or len(draft.labels) > MAX_LABELS:
        raise UsageError(f"more than {MAX_DISKS} disks, {MAX_CONFIGS} configs or {MAX_LABELS} labels")
    check_texts(draft.labels, draft.notes)
    for config in draft.configs:
        parse_config_name(config.name)
        if not 0 <= config.size_bytes <= MAX_CONFIG_BYTES:
            raise UsageError(f"config {config.name} has an impossible size")
    for text in (draft.host, draft.program, *(disk.source for disk in draft.disks)):
        if len(text.encode(errors="replace")) > _MAX_TEXT_BYTES:
            raise UsageError(f"a text in the manifest has more than {_MAX_TEXT_BYTES} bytes")


def check_texts(labels: tuple[str, ...], notes: str) -> None:
    """:raise InvalidName: for a wrong label. :raise UsageError: when the notes are too long."""
    for label in labels:
        parse_label(label)
    try:
        size = len(notes.encode())
    except UnicodeEncodeError as error:
        raise InvalidName("the notes are not valid text") from error
    if size > MAX_STORED_NOTES_BYTES:
        raise UsageError(f"the notes have more than {MAX_STORED_NOTES_BYTES} bytes")
