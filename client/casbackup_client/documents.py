"""What ``--json`` prints: one document a command. Keys are stable; new ones may be added.

Sizes and offsets are bytes (``_bytes``), times RFC 3339 in UTC, durations milliseconds (``_ms``).
``docs/reference/json.md`` is generated from here. At run time nobody imports this: it is for readers and
the type checker.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict


class DiskDocument(TypedDict):
    """A disk of a snapshot."""

    name: str
    size_bytes: int
    source: str
    """Where it was read from, for people."""
    root: str
    """The id of its tree: disks with the same root and size have the same content."""
    role: NotRequired[str]
    """``vmstate``: it is the VM's RAM and device state. Left out for disks."""


class ConfigDocument(TypedDict):
    """A configuration file that was backed up with the disks."""

    name: str
    size_bytes: int
    id: str


class BackupStatsDocument(TypedDict):
    """What making a snapshot took. All but ``stored`` and ``read`` count bytes of the disks' content."""

    read_bytes: int
    """Read from the sources; holes are not."""
    zero_bytes: int
    """Holes and zeros."""
    reused_bytes: int
    """In the repository before."""
    new_bytes: int
    new_stored_bytes: int
    """What the new ones take in the repository, compressed, with the tree."""
    new_chunks: int
    duration_ms: int


class RangeDocument(TypedDict):
    """A range of a disk."""

    offset_bytes: int
    length_bytes: int


class MissingDocument(RangeDocument):
    """A range of a disk that an archive did not have; it reads as zeros."""

    disk: str


class ArchivedDocument(TypedDict):
    """What an archive called a disk or a config; ``name`` may hold anything."""

    name: str
    device_id: NotRequired[int | None]
    """Of disks."""


class ArchiveOriginDocument(TypedDict):
    """What the archive that a snapshot was imported from said of itself."""

    format: str
    uuid: str | None
    time_s: int | None
    """Unix time."""
    disks: list[ArchivedDocument]
    """In the order of the snapshot's disks."""
    configs: list[ArchivedDocument]
    missing: list[MissingDocument]


class LiveOriginDocument(TypedDict):
    """How a snapshot was taken of a VM that was running."""

    mode: str
    """Who moved the data: ``push`` for QEMU, ``pull`` for casbackup."""
    mode_note: str
    """Why QEMU, where pulling was not possible."""
    qemu: str
    """QEMU's version."""
    frozen: bool
    """Whether the guest's file systems were frozen at the instant."""
    note: str
    """Why not."""
    bitmap: str
    """In the names of the dirty bitmaps that record what was written since; empty: there are none."""
    increments: list[str]
    """Disks of which only what such a bitmap had recorded was read."""
    vmstate: str
    """How the VM's memory was saved, ``background`` or ``paused``; empty: it was not."""
    pause_ms: int
    """How long the guest stood still for that."""


class SnapshotDocument(TypedDict):
    """A snapshot."""

    reference: str
    """``vm/100@TIME``, with ``NAMESPACE:`` before it outside of the default namespace; commands take it as
    REF.
    """
    id: str
    namespace: str
    vm: str
    time: str
    sequence: int
    """Counts a VM's snapshots, whatever the clock did."""
    parent: str | None
    """The id of the VM's snapshot before it."""
    size_bytes: int
    """Of all disks and configs as they are restored."""
    disks: list[DiskDocument]
    configs: list[ConfigDocument]
    labels: list[str]
    notes: str
    pinned: bool
    host: str
    """Where it was made."""
    program: str
    """What made it."""
    stats: BackupStatsDocument
    archive: NotRequired[ArchiveOriginDocument]
    """If it was imported."""
    live: NotRequired[LiveOriginDocument]
    """If the VM was running."""


class SnapshotResultDocument(TypedDict):
    """Printed by ``backup``, ``show``, ``pin`` and ``label``."""

    snapshot: SnapshotDocument


class SnapshotsDocument(TypedDict):
    """Printed by ``snapshots``."""

    snapshots: list[SnapshotDocument]


class RepositoryDocument(TypedDict):
    """A repository."""

    path: str
    id: str
    format: int
    created: str
    compression_level: int
    key: str | None
    """The fingerprint of the key that it is encrypted with; null: it is not."""


class KeyCostDocument(TypedDict):
    """What it takes to try a passphrase of a key, by Argon2id."""

    iterations: int
    memory_kib: int
    lanes: int


class KeyDocument(TypedDict):
    """A key file, without its secrets."""

    fingerprint: str
    created: str
    comment: str
    path: str
    passphrases: list[KeyCostDocument]
    """One for each passphrase that opens it."""
    recipients: list[str]
    """Of age, whose identities open it."""
    plain: bool
    """Whoever can read the file has the key."""


class KeyResultDocument(TypedDict):
    """Printed by ``key create``, ``show``, ``import``, ``passwd``, ``recipient`` and ``store``."""

    key: KeyDocument


class KeysDocument(TypedDict):
    """Printed by ``key list``."""

    keys: list[KeyDocument]


class KeyCopyDocument(TypedDict):
    """Printed by ``key export`` and ``key paper``."""

    fingerprint: str
    path: str | None
    """The file that was written."""
    content: str | None
    """Without ``--output``: what would be in it."""


class InitDocument(TypedDict):
    """Printed by ``init``."""

    repository: RepositoryDocument
    new_key: NotRequired[KeyDocument]
    """The key that was made for it."""


class RestoredDiskDocument(TypedDict):
    """A disk that was restored."""

    disk: str
    target: str
    size_bytes: int
    written_bytes: int
    unchanged_bytes: int
    """With ``--in-place``: what the target held already."""
    zero_bytes: int
    lost_bytes: int
    lost: list[RangeDocument]
    """With ``--best-effort``: what could not be had and is zero now."""


class RestoredConfigDocument(TypedDict):
    """A config that was restored."""

    config: str
    target: str
    lost: bool


class RestoreDocument(TypedDict):
    """Printed by ``restore``."""

    snapshot: str
    id: str
    disks: list[RestoredDiskDocument]
    configs: list[RestoredConfigDocument]
    duration_ms: int


class DumpDocument(TypedDict):
    """Printed by ``dump --json -o FILE``."""

    snapshot: str
    disk: str | None
    config: str | None
    target: str
    offset_bytes: int
    length_bytes: int


class ExportedDiskDocument(TypedDict):
    """A disk in an archive; ``name`` is the archive's."""

    disk: str
    name: str
    size_bytes: int


class ExportDocument(TypedDict):
    """Printed by ``export``."""

    snapshot: str
    id: str
    format: str
    compression: str
    target: str
    """With ``--exec``, the command."""
    disks: list[ExportedDiskDocument]
    configs: list[str]
    left_out: list[str]
    """Configs that the format cannot hold."""
    size_bytes: int
    """Of the disks."""
    zero_bytes: int
    duration_ms: int


class ImportDocument(TypedDict):
    """Printed by ``import``."""

    snapshot: SnapshotDocument
    format: str
    missing_bytes: int
    missing: list[MissingDocument]
    """With ``--allow-incomplete``: what the archive did not have."""
    damage: str | None
    """With ``--allow-incomplete``: why the archive was not read to its end."""


class ArchiveDiskDocument(TypedDict):
    """A disk of an archive, by the archive's name, and by the one that it gets here."""

    name: str
    disk: str
    size_bytes: int
    device_id: int | None
    vmstate: bool


class ArchiveConfigDocument(TypedDict):
    """A config of an archive."""

    name: str
    size_bytes: int


class ArchiveListDocument(TypedDict):
    """Printed by ``archive list``."""

    archive: str
    format: str
    uuid: str | None
    time: str | None
    time_s: int | None
    disks: list[ArchiveDiskDocument]
    configs: list[ArchiveConfigDocument]


class ArchiveConfigContentDocument(TypedDict):
    """Printed by ``archive config --json``."""

    archive: str
    name: str
    content: str
    """Bytes that are not UTF-8 are shown as backslash escapes."""


class ArchiveFindingDocument(TypedDict):
    """Something that is wrong or odd in an archive; what does not apply is null."""

    severity: str
    """``error``, or ``warning`` for what is readable but not as it should be."""
    code: str
    text: str
    archive_offset: int | None
    """Byte of the decompressed archive."""
    disk: str | None
    device_id: int | None
    cluster: int | None
    disk_offset_bytes: int | None
    length_bytes: int | None


class ArchiveVerifyDocument(TypedDict):
    """Printed by ``archive verify``."""

    archive: str
    format: str
    quick: bool
    sound: bool
    """Without errors; with ``--strict``, without warnings too."""
    errors: int
    warnings: int
    findings: list[ArchiveFindingDocument]
    duration_ms: int


class ExtractedDocument(TypedDict):
    """A disk that was written to a file; ``name`` is the archive's."""

    name: str
    target: str
    size_bytes: int


class ArchiveExtractDocument(TypedDict):
    """Printed by ``archive extract``."""

    archive: str
    format: str
    disks: list[ExtractedDocument]
    configs: list[str]
    """Paths of the files."""
    missing_bytes: int
    missing: list[MissingDocument]
    """With ``--allow-incomplete``; ``disk`` is the archive's name."""
    damage: str | None
    duration_ms: int


class ArchiveSalvageDocument(ArchiveExtractDocument):
    """Printed by ``archive salvage``, and written to ``report.json`` in the folder."""

    findings: list[ArchiveFindingDocument]


class ArchiveConvertDocument(TypedDict):
    """Printed by ``archive convert``."""

    source: str
    source_format: str
    target: str
    format: str
    compression: str
    size_bytes: int
    """Of the disks."""
    left_out: list[str]
    """Configs that the format cannot hold."""
    duration_ms: int


class FormatOptionDocument(TypedDict):
    """What ``-o NAME=VALUE`` may set."""

    name: str
    meaning: str


class FormatDocument(TypedDict):
    """A format of archives."""

    name: str
    summary: str
    suffixes: list[str]
    reads: bool
    reads_pipes: bool
    writes: bool
    writes_pipes: bool
    """With the default options."""
    max_disks: int | None
    """null: it cannot be written."""
    configs: bool
    vmstate: bool
    verifies: bool
    """Has checks of its own; the others are verified by reading them."""
    salvages: bool
    options: list[FormatOptionDocument]


class FormatsDocument(TypedDict):
    """Printed by ``archive formats``."""

    formats: list[FormatDocument]
    broken: list[str]
    """Plugins that cannot be loaded, and why."""


class DiskDifferenceDocument(TypedDict):
    """A disk that two snapshots may have in common."""

    disk: str
    old_size_bytes: int | None
    """null: the older snapshot lacks the disk."""
    new_size_bytes: int | None
    differing_bytes: int
    ranges: list[RangeDocument]
    """Outside of them the disks are equal; within them they may differ."""


class DifferenceDocument(TypedDict):
    """Printed by ``diff``."""

    old: str
    new: str
    disks: list[DiskDifferenceDocument]
    configs: list[str]
    """Configs that were added, removed or changed."""


class UsageDocument(TypedDict):
    """What a group of snapshots costs."""

    logical_bytes: int
    """As they are restored: with zeros and repetitions."""
    plain_bytes: int
    """Their distinct content, before compression."""
    stored_bytes: int
    """What all that they need takes in packs."""
    unique_bytes: int
    """What of it nothing else needs: forgetting the group frees it."""
    shared_bytes: int
    """What of it other snapshots need too."""


class SnapshotUsageDocument(UsageDocument):
    """What a snapshot costs."""

    snapshot: str
    id: str


class VmUsageDocument(UsageDocument):
    """What all snapshots of a VM cost together."""

    namespace: str
    vm: str
    snapshots: int


class StatsDocument(TypedDict):
    """Printed by ``stats``."""

    snapshots: list[SnapshotUsageDocument]
    vms: list[VmUsageDocument]
    total: UsageDocument
    """All snapshots of the repository, whatever was asked for."""
    dedup_factor: float
    """Content of all snapshots, without zeros, against the distinct content among it."""
    compression_factor: float
    packs_bytes: int
    """The files in ``packs/``, with what is no longer needed but not freed yet."""
    index_bytes: int


class DecisionDocument(TypedDict):
    """What becomes of a snapshot."""

    snapshot: str
    id: str
    keep: bool
    reason: str


class GcDocument(TypedDict):
    """Printed by ``gc``: what was done, or with ``--dry-run`` would be."""

    dry_run: bool
    freed_bytes: int
    pending_bytes: int
    """Garbage that is still there: held by running backups, or spread thinly over packs."""
    removed_blobs: int
    dropped_packs: int
    rewritten_packs: int
    removed_orphans: int
    """Pack files that a crash left behind."""
    expired_sessions: int
    notes: list[str]


class ForgetDocument(TypedDict):
    """Printed by ``forget``."""

    dry_run: bool
    decisions: list[DecisionDocument]
    removed: int
    freed_bytes: int | None
    """What the next gc can free; null when damage keeps that from being known."""
    gc: GcDocument | None
    """With ``--gc``."""


class FindingDocument(TypedDict):
    """Something that a check found."""

    severity: str
    """``damage``, or ``note`` for what is odd but harmless."""
    object: str
    message: str


class AffectedDocument(TypedDict):
    """What cannot be restored of a snapshot: ranges of a disk, or a config."""

    snapshot: str
    id: str
    disk: str | None
    config: str | None
    lost_bytes: int
    ranges: list[RangeDocument]


class CheckDocument(TypedDict):
    """Printed by ``check``."""

    damaged: bool
    verified_by: str
    """What vouches for data: ``ids``; in an encrypted repository ``key``, or ``checksums`` if it was not at hand."""
    findings: list[FindingDocument]
    affected: list[AffectedDocument]
    snapshots: int
    nodes: int
    blobs: int
    packs: int
    verified_blobs: int
    verified_bytes: int
    unverified_blobs: int
    """Not read this time."""
    healed_blobs: int
    """Formerly damaged, sound now."""
    duration_ms: int


class RepairDocument(TypedDict):
    """Printed by ``repair``."""

    restored_manifests: int
    healed_blobs: int
    fetched_blobs: int
    """With ``--from``: what the other repository gave."""
    fetched_bytes: int
    moved_blobs: int
    """Sound ones, moved out of packs with damage."""
    lost_blobs: int
    quarantined: list[str]
    """Where the packs with damage are now."""
    affected: list[AffectedDocument]
    notes: list[str]


class SyncErrorDocument(TypedDict):
    """Why a snapshot could not be copied; the codes are those of `errors.md`."""

    code: str
    message: str


class SyncedSnapshotDocument(TypedDict):
    """What became of a snapshot."""

    snapshot: str
    id: str
    """The same at both ends."""
    outcome: str
    """``copied``, ``present`` (it was there), ``planned`` (by a dry run) or ``failed``."""
    sent_blobs: int
    sent_bytes: int
    """As stored; what several snapshots need counts for one of them."""
    error: SyncErrorDocument | None


class GatewayDocument(TypedDict):
    """Printed by ``gateway`` once it serves."""

    url: str
    """What the paths of the REST reference are appended to."""
    encrypted: bool


class RekeyDocument(TypedDict):
    """What ``sync --rekey`` cost. Keys are null for an end that is not encrypted."""

    source_key: str | None
    destination_key: str | None
    expected_read_bytes: int | None
    """Different content that has no copy yet, about; null if the source does not tell."""
    expected_sent_bytes: int | None
    """What that takes at the source."""
    read_bytes: int
    """Content that was read and encrypted anew."""


class SyncDocument(TypedDict):
    """Printed by ``sync``."""

    dry_run: bool
    snapshots: list[SyncedSnapshotDocument]
    """All that were meant."""
    changed: list[str]
    """Whose pin, labels or notes at the destination were brought up to date."""
    removed: list[str]
    """With ``--mirror``: from the destination."""
    spared: list[str]
    """With ``--mirror``: not removed, because they are pinned there."""
    unreadable: list[str]
    """Damaged manifests of the source."""
    sent_blobs: int
    sent_bytes: int
    """Of a dry run: tree nodes, and chunks before compression; what is sent will be less."""
    source_digest: str | None
    """BLAKE3 over the ids and root hashes of the snapshots meant, as the source has them; null after a dry run."""
    destination_digest: str | None
    equal: bool | None
    """The digests are the same: the destination has all that was meant, and it is the same."""
    rekey: RekeyDocument | None
    """Only with ``--rekey``: then copies have other ids, and there are no digests."""
    duration_ms: int


class RebuildDocument(TypedDict):
    """Printed by ``repair --rebuild-index``."""

    packs: int
    blobs: int
    notes: list[str]


class MigrateDocument(TypedDict):
    """Printed by ``migrate``."""

    dry_run: bool
    from_format: int
    to_format: int
    steps: list[str]
    """What each step does, in their order."""
    resumed: bool
    """An interrupted migration was there to be ended."""


class VersionDocument(TypedDict):
    """Printed by ``version``."""

    version: str
    repository_format: int
    """The format that this version writes."""
    oldest_repository_format: int
    """The oldest one that it can migrate."""
    python: str


class CompletionDocument(TypedDict):
    """Printed by ``completion``."""

    shell: str
    script: str


class AbortDocument(TypedDict):
    """Printed by ``sessions abort``."""

    aborted: str


class TokenDocument(TypedDict):
    """Who may do what with a repository over HTTP."""

    id: str
    name: str
    rights: list[str]
    namespaces: list[str]
    """Patterns, as those of VMs."""
    vms: list[str]
    isolated: bool
    created: str
    expires: str | None
    used: str | None
    """When it was last seen to be used, to the minute."""


class TokensDocument(TypedDict):
    """Printed by ``token list``."""

    tokens: list[TokenDocument]


class TokenResultDocument(TypedDict):
    """Printed by ``token revoke``."""

    token: TokenDocument


class NewTokenDocument(TypedDict):
    """Printed by ``token create`` and ``token rotate``."""

    token: TokenDocument
    secret: str
    """What a client shows; it cannot be had again."""


class NbdExportDocument(TypedDict):
    """A disk that can be used over NBD."""

    disk: str
    """It is the name of the export, too."""
    size_bytes: int
    writable: bool
    uri: str
    qemu: str
    """The option of QEMU that opens it as a block node."""


class NbdServeDocument(TypedDict):
    """Printed by ``nbd-serve`` once clients can connect. With ``--save-as``, the snapshot follows at the end."""

    snapshot: str
    id: str
    exports: list[NbdExportDocument]


class NbdProxyExportDocument(NbdExportDocument):
    """A disk for a VM, and where a backup reads it."""

    snapshot_uri: str


class NbdProxyDocument(TypedDict):
    """Printed by ``nbd-proxy`` once clients can connect."""

    exports: list[NbdProxyExportDocument]


class JobDocument(TypedDict):
    """A backup of a running VM. Bytes of all its disks together."""

    id: str
    namespace: str
    vm: str
    phase: str
    """``starting``, ``copying``, ``storing`` or ``cancelling``."""
    paused: bool
    done_bytes: int
    """Copied by QEMU."""
    total_bytes: int
    rate_bytes_s: int
    """What the repository has taken in the last seconds."""
    speed_limit_bytes_s: int
    """As asked for; 0: none."""
    waiting_bytes: int
    """In memory, on the way to the repository."""
    spooled_bytes: int
    """In the file of ``--spool``, on the way to the repository."""


class ServerJobDocument(TypedDict):
    """A job of a server. Times are RFC 3339."""

    id: str
    kind: str
    """``gc``, ``check``, ``forget`` or ``sync``."""
    task: str
    by: str
    """The token that asked for it, or ``schedule``."""
    state: str
    """``waiting``, ``running``, ``succeeded``, ``failed``, ``cancelled`` or ``interrupted``."""
    created: str
    started: str | None
    ended: str | None
    phase: str
    """What it is doing; empty when it is over."""
    done_bytes: int
    total_bytes: int | None
    result: str
    error: str | None
    """The code of what it failed with."""


class ServerJobResultDocument(TypedDict):
    """Printed by ``server-job start``, ``show`` and ``cancel``."""

    job: ServerJobDocument


class ServerJobsDocument(TypedDict):
    """Printed by ``server-job list``, the newest first."""

    jobs: list[ServerJobDocument]


class ServerJobLogDocument(TypedDict):
    """Printed by ``server-job log``."""

    id: str
    lines: list[str]


class JobsDocument(TypedDict):
    """Printed by ``job list``."""

    jobs: list[JobDocument]


class JobResultDocument(TypedDict):
    """Printed by ``job pause``, ``job resume``, ``job cancel`` and ``job speed``."""

    job: JobDocument


class SessionDocument(TypedDict):
    """Somebody who uses the repository, or a backup that was interrupted."""

    id: str
    namespace: str
    vm: str
    kind: str
    """``backup``, ``reader`` (a restore) or ``maintenance``."""
    active: bool
    """A process works on it now; otherwise it can be resumed or aborted."""
    seen: str
    """When it was opened or resumed last."""


class SessionsDocument(TypedDict):
    """Printed by ``sessions``."""

    sessions: list[SessionDocument]


class ErrorDocument(TypedDict):
    """What went wrong; the classes of errors are listed in ``errors.md``."""

    code: str
    message: str
    advice: str
    """What to do about it; may be empty."""
    exit_status: int
    retryable: bool
    """Trying the same again may help."""
    session: NotRequired[str]
    """Of a backup that can be resumed."""


class FailureDocument(TypedDict):
    """Printed to standard error when a command fails."""

    error: ErrorDocument
